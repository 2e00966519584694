"""What a defense costs: tokens, calls and time against the undefended model on the same queries."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import BOOTSTRAP_DRAWS, bootstrap_interval
from analysis.stats.tables import UNDEFENDED


def summarize_costs(measurements: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return a row per condition: means, and ratios to the undefended model with 95 % bootstrap intervals.

    Ratios are geometric means over queries, each against the same query undefended.

    >>> row = {"query": "a", "prompt_tokens": 9, "draft_tokens": 0, "calls": 1}
    >>> row |= {"token_seconds": 1.0, "peak_bytes": 0}
    >>> seconds = pd.DataFrame({"defense": ["none", "x"], "prefill_seconds": [1.0, 3.0]})
    >>> summarize_costs(seconds.assign(**row))["prefill_ratio"].round(9).tolist()
    [1.0, 3.0]

    Args:
        measurements: what `timing.timed` returned: seconds of one prompt alone, and of one further token.
        seed: of the bootstrap.
    """
    base = measurements[measurements["defense"] == UNDEFENDED].set_index("query")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(base), size=(BOOTSTRAP_DRAWS, len(base)))
    rows = []
    for name, group in measurements.groupby("defense", sort=False):
        here = group.set_index("query").loc[base.index]
        row: dict[str, object] = {
            "defense": name,
            "n": len(here),
            "prompt_tokens": here["prompt_tokens"].mean(),
            "tokens_added": (here["prompt_tokens"] - base["prompt_tokens"]).mean(),
            "draft_tokens": here["draft_tokens"].mean(),
            "calls": here["calls"].mean(),
        }
        for kind in ("prefill", "token"):
            ratio = here[f"{kind}_seconds"] / base[f"{kind}_seconds"]
            logs = np.log(ratio.to_numpy(float))
            low, high = bootstrap_interval(logs[draws].mean(1), len(logs))
            row |= {f"{kind}_ratio": float(np.exp(logs.mean()))}
            row |= {f"{kind}_ratio_low": float(np.exp(low)), f"{kind}_ratio_high": float(np.exp(high))}
            row |= {f"{kind}_ms": 1000 * here[f"{kind}_seconds"].median()}
        peak = here["peak_bytes"].max()
        rows.append(row | {"peak_mib": peak / 2**20 if peak else np.nan})
    return pd.DataFrame(rows)
