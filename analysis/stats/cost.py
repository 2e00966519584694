"""Cost of defenses, and their side effect on benign queries, against the undefended model."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import BOOTSTRAP_DRAWS, bootstrap_interval, make_estimate_columns
from analysis.stats.tables import INTERVAL_SUFFIXES, UNDEFENDED

# Columns of divergences.csv: of the first token, and the mean over the first 12 tokens.
DIVERGENCE_COLUMNS = ("kl", "kl_12")


def summarize_costs(measurements: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return means, and ratios to the undefended model with 95 % bootstrap intervals, one row per condition.

    Ratios are geometric means over queries; each query is compared with itself, undefended.

    >>> row = {"query": "a", "prompt_tokens": 9, "draft_tokens": 0, "calls": 1}
    >>> row |= {"token_seconds": 1.0, "peak_bytes": 0}
    >>> seconds = pd.DataFrame({"defense": ["none", "x"], "prefill_seconds": [1.0, 3.0]})
    >>> summarize_costs(seconds.assign(**row))["prefill_ratio"].round(9).tolist()
    [1.0, 3.0]

    Args:
        measurements: table of `time_conditions`: seconds for a single prompt and for one further token.
        seed: seed of the bootstrap.
    """
    undefended = measurements[measurements["defense"] == UNDEFENDED].set_index("query")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(undefended), size=(BOOTSTRAP_DRAWS, len(undefended)))
    rows = []
    for defense, group in measurements.groupby("defense", sort=False):
        defended = group.set_index("query").loc[undefended.index]
        row: dict[str, object] = {
            "defense": defense,
            "n": len(defended),
            "prompt_tokens": defended["prompt_tokens"].mean(),
            "tokens_added": (defended["prompt_tokens"] - undefended["prompt_tokens"]).mean(),
            "draft_tokens": defended["draft_tokens"].mean(),
            "calls": defended["calls"].mean(),
        }
        for kind in ("prefill", "token"):
            ratios = defended[f"{kind}_seconds"] / undefended[f"{kind}_seconds"]
            log_ratios = np.log(ratios.to_numpy(float))
            low, high = bootstrap_interval(log_ratios[draws].mean(1), len(log_ratios))
            row |= {
                f"{kind}_ratio": float(np.exp(log_ratios.mean())),
                f"{kind}_ratio_low": float(np.exp(low)),
                f"{kind}_ratio_high": float(np.exp(high)),
                f"{kind}_ms": 1000 * defended[f"{kind}_seconds"].median(),
            }
        peak_bytes = defended["peak_bytes"].max()
        rows.append(row | {"peak_mib": peak_bytes / 2**20 if peak_bytes else np.nan})
    return pd.DataFrame(rows)


def add_divergence_estimates(summary: pd.DataFrame, divergences: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return the summary with the mean divergences on benign queries, `kl_benign` and `kl_12_benign`, nats.

    >>> condition = {"attack": "direct", "defense": "x"}
    >>> rows = pd.DataFrame({**condition, "kl": [1.0, 3.0] * 20, "kl_12": 0.5})
    >>> added = add_divergence_estimates(pd.DataFrame([condition]), rows)
    >>> added.filter(like="kl_").iloc[0].round(1).tolist()
    [2.0, 1.7, 2.3, 0.5, 0.5, 0.5]

    Args:
        summary: a row per attack and defense.
        divergences: `kl` and `kl_12` of each benign query, attack and defense; missing where there is no
            first token to compare.
        seed: seed of the bootstrap over queries.
    """
    rows = []
    for (attack, defense), group in divergences.groupby(["attack", "defense"], sort=False):
        row: dict[str, object] = {"attack": attack, "defense": defense}
        for column in DIVERGENCE_COLUMNS:
            values = group[column].dropna().to_numpy(float)
            if len(values):
                draws = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAP_DRAWS, len(values)))
                mean = np.array([values.mean()])
                row |= make_estimate_columns(f"{column}_benign", mean, values[draws].mean(1), len(values))
        rows.append(row)
    columns = [f"{column}_benign{suffix}" for column in DIVERGENCE_COLUMNS for suffix in INTERVAL_SUFFIXES]
    estimates = pd.DataFrame(rows, columns=["attack", "defense", *columns])
    return summary.merge(estimates, on=["attack", "defense"], how="left")
