"""`analyze plot` draws figures of a stored run, and says what it wrote and left out."""

from __future__ import annotations

from pathlib import Path

from conftest import run_cli

RUN = Path(__file__).resolve().parents[2] / "figures" / "detection"


def test_plot_writes_the_figures_that_show_the_chosen_defense(tmp_path):
    done = run_cli("plot", RUN, "dumbbell", "--style", "paper", "--only", "harm_probe", "-o", tmp_path)
    assert done.code == 0 and f"Wrote {tmp_path / 'dumbbell.pdf'}" in done.err.replace("\n", "")
    assert (tmp_path / "dumbbell.pdf").read_bytes().startswith(b"%PDF")
    unknown = run_cli("plot", RUN, "dumbell", "-o", tmp_path / "none")
    assert unknown.code == 2 and "did you mean 'dumbbell'?" in unknown.err
    assert not (tmp_path / "none").exists()
