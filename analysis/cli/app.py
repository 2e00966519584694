"""The Typer application to which the modules of `analysis.cli` add their commands."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from defenses.errors import UserError


class CommandInterrupted(Exception):
    """Ctrl-C, wrapped so that typer does not handle it."""


class _CommandGroup(TyperGroup):
    """Command group that passes a `typer.Context` to callbacks and leaves Ctrl-C to `cli.main`."""

    context_class = typer.Context

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command; raise with a hint if its name is one of a defense."""
        from defenses.catalog import list_defense_names

        if args and args[0] not in self.commands and args[0] in list_defense_names():
            raise UserError(
                f"{args[0]!r} is a defense and no command: choose each defense with a -d of its own, as in "
                f"-d {args[0]}"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; typer alone would end an interrupted one without a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise CommandInterrupted from error


app = typer.Typer(
    cls=_CommandGroup,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
