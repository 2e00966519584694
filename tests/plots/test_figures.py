"""Figures are drawn again from their CSV alone: the same pictures that lie in figures/."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import save_model
from PIL import Image
from rich.console import Console

from analysis.api import analyze, read
from analysis.plots.figures import FIGURES, find_figure_kind
from analysis.report.folder import save_run
from defenses.catalog import get_defense

ROOT = Path(__file__).resolve().parent.parent / "figures"
SHIPPED = [(path.parent.name, path.stem) for path in sorted(ROOT.glob("*/*.png"))]
# One of each kind, and of a kind with several readouts the last: which readout it is of stands in its name.
EACH = {find_figure_kind(stem): (folder, stem) for folder, stem in SHIPPED if folder != "ensembles-qwen"}


def pixels(picture):
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def redrawn(figure):
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return pixels(held)


def different(one, other):
    return (np.abs(one - other).max(axis=2) > 8).sum()


def test_every_picture_has_its_csv_and_a_record_beside_it():
    assert len(SHIPPED) > 30
    for folder, stem in SHIPPED:
        assert (ROOT / folder / f"{stem}.csv").is_file(), (folder, stem)
        assert json.loads((ROOT / folder / "run.json").read_text("utf-8"))["model"]["name"]


def test_every_kind_can_be_drawn_again_and_all_but_cost_are_in_the_gallery():
    assert set(EACH) <= set(FIGURES) and set(FIGURES) - set(EACH) == {"cost"}


@pytest.mark.parametrize("kind", sorted(EACH))
def test_a_figure_is_drawn_again_from_its_csv(kind):
    folder, stem = EACH[kind]
    shipped, again = pixels(ROOT / folder / f"{stem}.png"), redrawn(read(ROOT / folder).draw_figure(stem))
    assert shipped.shape == again.shape
    # Seven digits in the CSV change an edge by a shade or two.
    assert different(shipped, again) <= 20


def test_another_number_is_another_picture(tmp_path):
    folder = shutil.copytree(ROOT / "backdooralign", tmp_path / "copy")
    text = (folder / "square.csv").read_text("utf-8")
    run = read(folder)
    before = redrawn(run.draw_figure("square"))
    value = str(run.tables["square"]["shift"].max())
    assert text.count(value) == 1
    (folder / "square.csv").write_text(text.replace(value, str(float(value) - 0.1)), "utf-8")
    after = redrawn(read(folder).draw_figure("square"))
    assert before.shape != after.shape or different(before, after) > 40


def test_a_run_that_was_just_made_draws_what_the_command_saves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "tiny")
    run = analyze(["policy", get_defense("self_reminder")], str(tmp_path / "tiny"), limit=20, offline=True)
    assert run.figures == ("margins", "plane", "roc")
    save_run(tmp_path / "run", run, Console(quiet=True))
    again = read(tmp_path / "run")
    assert again.figures == run.figures and list(again.format_summary().index) == list(
        run.format_summary().index
    )
    for name in run.figures:
        assert different(redrawn(run.draw_figure(name)), pixels(tmp_path / "run" / f"{name}.png")) == 0
    with pytest.raises(ValueError, match=r"no figure 'plan'.*margins, plane, roc"):
        run.draw_figure("plan")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("arms", r"attacked, the model answers 100 % \[93, 100\].*behind it 4 % \[1, 14\], refusing 96 %"),
        ("validity", r"words in 0 of 12, not in 4, open in 8; calibrated in \d+ of 12"),
        ("smollm2", r"^Of 34 defenses on smollm2"),
    ],
)
def test_a_stored_run_says_first_what_it_is_about(folder, words):
    assert re.search(words, str(read(ROOT / folder)).splitlines()[0])
