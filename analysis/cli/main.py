"""The command `analyze`, all of it, and how it ends. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import sys

import typer

from analysis.cli import analyze, catalog, ensembles, mechanism, train, validate  # noqa: F401  # each adds its commands
from analysis.cli.app import CommandInterrupted, app
from defenses.errors import UserError


def main() -> None:
    """Run the command; a mistake is one line on stderr: exit 2 for the user's, 1 for ours, 130 for Ctrl-C."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _report_error(str(error), 2, debug, error)
    except (CommandInterrupted, KeyboardInterrupt, typer.Abort):
        code = _report_error("interrupted; nothing was written", 130, False, None)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            code = _report_error(f"{error}", 1, debug, error)
        else:
            code = _report_error(
                "no space left on the disk: nothing was written; free some, or choose another -o",
                2,
                debug,
                error,
            )
    except Exception as error:
        # Mistyped options: an error of the click that typer carries or finds, which depends on its version.
        if hasattr(error, "format_message"):
            code = _report_error(
                f"{error.format_message()} (`analyze --help` lists the options)", 2, debug, error
            )
        else:
            code = _report_error(
                f"a fault in refusalscope, {type(error).__name__}: {error} (--debug shows where)",
                1,
                debug,
                error,
            )
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(message: str, exit_code: int, debug: bool, error: BaseException | None) -> int:
    if debug and error is not None:
        raise error
    typer.echo(f"analyze: {' '.join(message.split())}", err=True)
    return exit_code
