"""The numbers behind the figures: a run's tables in, tables to draw out; never imports matplotlib."""

from typing import Any

import numpy as np
import pandas as pd

INTERVAL_SUFFIXES = ("", "_low", "_high")  # an estimate and its interval

LINEAR_RANGE = 0.5  # nats; further out the axes of a stretched plane are logarithmic
MAX_SHAPED_VOTES = 2000  # votes past which each is a speck, too small for a shape or a hollow
MAX_BARRED_STACKS = 40  # stacks up to which the intervals of a forecast are drawn
MAX_NUMBERED_DEFENSES = 12  # defenses up to which the numbers of a heat map are written into its cells


def build_margin_curves(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return densities of the margin, all smoothed with one bandwidth so that widths can be compared.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, True, False, False],
    ...                        "margin": [0.0, 1.0, -3.0, -2.0]})
    >>> curves = margin_curves(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=-1.0)
    >>> curves.groupby("harmful")["median"].first().to_dict()
    {False: -2.5, True: 0.5}

    Args:
        scores: `scores.csv`; rows whose margin is not finite are left out.
        summary: `summary.csv`, for families and refusal rates; a defense without a row has neither.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        One row per attack, defense, class and place on the margin axis (nats). `density` is per nat,
        `refused` the share of the class that is refused, `bandwidth` the SD of the Gaussian kernel (nats).
    """
    frame = scores[np.isfinite(scores["margin"].astype(float))]
    groups = list(frame.groupby(["attack", "defense", "harmful"], sort=False)["margin"])
    widths = [
        0.9 * margin.std() * len(margin) ** -0.2 for _, margin in groups if len(margin) > 1
    ]  # Silverman
    typical = float(np.median(widths)) if widths else 0.0
    bandwidth = typical if typical > 0 else 0.25  # all margins equal: any width will do, zero would not
    curves = [pd.DataFrame(columns=["attack", "defense", "family", "harmful", "margin", "density"])]
    for (attack, defense, harmful), margin in groups:
        values = margin.to_numpy(float)
        grid = np.linspace(values.min() - 3 * bandwidth, values.max() + 3 * bandwidth, 121)
        kernels = np.exp(-0.5 * ((grid[:, None] - values) / bandwidth) ** 2)
        about = _find_summary_row(summary, attack, defense)
        rate = "refusal_rate" if harmful else "over_refusal_rate"
        known = {
            "attack": attack,
            "defense": defense,
            "family": about["family"],
            "harmful": bool(harmful),
            "n": len(values),
            "median": float(np.median(values)),
            **{f"refused{end}": about.get(f"{rate}{end}", np.nan) for end in INTERVAL_SUFFIXES},
            "threshold": threshold,
            "bandwidth": bandwidth,
        }
        density = kernels.mean(axis=1) / (bandwidth * np.sqrt(2 * np.pi))
        curves.append(pd.DataFrame({**known, "margin": grid, "density": density}))
    return pd.concat(curves[1:], ignore_index=True) if groups else curves[0]


def build_plane_points(summary: pd.DataFrame) -> pd.DataFrame:
    """Return shift and discrimination (nats) of each defense with intervals; the undefended is the origin.

    >>> row = {"attack": "direct", "defense": "smoothllm", "family": "noise", "n_harmful": 9, "n_benign": 9}
    >>> row |= {f"{x}{end}": 1.0 for x in ("shift", "discrimination") for end in ENDS}
    >>> plane_points(pd.DataFrame([row, row | {"defense": "none"}]))["defense"].tolist()
    ['smoothllm']
    """
    numbers = [f"{x}{end}" for x in ("shift", "discrimination") for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_harmful", "n_benign", *numbers]
    columns += ["trusted"] if "trusted" in summary else []
    return summary.loc[summary["defense"] != "none", columns].reset_index(drop=True)


def build_roc_points(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the rates refused among harmful and among benign queries as the cut moves down over the margins.

    >>> scores = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False],
    ...                        "margin": [1.0, 0.0]})
    >>> points = roc_points(scores, pd.DataFrame(columns=["attack", "defense"]), threshold=0.5)
    >>> points[["cut", "benign_refused", "harmful_refused", "operating"]].values.tolist()
    [[1.0, 0.0, 0.0, False], [0.5, 0.0, 1.0, True], [0.0, 0.0, 1.0, False], [-inf, 1.0, 1.0, False]]

    Args:
        scores: `scores.csv`; rows whose margin is not finite are left out.
        summary: `summary.csv`, for families and AUROC.
        threshold: the cut of this run, nats; its row has `operating` true.

    Returns:
        One row per attack, defense and cut (nats; a margin above it is refused). A defense scored on one
        class only has no curve: its rates are NaN.
    """
    curves = [
        pd.DataFrame(columns=["attack", "defense", "family", "cut", "benign_refused", "harmful_refused"])
    ]
    frame = scores[np.isfinite(scores["margin"].astype(float))]
    for (attack, defense), group in frame.groupby(["attack", "defense"], sort=False):
        margin, harmful = group["margin"].to_numpy(float), group["harmful"].to_numpy(bool)
        # Straight lines between these points give ties half a win, as the AUROC does.
        cut = np.unique([*margin, threshold, -np.inf])[::-1]
        above = {c: np.sort(margin[harmful == c]) for c in (True, False)}
        rate = {
            c: 1 - np.searchsorted(v, cut, "right") / len(v) if len(v) else np.nan for c, v in above.items()
        }
        about = _find_summary_row(summary, attack, defense)
        known = {
            "attack": attack,
            "defense": defense,
            "family": about["family"],
            "n_harmful": len(above[True]),
            "n_benign": len(above[False]),
            **{f"{x}{end}": about.get(f"{x}{end}", np.nan) for x in ("auroc", "delta_auroc") for end in INTERVAL_SUFFIXES},
            "threshold": threshold,
        }
        drawn = {"cut": cut, "benign_refused": rate[False], "harmful_refused": rate[True]}
        curves.append(pd.DataFrame({**known, **drawn, "operating": cut == threshold}))
    return pd.concat(curves[1:], ignore_index=True) if len(curves) > 1 else curves[0]


def build_attack_cells(scores: pd.DataFrame, summary: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return what each defense does under each attack: the mean margin of harmful queries, and both rates.

    >>> scores = pd.DataFrame({"attack": "persona", "defense": "none", "harmful": [True, False],
    ...                        "margin": [1.0, 0.0]})
    >>> row = {"attack": "persona", "defense": "none", "family": "none", "n_harmful": 1, "n_benign": 1}
    >>> row |= {f"{x}{end}": 1.0 for x in ("refusal_rate", "over_refusal_rate") for end in ENDS}
    >>> float(attack_cells(scores, pd.DataFrame([row]), threshold=0.25)["margin"].iloc[0])
    0.75

    Args:
        scores: `scores.csv`.
        summary: `summary.csv`.
        threshold: margin above which the readout says "refuse", nats.

    Returns:
        One row per row of the summary; `margin` is above the threshold (nats; positive refuses).
    """
    rates = [f"{x}{end}" for x in ("refusal_rate", "over_refusal_rate") for end in INTERVAL_SUFFIXES]
    columns = ["attack", "defense", "family", "n_harmful", "n_benign", *rates]
    columns += ["trusted"] if "trusted" in summary else []
    mean = scores[scores["harmful"]].groupby(["attack", "defense"])["margin"].mean().sub(threshold)
    return summary[columns].merge(mean.reset_index(), "left", ["attack", "defense"])


def check_one_attack(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame as it is, once it is sure that it holds one attack.

    >>> one_attack(pd.DataFrame({"attack": ["direct", "prefix"]}))
    Traceback (most recent call last):
    ValueError: one figure shows one attack, got 'direct', 'prefix': keep the rows of one of them

    Raises:
        ValueError: if there are several attacks, or no rows.
    """
    attacks = [repr(str(attack)) for attack in frame["attack"].unique()]
    if len(attacks) != 1:
        got = ", ".join(attacks) or "no rows"
        raise ValueError(f"one figure shows one attack, got {got}: keep the rows of one of them")
    return frame


def _find_summary_row(summary: pd.DataFrame, attack: Any, defense: Any) -> dict[str, Any]:
    rows = summary[(summary["attack"] == attack) & (summary["defense"] == defense)].to_dict("records")
    return {
        "family": "none" if defense == "none" else "other",
        **{str(k): v for r in rows for k, v in r.items()},
    }


def is_stretched(points: pd.DataFrame) -> bool:
    """Return whether a few of many points lie so far out that the others would be one blot.

    >>> stretched(pd.DataFrame({"shift": [0.1] * 11 + [20.0], "discrimination": 0.0}))
    True

    Args:
        points: what `plane_points` returned.
    """
    far = points[["shift", "discrimination"]].abs().max(axis=1).dropna()
    return len(far) > 10 and bool(far.max() > 6 * far.quantile(0.75))
