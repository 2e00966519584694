"""Entry point of the `analyze` command: runs it and turns exceptions into messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import typer

from analysis.cli import (  # noqa: F401  # each registers its commands
    agreement,
    analyze,
    catalog,
    depth,
    ensembles,
    label,
    mechanism,
    plot,
    suffix,
    train,
    validate,
)
from analysis.cli.app import CommandInterrupted, app
from analysis.cli.streams import flush_output_streams, prepare_output_streams
from defenses.errors import UserError, is_disk_full

_INTERRUPTED = 130  # exit code after Ctrl-C


def main() -> None:
    """Run the command and exit with its code.

    An error is one line on stderr. Exit codes: 2 for a user's mistake, 1 for a fault of the program, 130 for
    Ctrl-C, 143 for SIGTERM, with which batch systems end a job: it stops a run as Ctrl-C does.
    """
    debug = "--debug" in sys.argv
    # Threads that wait give their CPU to other processes. To be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_output_streams()
    terminations: list[int] = []

    def stop_run(number: int, frame: Any) -> None:
        terminations.append(number)
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, stop_run)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        code = _report_error(str(error), 2, debug, error)
    except (CommandInterrupted, KeyboardInterrupt, typer.Abort):
        for number in (signal.SIGINT, signal.SIGTERM):  # there is nothing left to stop
            signal.signal(number, signal.SIG_IGN)
        code = _report_error("interrupted; nothing was written", _INTERRUPTED, False, None)
    except BrokenPipeError:  # the reader of the output has read enough
        code = 0
    except Exception as error:
        if is_disk_full(error):
            code = _report_error(_describe_full_disk(error), 2, debug, error)
        elif isinstance(error, OSError):
            code = _report_error(f"{error}", 1, debug, error)
        # A usage error. Its class is that of the click that typer bundles or imports, which varies.
        elif hasattr(error, "format_message"):
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
    finally:
        signal.signal(signal.SIGTERM, handler)
    flush_output_streams()
    if terminations and code == _INTERRUPTED:
        code = 128 + signal.SIGTERM
    sys.exit(code if isinstance(code, int) else 0)


def _describe_full_disk(error: Exception) -> str:
    """Return what a user can do about a file that could not be written."""
    path = getattr(error, "filename", None)
    return (
        f"no space left on the disk: {path or 'the results'} could not be written. Free some space, or "
        "choose another -o, and run the same command again: it goes on from what is cached"
    )


def _report_error(message: str, exit_code: int, debug: bool, error: BaseException | None) -> int:
    if debug and error is not None:
        raise error
    typer.echo(f"analyze: {' '.join(message.split())}", err=True)
    return exit_code
