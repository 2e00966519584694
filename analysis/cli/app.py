"""The Typer application to which the modules of `analysis.cli` add their commands."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class CommandInterrupted(Exception):
    """Ctrl-C, wrapped so that typer does not handle it."""


class _CommandGroup(TyperGroup):
    """Command group that passes a `typer.Context` to callbacks and leaves Ctrl-C to `cli.main`."""

    context_class = typer.Context

    def invoke(self, ctx: Any) -> Any:
        """Run a command; typer alone would end an interrupted one without a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise CommandInterrupted from error


app = typer.Typer(
    cls=_CommandGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
