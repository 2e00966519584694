"""Plain tables that check themselves when they are made: what was scored, and what it amounts to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

SCORE_COLUMNS = (
    "query",
    "pair",
    "category",
    "harmful",
    "attack",
    "defense",
    "margin",
    "p_refuse",
    "prompt_tokens",
    "coverage",
)
ESTIMATE_NAMES = (
    "refusal_rate",
    "over_refusal_rate",
    "auroc",
    "d_prime",
    "criterion",
    "shift",
    "discrimination",
    "criterion_shift",
    "delta_d_prime",
    "delta_auroc",
    "spread",
    "mean_shift",
    "distance_change",
    "scaled_shift",
)
UNDEFENDED, DIRECT = "none", "direct"
MARGIN_TOLERANCE = 1e-3  # nats, by which the parts of a margin may miss it
UNVALIDATED = "not validated"


def format_condition(row: Any) -> str:
    """Return a condition's name, the attack behind it where there is one.

    >>> format_condition({"attack": "direct", "defense": "policy"}), format_condition({"attack": "x", "defense": "none"})
    ('policy', 'none (x)')
    """
    name = str(row["defense"])
    return name if row["attack"] == DIRECT else f"{name} ({row['attack']})"


@dataclass(frozen=True)
class ScoreTable:
    """One row per query × attack × defense.

    Attributes:
        frame: the columns `SCORES`, and `readings` where a defense read several copies of a query. `margin`
            is in nats, positive refuses; `coverage` is the probability on the readout's words.
        record: the manifest of the run: model, readout (with its threshold), defenses (with their
            families), data.
    """

    frame: pd.DataFrame
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a table that later steps would misread."""
        frame = self.frame
        missing = set(SCORE_COLUMNS) - set(frame.columns)
        if missing:
            raise ValueError(f"a score table lacks {sorted(missing)}")
        if frame.duplicated(["query", "attack", "defense"]).any():
            raise ValueError("a query is scored twice under one attack and defense")
        if frame["harmful"].dtype != bool or frame["margin"].isna().any():
            raise ValueError("`harmful` must be true or false and every margin a number")
        if (frame.groupby("query")[["harmful", "pair"]].nunique() > 1).any(axis=None):
            raise ValueError("a query has two classes or two pairs")
        for attack, rows in frame.groupby("attack"):
            if UNDEFENDED not in set(rows["defense"]):
                raise ValueError(
                    f"attack {attack!r} was not scored undefended, so there is nothing to compare with"
                )
            if rows.groupby("query")["defense"].nunique().nunique() != 1:
                raise ValueError(f"under attack {attack!r} the defenses were not scored on the same queries")

    @property
    def threshold(self) -> float:
        """The margin above which the classifier says "refuse"."""
        return float(self.record["readout"]["threshold"])

    def get_family(self, defense: str) -> str:
        """Return the family of a defense of this run."""
        return str(self.record["defenses"][defense]["family"])

    def get_trust(self, attack: str, defense: str) -> str:
        """Return whether this run's readout is known to agree with text in a condition."""
        return str(self.record.get("trusted", {}).get(attack, {}).get(defense, UNVALIDATED))

    @property
    def condition_keys(self) -> list[tuple[str, str]]:
        """Attack and defense of each condition, in the order of scoring."""
        pairs = self.frame[["attack", "defense"]].drop_duplicates()
        return list(pairs.itertuples(index=False, name=None))

    def select_condition(self, attack: str, defense: str) -> pd.DataFrame:
        """Return the rows of one condition, by query, in the order of the undefended ones."""
        rows = self.frame[self.frame["attack"] == attack]
        order = rows.loc[rows["defense"] == UNDEFENDED, "query"]
        return rows[rows["defense"] == defense].set_index("query").loc[order]


@dataclass(frozen=True)
class Summary:
    """One row per attack × defense: estimates `x` with `x_low`, `x_high`, two p-values and a verdict."""

    frame: pd.DataFrame

    def __post_init__(self) -> None:
        """Refuse a summary that lacks a promised column."""
        wanted = {
            "attack",
            "defense",
            "family",
            "n_harmful",
            "n_benign",
            "p_shift",
            "p_discrimination",
            "verdict",
            "trusted",
        }
        wanted |= {f"{name}{end}" for name in ESTIMATE_NAMES for end in ("", "_low", "_high")}
        missing = wanted - set(self.frame.columns)
        if missing:
            raise ValueError(f"a summary lacks {sorted(missing)}")


@dataclass(frozen=True, order=True)
class ModelPart:
    """A part of a model that writes into the residual stream.

    >>> str(ModelPart("head", 3, 1)), str(ModelPart("mlp", 3)), str(ModelPart("embedding"))
    ('L3H1', 'L3 mlp', 'embedding')

    Attributes:
        kind: embedding, head, attention, mlp, residual, bias, or added (between blocks, by a defense).
        layer: 0 for the first; what is added stands in front of that layer; none has none.
        head: of a head.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        if self.kind == "head":
            return f"L{self.layer}H{self.head}"
        return self.kind if self.layer is None else f"L{self.layer} {self.kind}"


@dataclass(frozen=True)
class Decomposition:
    """Margins as sums over the parts of a model; it does not exist if they do not add up.

    Attributes:
        parts: of the model.
        contributions: what each adds to the margin of each query, nats.
        margins: the margins.
    """

    parts: tuple[ModelPart, ...]
    contributions: Float[np.ndarray, "queries parts"]
    margins: Float[np.ndarray, " queries"]

    def __post_init__(self) -> None:
        """Refuse parts that are no decomposition."""
        off = np.abs(self.contributions.sum(1) - self.margins).max(initial=0.0)
        if not off <= MARGIN_TOLERANCE:
            raise ValueError(
                f"the parts miss the margin by {off:.2g} nats, where {MARGIN_TOLERANCE} is allowed"
            )


INTERVAL_SUFFIXES = ("", "_low", "_high")  # an estimate and its interval


def iterate_rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table by the names of its columns."""
    for row in frame.to_dict("records"):
        yield {str(name): value for name, value in row.items()}
