"""Measure a defended chat model as a refuse/comply classifier; `analysis/run.py` shows the main idea.

The Python API has a function for every command (`analyze`, `validate`, `ensembles`, `recommend`,
`locate_mechanism`, `depth`, `suffix`, `train`, `backdooralign`, `judge`, `label_run`, `compare_rankings`,
`save_figures`); most return a `Run`.
`read` loads the run of a folder, `summarize` estimates effects from scores of any origin, `intervals` formats
estimates with their intervals. See docs/python.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.api import (
        analyze,
        backdooralign,
        compare_rankings,
        depth,
        ensembles,
        judge,
        label_run,
        locate_mechanism,
        read,
        recommend,
        save_figures,
        suffix,
        summarize,
        train,
        validate,
    )
    from analysis.files import data_folder
    from analysis.report.results import Run
    from analysis.stats.format import intervals

__version__ = "0.1.0"

__all__ = [
    "Run",
    "analyze",
    "backdooralign",
    "compare_rankings",
    "data_folder",
    "depth",
    "ensembles",
    "intervals",
    "judge",
    "label_run",
    "locate_mechanism",
    "read",
    "recommend",
    "save_figures",
    "suffix",
    "summarize",
    "train",
    "validate",
]
# Names are imported on first use, because the command line must start quickly.
_MODULES = dict.fromkeys(__all__, "analysis.api") | {
    "Run": "analysis.report.results",
    "data_folder": "analysis.files",
    "intervals": "analysis.stats.format",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public names, including those not imported yet."""
    return sorted({*globals(), *__all__})
