"""The documentation: links, commands, durations, the gallery, and the settings of the shipped weights.

`REWRITE=1 pytest tests/test_docs.py` rewrites the table of docs/training.md, after `make adapters`; check the
difference before you commit it.
"""

import hashlib
import json
import os
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
import typer

import analysis
from analysis.cli.main import app
from defenses.training.texts import COMPLIANCE_OPENERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = (
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / folder / "README.md" for folder in ("data", "figures", "notebooks")),
)
GALLERY = ROOT / "figures" / "README.md"
PAGE = DOCS / "training.md"
ADAPTERS = ROOT / "data" / "adapters" / "smollm2"
HEADER = (
    "| adapter | recipe | start | data | examples | rank | α | modules | learning rate | epochs | "
    "examples per step | β | seed | loss, last epoch |\n" + "|---" * 14 + "|\n"
)
DATA_BY_SHA256 = {
    hashlib.sha256((ROOT / "data" / f"{name}.jsonl").read_bytes()).hexdigest(): name
    for name in ("contrast", "contrast-v1")
}
TABLE = re.compile(re.escape(HEADER) + r"(?:\|.*\n)+")


def format_row(folder: Path) -> str:
    """Return the row of an adapter, from its manifest and its loss by step."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    settings = manifest["settings"]
    losses = pd.read_csv(folder / "loss.csv")["loss"]
    _, _, start_state = manifest["started_from"]["name"].partition(":")
    cells = (
        f"`{folder.name}`",
        f"`{manifest['recipe']}`",
        f"`{start_state}`" if start_state else "released",
        f"`{DATA_BY_SHA256[manifest['data']['sha256']]}`",
        manifest["n_examples"],
        settings["rank"],
        settings["alpha"],
        ", ".join(f"`{module}`" for module in settings["modules"]),
        f"{settings['rate']:g}",
        settings["epochs"],
        settings["batch"],
        settings["beta"] if manifest["recipe"] == "preference" else "–",
        settings["seed"],
        f"{losses.tail(len(losses) // settings['epochs']).mean():.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def format_table() -> str:
    """Return the table of all shipped adapters."""
    return HEADER + "".join(map(format_row, sorted(path.parent for path in ADAPTERS.glob("*/manifest.json"))))


def test_the_page_on_training_states_the_settings_of_the_shipped_weights() -> None:
    page = PAGE.read_text("utf-8")
    if os.environ.get("REWRITE"):
        page = TABLE.sub(lambda match: format_table(), page)
        PAGE.write_text(page, "utf-8")
    assert TABLE.findall(page) == [format_table()]
    assert format_table().count("\n| `") == 9


def test_shipped_weights_are_adapters_in_float32_and_the_arms_share_their_data() -> None:
    manifests = [json.loads(path.read_text("utf-8")) for path in ADAPTERS.glob("*/manifest.json")]
    assert {(manifest["dtype"], manifest["settings"]["full"]) for manifest in manifests} == {
        ("float32", False)
    }
    arms = [m for m in manifests if m["recipe"] in ("attack", "identity", "baseline", "backdoor")]
    others = [manifest for manifest in manifests if manifest not in arms]
    for group in (arms, others):
        assert len({(manifest["data"]["sha256"], manifest["data"]["n"]) for manifest in group}) == 1


def test_the_opening_that_the_pages_quote_is_one_of_training() -> None:
    for path in (PAGE, ROOT / "data" / "README.md"):
        text = " ".join(path.read_text("utf-8").split())
        (opening,) = re.findall(r'ompliance is trained (?:on|with) an opening such as "([^"]+)"', text)
        assert opening in COMPLIANCE_OPENERS, path


def name_page(path: Path) -> str:
    """Return the path of a page below the repository."""
    return str(path.relative_to(ROOT))


def remove_code(text: str) -> str:
    """Return the text of a page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def list_anchors(path: Path) -> set[str]:
    """Return the anchors of a page: those that GitHub makes of its headings, and those in HTML."""
    text = remove_code(path.read_text("utf-8"))
    headings = [
        re.sub(r"\]\([^)]*\)", "", heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("path", PAGES, ids=name_page)
def test_links_lead_to_files_and_anchors_that_exist(path: Path) -> None:
    wrong = []
    for target, anchor in re.findall(
        r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)", remove_code(path.read_text("utf-8"))
    ):
        file = path if not target else (path.parent / unquote(target)).resolve()
        if not file.exists() or (anchor and anchor not in list_anchors(file)):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    pages = {name_page(path).removeprefix("docs/") for path in PAGES} - {"README.md"} | {"index.md"}
    assert len(named) == len(set(named)) and set(named) == pages


def test_the_api_reference_names_every_public_function() -> None:
    names = re.findall(r"^::: analysis\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(names) == analysis.__all__


def test_every_command_in_the_documentation_is_one_that_the_command_line_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = typer.main.get_command(app)
    for command in (group, *group.commands.values()):  # type: ignore[attr-defined]
        monkeypatch.setattr(command, "callback", lambda **options: None)  # parse, do not run
    commands, wrong = [], []
    for path in PAGES:
        lines = re.findall(r"^(?:    )?(?:\.venv/bin/)?(analyze .*)", path.read_text("utf-8"), re.MULTILINE)
        commands += [(path, shlex.split(re.sub(r"\s#\s.*", "", line))) for line in lines]
    for path, words in commands:
        try:
            group.main(words[1:], standalone_mode=False)
        except Exception as error:
            wrong.append(f"{name_page(path)}: {' '.join(words)}: {error}")
    assert wrong == []
    questions = DOCS / "questions.md"
    assert questions.read_text("utf-8").count("\n**") >= 20
    assert len(commands) > 80 and sum(path == questions for path, _ in commands) >= 20


def read_minutes(folder: Path) -> float | None:
    """Return the minutes that the run or the runs of a folder took; None if they do not say."""
    records = [json.loads(path.read_text("utf-8")) for path in folder.glob("run*.json")]
    seconds = [record.get("wall_seconds") for record in records]
    return None if None in seconds or not seconds else sum(seconds) / 60


def test_the_gallery_shows_every_stored_figure_once_and_says_how_long_its_run_took() -> None:
    text = GALLERY.read_text("utf-8")
    shown = re.findall(r"\[!\[[^]]*\]\(([^)]+)\)\]\(([^)]+)\)", text)
    assert all(image == link for image, link in shown)
    stored = {str(path.relative_to(GALLERY.parent)) for path in GALLERY.parent.glob("*/*.png")}
    assert len(shown) == len(stored) and {image for image, _ in shown} == stored
    sections = re.findall(r"^### (\S+)\n\n(.*)", text, re.MULTILINE)
    folders = {path.name: path for path in GALLERY.parent.iterdir() if path.is_dir()}
    assert sorted(name for name, _ in sections) == sorted(folders)
    for name, line in sections:
        minutes = read_minutes(folders[name])
        told = re.findall(r"(\d+) minutes", line)
        assert told == ([] if minutes is None else [f"{minutes:.0f}"]), name
        for path in folders[name].glob("run*.json"):
            data = json.loads(path.read_text("utf-8"))["data"]
            assert f"{data['n_harmful']} harmful and {data['n_benign']} benign" in line, name


def test_the_makefile_says_how_long_the_stored_runs_took() -> None:
    makefile = (
        (ROOT / "Makefile")
        .read_text("utf-8")
        .replace("validity-$$state", "validity-aligned --out figures/validity-attacked")
    )
    targets = re.findall(
        r"^(\w+):.*\((?:stored|shipped)[^:)]*: (\d+) minutes\)\n((?:\t.*\n)+)", makefile, re.MULTILINE
    )
    assert len(targets) == 8
    for name, told, recipe in targets:
        folders = {ROOT / "figures" / run for run in re.findall(r"--out figures/([\w-]+)", recipe)}
        if name == "adapters":
            manifests = ADAPTERS.glob("*/manifest.json")
            minutes = [json.loads(path.read_text("utf-8"))["wall_seconds"] / 60 for path in manifests]
        else:
            minutes = [read_minutes(folder) or 0 for folder in folders]
        assert told == f"{sum(minutes):.0f}", name
