"""What is seen: a defended model read as a refuse/comply classifier. `analysis.run` has it on one page.

From Python: `analyze`, `combine`, `locate` do what the commands do and return a `Run`; `read` returns the run
of a folder, `summarize` sums up scores that came from anywhere, `intervals` makes tables for readers. See
docs/python.md.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.cells import intervals as intervals
    from analysis.folder import Run as Run
    from analysis.interface import analyze, ensembles, locate_mechanism, read, summarize

__version__ = "0.1.0"
__all__ = ["Run", "analyze", "ensembles", "data_folder", "intervals", "locate_mechanism", "read", "summarize"]


def data_folder() -> Path:
    """Return the folder of shipped data: inside this package once installed, beside it in a checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "data"


def __getattr__(name: str) -> Any:
    """Return one of the names above; imported late, since the command must answer at once."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"Run": "folder", "intervals": "cells"}.get(name, "interface")
    return getattr(importlib.import_module(f"analysis.{home}"), name)


def __dir__() -> list[str]:
    """Return the names that an editor offers, those that are imported late among them."""
    return sorted({*globals(), *__all__})
