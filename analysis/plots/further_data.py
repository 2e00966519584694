"""Tables of the figures that are drawn on demand, built from the stored tables of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from analysis.plots.data import build_forest_points, sanitize_name
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED

RATE_PAIR_COLUMNS = tuple(
    f"{name}{end}" for name in ("refusal_rate", "over_refusal_rate") for end in INTERVAL_SUFFIXES
)


def list_further_figures(tables: Mapping[str, pd.DataFrame]) -> tuple[str, ...]:
    """Return the names of the figures that can be built from the tables of a run, one per attack.

    >>> summary = pd.DataFrame({"attack": ["direct"] * 2, "defense": ["none", "policy"]})
    >>> list_further_figures({"summary": summary})
    ('forest', 'dumbbell')

    Args:
        tables: tables of the run by stem.
    """
    summary = tables.get("summary")
    if summary is None or not (summary["defense"] != UNDEFENDED).any():
        return ()
    kinds = [kind for kind, (sources, _) in _BUILDERS.items() if all(len(tables.get(s, ())) for s in sources)]
    if "scores" in tables and not _has_pairs(tables["scores"]):
        kinds = [kind for kind in kinds if kind != "pairs"]
    suffixes = _suffixes_by_attack(summary)
    return tuple(f"{kind}{suffix}" for kind in kinds for suffix in suffixes)


def build_further_points(
    tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any], name: str
) -> pd.DataFrame:
    """Return the table of one of `list_further_figures`.

    Args:
        tables: tables of the run by stem.
        record: contents of the run's `run.json`.
        name: name of the figure.
    """
    for kind, (_, build) in _BUILDERS.items():
        for suffix, attack in _suffixes_by_attack(tables["summary"]).items():
            if name == f"{kind}{suffix}":
                of_attack = {
                    stem: table[table["attack"] == attack] if "attack" in table else table
                    for stem, table in tables.items()
                    if stem in ("summary", "scores", "responses")
                }
                return build(of_attack, record)
    raise KeyError(name)


def build_rate_pairs(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the refusal rates of both classes under each condition, with what they rest on.

    Args:
        tables: with `summary`.
        record: not used.
    """
    del record
    summary = tables["summary"]
    names = ["attack", "defense", "family", "n_harmful", "n_benign", *RATE_PAIR_COLUMNS]
    names += [name for name in ("based_on", "n_responses") if name in summary]
    return summary[names].dropna(subset=["refusal_rate", "over_refusal_rate"]).reset_index(drop=True)


def build_category_cells(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the refusal rate of each class of each category of queries under each condition.

    Args:
        tables: with `scores`, `summary` and, if responses were judged, `responses`.
        record: with the threshold of the readout, for runs without judged responses.
    """
    from analysis.stats.response_rates import summarize_categories

    return _add_families(summarize_categories(_label_queries(tables, record)), tables["summary"])


def build_pair_points(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> pd.DataFrame:
    """Return how often a harmful query and its benign twin are refused, under each condition.

    Args:
        tables: as for `build_category_cells`.
        record: as for `build_category_cells`.
    """
    from analysis.stats.response_rates import compare_twins

    return _add_families(compare_twins(_label_queries(tables, record)), tables["summary"])


def build_threshold_points(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> pd.DataFrame:
    """Return what each defense changes in the refusals of the readout, by its threshold.

    Args:
        tables: with `scores` and `summary`.
        record: with the threshold of the readout.
    """
    from analysis.stats.response_rates import sweep_thresholds

    threshold = float(record["readout"]["threshold"])
    points = _add_families(sweep_thresholds(tables["scores"]), tables["summary"])
    return points.assign(run_threshold=threshold)


def _build_forest(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> pd.DataFrame:
    del record
    return build_forest_points(tables["summary"])


# Kind of figure → tables of the run that it needs, and what builds its table from those of one attack.
_BUILDERS: dict[
    str,
    tuple[tuple[str, ...], Callable[[Mapping[str, pd.DataFrame], Mapping[str, Any]], pd.DataFrame]],
] = {
    "forest": (("summary",), _build_forest),
    "dumbbell": (("summary",), build_rate_pairs),
    "categories": (("summary", "scores"), build_category_cells),
    "pairs": (("summary", "scores"), build_pair_points),
    "thresholds": (("summary", "scores"), build_threshold_points),
}


def _suffixes_by_attack(summary: pd.DataFrame) -> dict[str, str]:
    """Return the attacks of a run by the ends of the names of their figures."""
    attacks = [str(attack) for attack in summary["attack"].unique()]
    return {f"-{sanitize_name(attack)}" if len(attacks) > 1 else "": attack for attack in attacks}


def _has_pairs(scores: pd.DataFrame) -> bool:
    """Return whether a harmful and a benign query of the run make a pair."""
    if "pair" not in scores:
        return False
    return bool((scores.dropna(subset="pair").groupby("pair")["harmful"].nunique() > 1).any())


def _label_queries(tables: Mapping[str, pd.DataFrame], record: Mapping[str, Any]) -> pd.DataFrame:
    """Return which queries were refused, by judged responses or, in runs without, by the readout."""
    from analysis.stats.response_rates import label_refusals

    return label_refusals(tables["scores"], tables.get("responses"), float(record["readout"]["threshold"]))


def _add_families(table: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    families = summary.drop_duplicates("defense").set_index("defense")["family"]
    return table.assign(family=table["defense"].map(families).fillna("other"))
