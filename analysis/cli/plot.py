"""The command `analyze plot`: figures of a stored run, for a screen or for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analysis.cli.app import app


@app.command()
def plot(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Figures, such as plane or forest. Default: all of the run."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="pdf (fonts embedded), svg (text stays text) or png.")
    ] = "pdf",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Draw this defense and the undefended model only. Repeatable."),
    ] = None,
    style: Annotated[
        str,
        typer.Option(
            "--style",
            help="screen, or paper: 3.3 or 6.9 inches wide, texts of 8 points, no title and no caption.",
        ),
    ] = "screen",
    width: Annotated[
        float | None, typer.Option("--width", help="Width of each figure in inches. Default: by the style.")
    ] = None,
    title: Annotated[
        bool | None, typer.Option("--title/--no-title", help="Write titles. Default: on a screen.")
    ] = None,
    caption: Annotated[
        bool | None, typer.Option("--caption/--no-caption", help="Write captions. Default: on a screen.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder.")] = Path(),
) -> None:
    """Draw figures of a stored run from its tables, without a model.

    analyze plot runs/x forest plane --format pdf --style paper -o paper/figures
    """
    options = {"style": style, "width": width, "title": title, "caption": caption}
    raise typer.Exit(run_plot_command(run_folder, names or [], format, only or [], out, options))


def run_plot_command(
    folder: Path,
    names: Sequence[str],
    file_format: str,
    only: Sequence[str],
    out: Path,
    options: dict[str, Any],
) -> int:
    """Draw and save the figures, and print where they are; return the exit code.

    Args:
        folder: of the run.
        names: of the figures; empty for all.
        file_format: pdf, svg or png.
        only: defenses to draw; empty for all.
        out: output folder.
        options: of `Run.draw_figure`.
    """
    from analysis.api import read
    from analysis.progress import make_notifier
    from analysis.report.folder import write_figures

    console = Console(stderr=True)
    with console.status("drawing"):
        files, omitted = write_figures(read(folder), out, names, file_format, only, **options)
    notify = make_notifier(console)
    for path in files:
        notify(f"Wrote {path}")
    if omitted:
        notify(f"note: figures that do not show {', '.join(only)} are left out: {', '.join(omitted)}")
    return 0
