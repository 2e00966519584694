"""The frame of the command: one group, to which the other `cli_` modules add theirs."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class CommandInterrupted(Exception):
    """Ctrl-C, on its way past typer."""


class _CommandGroup(TyperGroup):
    """The commands, called with the context that typer's hints promise, with Ctrl-C left to `cli.main`."""

    context_class = typer.Context

    def invoke(self, ctx: Any) -> Any:
        """Run a command; typer by itself would end an interrupted one without a word."""
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
