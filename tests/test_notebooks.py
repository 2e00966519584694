"""Every notebook runs from the top and reproduces its saved outputs; run as a program, this saves them."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK_FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOK_FOLDER.glob("*.ipynb"))
LIVE = (
    "01-first-analysis",
    "06-your-own",
    "07-images",
)  # they run the model for minutes; the others read stored runs
NUMBER = re.compile(r"(?<![\w.-])[-−+]?\d+(?:\.\d+)?(?![\w.])")
pytestmark = [pytest.mark.slow, pytest.mark.embedded, pytest.mark.timeout(600)]


def format_outputs(cell):
    """Return the outputs of a cell as text; "a picture" stands for a figure."""
    texts = []
    for output in cell.get("outputs", []):
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output["text"]
        data = output.get("data", {"text/plain": output.get("text", "")})
        texts.append("a picture" if "image/png" in data else data["text/plain"])
    return "\n".join(texts)


def execute_notebook(name):
    """Run a notebook from the top and return it with its new outputs."""
    notebook = nbformat.read(NOTEBOOK_FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK_FOLDER)}}
    client = NotebookClient(notebook, timeout=500, record_timing=False, resources=resources)
    return client.execute(env=os.environ | {"HF_HUB_OFFLINE": "1"})


def find_numbers(text):
    """Return the numbers in a text."""
    return [float(number.replace("−", "-")) for number in NUMBER.findall(text)]


def test_there_are_seven_notebooks_and_they_are_numbered():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name in LIVE)) for name in NAMES]
)
def test_a_notebook_runs_from_the_top_and_reproduces_its_outputs(name, smollm2, monkeypatch):
    assert smollm2.model is not None  # converted before, so that no notebook shows the conversion
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two notebooks run at once
    saved = nbformat.read(NOTEBOOK_FOLDER / f"{name}.ipynb", as_version=4)
    executed = execute_notebook(name)
    outputs = [
        (format_outputs(old_cell), format_outputs(new_cell))
        for old_cell, new_cell in zip(saved.cells, executed.cells, strict=True)
    ]
    assert any("a picture" in old for old, _ in outputs)
    for old, new in outputs:
        # The words are equal; the numbers are equal as far as processors agree.
        assert NUMBER.sub("#", old).split() == NUMBER.sub("#", new).split()
        for old_number, new_number in zip(find_numbers(old), find_numbers(new), strict=True):
            assert new_number == pytest.approx(old_number, abs=0.03, rel=0.02)


if __name__ == "__main__":
    for notebook_name in NAMES:
        nbformat.write(execute_notebook(notebook_name), NOTEBOOK_FOLDER / f"{notebook_name}.ipynb")
