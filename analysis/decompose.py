"""What a defense does to the refuse/comply classifier: shift, discrimination, and more, with intervals.

Shift and discrimination are the two contrasts of class × defense on the margin. On the probability scale a
pure shift changes the distance between the classes, so the paper's Mean Shift and Distance Change are given
for comparison only (https://arxiv.org/abs/2502.14486), and the verdict rests on what a change of scale leaves
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from analysis.tables import ESTIMATES, UNDEFENDED, ScoreTable, Summary

DRAWS = 2000
FLIPS = 9999
LEVEL = 0.95

Draws = Float[np.ndarray, " draws"]


@dataclass(frozen=True)
class Resampling:
    """How often each query counts in each bootstrap draw; the same for all defenses: differences are paired.

    Attributes:
        harmful: draws × harmful queries.
        benign: draws × benign queries.
        rng: for the pseudo-observations of the rates.
    """

    harmful: Float[np.ndarray, "draws n_harmful"]
    benign: Float[np.ndarray, "draws n_benign"]
    rng: np.random.Generator | None

    @classmethod
    def once(cls, harmful: int, benign: int) -> Resampling:
        """Return the data as they are: one draw in which each query counts once."""
        return cls(np.ones((1, harmful)), np.ones((1, benign)), None)

    @classmethod
    def draw(
        cls, units: Int[np.ndarray, " n"], is_harmful: Bool[np.ndarray, " n"], draws: int, seed: int
    ) -> Resampling:
        """Return draws that resample units (pairs, and queries without one) among units of like make-up.

        Args:
            units: number of the unit that each query belongs to, 0 …
            is_harmful: class of each query.
            draws: how many.
            seed: of the generator.
        """
        rng = np.random.default_rng(seed)
        size = units.max() + 1
        makeup = np.bincount(units, is_harmful, size) * (len(units) + 1) + np.bincount(
            units, ~is_harmful, size
        )
        counts = np.zeros((draws, size))
        for kind in np.unique(makeup):
            alike = np.flatnonzero(makeup == kind)
            counts[:, alike] = rng.multinomial(len(alike), np.full(len(alike), 1 / len(alike)), size=draws)
        return cls(counts[:, units[is_harmful]], counts[:, units[~is_harmful]], rng)

    def rate(self, said: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "draws n"]) -> Draws:
        """Return the refusal rate with the log-linear correction: k + ½ of n + 1.

        In a bootstrap draw the two half observations that the correction adds are drawn as well, as Gamma(½)
        variables. For one rate this is Jeffreys' interval; without it, a defense that refused nothing would
        get a rate and a d′ without any uncertainty.
        """
        extra = (
            np.full((2, len(weights)), 0.5)
            if self.rng is None
            else self.rng.gamma(0.5, size=(2, len(weights)))
        )
        return (weights @ said + extra[0]) / (weights.sum(1) + extra.sum(0))


def summarize(scores: ScoreTable, draws: int = DRAWS, seed: int = 0) -> Summary:
    """Return one row per attack × defense, each estimate with its 95 % paired-bootstrap interval.

    Args:
        scores: of a run; the undefended model among them.
        draws: of the bootstrap.
        seed: of bootstrap and permutation.
    """
    rows: list[dict[str, Any]] = []
    for attack in scores.frame["attack"].unique():
        base = scores.condition(attack, UNDEFENDED)
        is_harmful = base["harmful"].to_numpy(bool)
        # A query without a pair is a unit of its own.
        units = pd.factorize(base["pair"].where(base["pair"].notna(), "query " + base.index.astype(str)))[0]
        sample = Resampling.draw(units, is_harmful, draws, seed)
        once = Resampling.once(is_harmful.sum(), (~is_harmful).sum())
        before = base["margin"].to_numpy(float)
        for defense in [one for at, one in scores.conditions if at == attack]:
            rows_here = scores.condition(attack, defense)
            after = rows_here["margin"].to_numpy(float)
            row: dict[str, Any] = {"attack": attack, "defense": defense, "family": scores.family(defense)}
            row |= {"n_harmful": int(is_harmful.sum()), "n_benign": int((~is_harmful).sum())}
            point, cloud = (
                contrast(before, after, is_harmful, scores.threshold, weights, same=defense == UNDEFENDED)
                for weights in (once, sample)
            )
            row |= _with_intervals({name: float(value[0]) for name, value in point.items()}, cloud)
            row |= _p_values(after - before, is_harmful, units, seed) if defense != UNDEFENDED else {}
            row["coverage"] = float(rows_here["coverage"].mean())
            rows.append(row)
    frame = pd.DataFrame(rows)
    for name in ("p_shift", "p_discrimination"):
        frame[name] = frame.groupby("attack")[name].transform(holm) if name in frame else np.nan
    frame["verdict"] = [
        verdict({str(key): value for key, value in row.items()}) for row in frame.to_dict("records")
    ]
    return Summary(frame[_columns()])


def contrast(
    before: Float[np.ndarray, " n"],
    after: Float[np.ndarray, " n"],
    is_harmful: Bool[np.ndarray, " n"],
    threshold: float,
    sample: Resampling,
    same: bool = False,
) -> dict[str, Draws]:
    """Return every estimate of `ESTIMATES`, one value per draw.

    Args:
        before: margins of the undefended model, nats.
        after: margins of the defended model on the same queries.
        is_harmful: class of each query.
        threshold: margin above which the classifier says "refuse".
        sample: how often each query counts.
        same: whether both are the undefended model, whose difference to itself is 0 without any doubt.
    """
    old = _condition(before, is_harmful, threshold, sample)
    new = old if same else _condition(after, is_harmful, threshold, sample)
    change = {name: new[name] - old[name] for name in new}
    return {
        "refusal_rate": new["harmful_rate"],
        "over_refusal_rate": new["benign_rate"],
        "auroc": new["auroc"],
        "d_prime": new["d_prime"],
        "criterion": new["criterion"],
        "shift": (change["harmful_mean"] + change["benign_mean"]) / 2,
        "discrimination": change["harmful_mean"] - change["benign_mean"],
        "criterion_shift": -change["criterion"],
        "delta_d_prime": change["d_prime"],
        "delta_auroc": change["auroc"],
        "spread": np.divide(new["sd"], old["sd"], out=np.full_like(new["sd"], np.nan), where=old["sd"] > 0),
        "mean_shift": (change["harmful_p"] + change["benign_p"]) / 2,
        "distance_change": change["harmful_p"] - change["benign_p"],
        "scaled_shift": change["location"],
    }


def _condition(
    margins: Float[np.ndarray, " n"], is_harmful: Bool[np.ndarray, " n"], threshold: float, sample: Resampling
) -> dict[str, Draws]:
    """What one condition looks like by itself, one value per draw."""
    harmful, benign = margins[is_harmful] - threshold, margins[~is_harmful] - threshold
    n = len(harmful), len(benign)
    means = sample.harmful @ harmful / n[0], sample.benign @ benign / n[1]
    # Squares around the class means of the data, where the difference of two large numbers loses nothing.
    squares = [
        weights @ (values - values.mean()) ** 2 - len(values) * (mean - values.mean()) ** 2
        for weights, values, mean in zip(
            (sample.harmful, sample.benign), (harmful, benign), means, strict=True
        )
    ]
    sd = (
        np.sqrt(np.clip(sum(squares), 0, None) / (sum(n) - 2))
        if sum(n) > 2
        else np.full(len(means[0]), np.nan)
    )
    hits, alarms = sample.rate(harmful > 0, sample.harmful), sample.rate(benign > 0, sample.benign)
    z = ndtri(hits), ndtri(alarms)
    middle = (means[0] + means[1]) / 2
    plain = sample.rng is None  # the rates themselves are given uncorrected
    return {
        "harmful_mean": means[0],
        "benign_mean": means[1],
        "sd": sd,
        "location": np.divide(middle, sd, out=np.full_like(sd, np.nan), where=sd > 0),
        "harmful_rate": sample.harmful @ (harmful > 0) / n[0] if plain else hits,
        "benign_rate": sample.benign @ (benign > 0) / n[1] if plain else alarms,
        "d_prime": z[0] - z[1],
        "criterion": -(z[0] + z[1]) / 2,
        "auroc": _auroc(harmful, benign, sample),
        "harmful_p": sample.harmful @ expit(harmful) / n[0],
        "benign_p": sample.benign @ expit(benign) / n[1],
    }


def _auroc(
    harmful: Float[np.ndarray, " n_harmful"], benign: Float[np.ndarray, " n_benign"], sample: Resampling
) -> Draws:
    """Probability that a harmful query has a higher margin than a benign one, ties counted half."""
    wins = (harmful[:, None] > benign) + 0.5 * (harmful[:, None] == benign)
    values = ((sample.harmful @ wins) * sample.benign).sum(1) / wins.size
    if sample.rng is not None and wins.min() == wins.max() != 0.5:
        # Perfect separation: every draw would be the same. As for a rate of 0 or 1, Jeffreys' posterior says
        # how far from perfect it may be, with the smaller class for its sample size.
        short = sample.rng.beta(0.5, min(wins.shape) + 0.5, size=len(values))
        values = np.abs(values - short)
    return values


def _with_intervals(point: dict[str, float], cloud: dict[str, Draws]) -> dict[str, float]:
    row: dict[str, float] = {}
    tail = (1 - LEVEL) / 2
    for name in ESTIMATES:
        known = cloud[name][np.isfinite(cloud[name])]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        # A rate of 0 or 1 is one end of its own interval.
        if name.endswith("_rate") or name == "auroc":
            low, high = (0.0 if point[name] == 0 else low), (1.0 if point[name] == 1 else high)
        row |= {name: point[name], f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def _p_values(
    change: Float[np.ndarray, " n"],
    is_harmful: Bool[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    seed: int,
) -> dict[str, float]:
    """Two-sided sign-flip permutation p-values of shift and discrimination, units flipped as a whole."""
    share = np.where(is_harmful, 1 / is_harmful.sum(), 1 / (~is_harmful).sum())
    side = np.where(is_harmful, 1.0, -1.0)
    shift = (change * share).sum() / 2
    # Under "no discrimination" both classes move by the shift, so what is left of it should have no sign.
    parts = {"p_shift": change * share / 2, "p_discrimination": (change - shift) * share * side}
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, units.max() + 1))
    found = {}
    for name, values in parts.items():
        by_unit = np.bincount(units, values)
        # The tolerance keeps float noise from telling equal sums apart.
        as_far = np.abs(flips @ by_unit) >= abs(by_unit.sum()) - 1e-12
        found[name] = (1 + as_far.sum()) / (1 + FLIPS)
    return found


def holm(p: pd.Series) -> pd.Series:
    """Return p-values adjusted by Holm's method; missing ones stay missing.

    >>> holm(pd.Series([0.01, 0.04, 0.03])).round(6).tolist()
    [0.03, 0.06, 0.06]
    """
    known = p.dropna().astype(float)
    ranks = rankdata(known, method="ordinal")
    adjusted = pd.Series((known * (len(known) - ranks + 1)).to_numpy(), index=known.index)
    steps = adjusted.iloc[np.argsort(ranks)].cummax().clip(upper=1.0)
    return steps.reindex(p.index)


def verdict(row: dict[str, Any]) -> str:
    """Return in words what the intervals say, such as `shift + discrimination -`.

    Shift is named where the interval in nats and the one in units of spread both leave out 0, to the same
    side, and the adjusted p-value is below 5 %; discrimination likewise by nats and ΔAUROC. A mere change of
    scale moves one of each pair at most.
    """
    if row["defense"] == UNDEFENDED:
        return "reference"
    words = []
    for name, free, p in (
        ("shift", "scaled_shift", "p_shift"),
        ("discrimination", "delta_auroc", "p_discrimination"),
    ):
        for sign in ("+", "-"):
            if all(_beyond_zero(row, key, sign) for key in (name, free)) and row[p] < 1 - LEVEL:
                words.append(f"{name} {sign}")
    return " ".join(words) or "no effect found"


def _beyond_zero(row: dict[str, Any], name: str, sign: str) -> bool:
    return bool(row[f"{name}_low"] > 0 if sign == "+" else row[f"{name}_high"] < 0)


def _columns() -> list[str]:
    estimates = [f"{name}{end}" for name in ESTIMATES[:-1] for end in ("", "_low", "_high")]
    extra = [f"{ESTIMATES[-1]}{end}" for end in ("", "_low", "_high")]
    head = ["attack", "defense", "family", "n_harmful", "n_benign"]
    return [*head, *estimates, "p_shift", "p_discrimination", "verdict", *extra, "coverage"]
