"""Entry point of the `analyze` command: runs it and turns exceptions into messages and exit codes."""

from __future__ import annotations

import errno
import sys

import typer

from analysis.cli import (  # noqa: F401  # each registers its commands
    agreement,
    analyze,
    catalog,
    ensembles,
    label,
    mechanism,
    train,
    validate,
)
from analysis.cli.app import CommandInterrupted, app
from analysis.cli.streams import flush_output_streams, prepare_output_streams
from defenses.errors import UserError


def main() -> None:
    """Run the command and exit with its code.

    An error is one line on stderr. Exit codes: 2 for a user's mistake, 1 for a fault of the program, 130 for
    Ctrl-C.
    """
    debug = "--debug" in sys.argv
    prepare_output_streams()
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
                "no space left on the disk; nothing was written. Free some space or choose another -o",
                2,
                debug,
                error,
            )
    except Exception as error:
        # A usage error. Its class is that of the click that typer bundles or imports, which varies.
        if hasattr(error, "format_message"):
            code = _report_error(
                f"{error.format_message()} (`analyze --help` and `analyze COMMAND --help` list the options)",
                2,
                debug,
                error,
            )
        else:
            code = _report_error(
                f"internal error in refusalscope: {type(error).__name__}: {error} "
                "(--debug shows the traceback)",
                1,
                debug,
                error,
            )
    flush_output_streams()
    sys.exit(code if isinstance(code, int) else 0)


def _report_error(message: str, exit_code: int, debug: bool, error: BaseException | None) -> int:
    if debug and error is not None:
        raise error
    typer.echo(f"analyze: {' '.join(message.split())}", err=True)
    return exit_code
