"""Every notebook runs from the top and puts out what was saved in it; called as a program, this saves it."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted(path.stem for path in HERE.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.-])[-−+]?\d+(?:\.\d+)?(?![\w.])")
pytestmark = [pytest.mark.slow, pytest.mark.embedded, pytest.mark.timeout(600)]


def shown(cell):
    """What a cell has put out, as text; a picture stands for itself."""
    found = []
    for output in cell.get("outputs", []):
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output["text"]
        data = output.get("data", {"text/plain": output.get("text", "")})
        found.append("a picture" if "image/png" in data else data["text/plain"])
    return "\n".join(found)


def executed(name):
    """The notebook, run from the top."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, timeout=500, record_timing=False, resources=where)
    return client.execute(env=os.environ | {"HF_HUB_OFFLINE": "1"})


def numbers(text):
    return [float(one.replace("−", "-")) for one in NUMBER.findall(text)]


def test_there_are_six_and_they_are_numbered():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_the_top_and_says_what_was_saved(name, smollm2, monkeypatch):
    assert smollm2.model is not None  # converted by now, so that no notebook shows how that goes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two run at once
    saved, fresh = nbformat.read(HERE / f"{name}.ipynb", as_version=4), executed(name)
    pairs = [(shown(one), shown(two)) for one, two in zip(saved.cells, fresh.cells, strict=True)]
    assert any("a picture" in old for old, _ in pairs)
    for old, new in pairs:
        # Words are the same; numbers as far as processors agree.
        assert NUMBER.sub("#", old).split() == NUMBER.sub("#", new).split()
        for one, two in zip(numbers(old), numbers(new), strict=True):
            assert two == pytest.approx(one, abs=0.03, rel=0.02)


if __name__ == "__main__":
    for each in NAMES:
        nbformat.write(executed(each), HERE / f"{each}.ipynb")
