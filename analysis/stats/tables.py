"""Tables of scores, summaries and decompositions, which validate themselves, and how a table is stored."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
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
    "scaled_discrimination",
)
# Columns that hold names, ids or texts of the user, which may look like numbers (001, 1e5) or like missing
# values (NA, None).
TEXT_COLUMNS = (
    *("query", "pair", "category", "kind", "attack", "defense", "condition", "control", "members"),
    *("first", "second", "other", "most_influential", "better_member", "model", "data", "arm", "judge"),
    *("read", "request", "response", "label", "evidence", "verdict", "verdict_note", "control_note"),
)
UNDEFENDED, DIRECT = "none", "direct"
INTERVAL_SUFFIXES = ("", "_low", "_high")  # column suffixes of an estimate and of its interval
MARGIN_TOLERANCE = 1e-3  # nats; largest allowed difference between a margin and the sum of its parts
READOUT_PART = "readout"  # the kind of part that is no component
READOUT_PART_MEANING = (
    "the part of the change that is due to the curvature of the readout, which no component explains; large "
    "values mean that the attribution over components says little"
)


def read_table(content: bytes) -> pd.DataFrame:
    r"""Read a CSV table that `format_table` has written; ids and names stay text.

    >>> read_table(b"query,margin\n001,1\nNA,\n").to_dict("list")
    {'query': ['001', 'NA'], 'margin': [1.0, nan]}

    Args:
        content: of the file. Only an empty cell is a missing value.

    Raises:
        ValueError: if the file is not a CSV table.
    """
    try:
        return pd.read_csv(
            io.BytesIO(content), dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False, na_values=[""]
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def format_table(table: pd.DataFrame, float_format: str | None = None) -> str:
    r"""Return a table as CSV.

    >>> format_table(pd.DataFrame({"query": ["a\rb"], "margin": [0.5]}))
    '"query","margin"\n"a\rb","0.5"\n'

    Args:
        table: the index is left out.
        float_format: such as `%.7g`; None writes every digit.
    """
    text = table.to_csv(index=False, float_format=float_format)
    if "\r" in text:  # otherwise written without quotes, and read back as the end of a row
        text = table.to_csv(index=False, float_format=float_format, quoting=csv.QUOTE_ALL)
    return text


class Trust(StrEnum):
    """Whether a readout agrees with the judge in a condition; tables and files hold the value as text."""

    TRUSTED = "trusted"
    NOT_TRUSTED = "not trusted"
    CANNOT_TELL = "cannot tell"
    NOT_VALIDATED = "not validated"


class ResponseVerdict(StrEnum):
    """What a judge says of a response that is cut off, which cannot tell full from partial refusals."""

    REFUSED = "refused"
    NOT_REFUSED = "not refused"
    UNJUDGED = "unjudged"


class Basis(StrEnum):
    """What the refusal rates and the verdict of a summary row rest on."""

    RESPONSES = "responses"
    MARGINS = "margins"


def has_judged_rates(summary: pd.DataFrame) -> bool:
    """Return whether the refusal rates of a summary come from judged responses; older runs do not say so.

    Args:
        summary: `summary.csv`, or rows of it; all rows of a run rest on the same.
    """
    return "based_on" in summary and bool((summary["based_on"] == Basis.RESPONSES).any())


def find_defense_rows(names: pd.Series, families: pd.Series) -> pd.Series:
    """Return which conditions are defenses: no reference, no control, no ablation of a defense.

    >>> names = pd.Series(["none", "policy", "policy/half", "random_tokens"])
    >>> find_defense_rows(names, pd.Series(["none", "reminders", "reminders", "control"])).tolist()
    [False, True, False, False]

    Args:
        names: names of the conditions.
        families: their families.
    """
    whole_names = set(names)
    is_ablation = names.map(
        lambda name: "/" in name and (name.partition("/")[0] in whole_names or name.endswith("/neither"))
    )
    return (names != UNDEFENDED) & (families != "control") & ~is_ablation.astype(bool)


def format_condition(row: Any) -> str:
    """Return the name of a condition: the defense, followed by the attack in parentheses if there is one.

    >>> format_condition({"attack": "direct", "defense": "policy"})
    'policy'
    >>> format_condition({"attack": "base64", "defense": "none"})
    'none (base64)'
    """
    name = str(row["defense"])
    return name if row["attack"] == DIRECT else f"{name} ({row['attack']})"


@dataclass(frozen=True)
class ScoreTable:
    """One row per query × attack × defense.

    Attributes:
        frame: the columns `SCORE_COLUMNS`, `margin_low` and `margin_high` where a margin is known up to these
            bounds only (then `margin` is halfway between them), `readings` if a defense reads several copies
            of a query, and `detector` (log-odds, nats) if it has a detector.
            `margin` is in nats, positive means refusing; `coverage` is the probability mass on the readout's
            words.
        record: manifest of the run: model, readout (with its threshold), defenses (with their families),
            data.
    """

    frame: pd.DataFrame
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError if later steps would misread the table."""
        frame = self.frame
        missing = set(SCORE_COLUMNS) - set(frame.columns)
        if missing:
            raise ValueError(f"a score table lacks the columns {sorted(missing)}")
        if frame.duplicated(["query", "attack", "defense"]).any():
            raise ValueError("a query was scored twice under the same attack and defense")
        if frame["harmful"].dtype != bool or frame["margin"].isna().any():
            raise ValueError("`harmful` must be boolean, and every margin must be a number")
        if (frame.groupby("query")[["harmful", "pair"]].nunique() > 1).any(axis=None):
            raise ValueError("a query has two values of its class or of its pair")
        for attack, rows in frame.groupby("attack"):
            if UNDEFENDED not in set(rows["defense"]):
                raise ValueError(
                    f"attack {attack!r} was not scored on the undefended model, the reference of all effects"
                )
            if rows.groupby("query")["defense"].nunique().nunique() != 1:
                raise ValueError(f"the defenses under attack {attack!r} were not scored on the same queries")

    @property
    def threshold(self) -> float:
        """Margin above which the classifier predicts a refusal."""
        return float(self.record["readout"]["threshold"])

    @property
    def is_undecided(self) -> pd.Series:
        """Whether the bounds of each row's margin lie on both sides of the threshold."""
        if "margin_low" not in self.frame:
            return pd.Series(False, index=self.frame.index)
        return (self.frame["margin_low"] <= self.threshold) & (self.frame["margin_high"] > self.threshold)

    def drop_undecided(self) -> ScoreTable:
        """Return the table without the queries that are undecided in a condition of the same attack."""
        open_rows = self.frame.loc[self.is_undecided, ["attack", "query"]].drop_duplicates()
        is_open = pd.MultiIndex.from_frame(self.frame[["attack", "query"]]).isin(
            pd.MultiIndex.from_frame(open_rows)
        )
        return ScoreTable(self.frame[~is_open].reset_index(drop=True), self.record)

    def draw_thresholds(self, n_draws: int, seed: int = 0) -> Float[np.ndarray, " draws"]:
        """Return random draws of the threshold, as uncertain as its fit to the calibration queries; nats.

        Args:
            n_draws: number of draws.
            seed: random seed.
        """
        quantiles = self.record["readout"].get("threshold_quantiles") or [self.threshold]
        return np.random.default_rng(seed).choice(np.asarray(quantiles, float), n_draws)

    def get_family(self, defense: str) -> str:
        """Return the family of a defense of this run."""
        return str(self.record["defenses"][defense]["family"])

    def get_trust(self, attack: str, defense: str) -> Trust:
        """Return whether this run's readout agrees with the judge in a condition, as validated earlier."""
        return Trust(self.record.get("trusted", {}).get(attack, {}).get(defense, Trust.NOT_VALIDATED))

    @property
    def condition_keys(self) -> list[tuple[str, str]]:
        """Attack and defense of each condition, in the order of scoring."""
        pairs = self.frame[["attack", "defense"]].drop_duplicates()
        return list(pairs.itertuples(index=False, name=None))

    def select_condition(self, attack: str, defense: str) -> pd.DataFrame:
        """Return the rows of a condition, indexed by query, in the order of the undefended condition."""
        rows = self.frame[self.frame["attack"] == attack]
        order = rows.loc[rows["defense"] == UNDEFENDED, "query"]
        return rows[rows["defense"] == defense].set_index("query").loc[order]


@dataclass(frozen=True)
class Summary:
    """One row per attack × defense: estimates `x` with `x_low` and `x_high`, p-values and verdicts."""

    frame: pd.DataFrame

    def __post_init__(self) -> None:
        """Raise ValueError if a documented column is missing."""
        required_columns = {
            "attack",
            "defense",
            "family",
            "n_harmful",
            "n_benign",
            "p_shift",
            "p_discrimination",
            "verdict",
            "based_on",
            "margin_verdict",
            "verdict_note",
            "trusted",
        }
        required_columns |= {f"{name}{suffix}" for name in ESTIMATE_NAMES for suffix in INTERVAL_SUFFIXES}
        missing = required_columns - set(self.frame.columns)
        if missing:
            raise ValueError(f"a summary lacks the columns {sorted(missing)}")


@dataclass(frozen=True, order=True)
class ModelPart:
    """A component of a model that writes into the residual stream.

    >>> str(ModelPart("head", 3, 1)), str(ModelPart("mlp", 3)), str(ModelPart("embedding"))
    ('L3H1', 'L3 mlp', 'embedding')

    Attributes:
        kind: embedding, head, attention, mlp, residual, bias, added (by a defense, between blocks), or
            readout, the remainder of a margin that is not linear in the logits, which no component explains.
        layer: index of the layer, from 0; for `added`, the layer before which it is added; None for parts
            without a layer.
        head: index of the head, from 0; None for other parts.
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
    """Margins as sums over the parts of a model; the parts must add up to the margins.

    Attributes:
        parts: parts of the model.
        contributions: contribution of each part to the margin of each query, nats.
        margins: margin of each query, nats.
    """

    parts: tuple[ModelPart, ...]
    contributions: Float[np.ndarray, "queries parts"]
    margins: Float[np.ndarray, " queries"]

    def __post_init__(self) -> None:
        """Raise ValueError if the parts do not add up to the margins."""
        error = np.abs(self.contributions.sum(1) - self.margins).max(initial=0.0)
        if not error <= MARGIN_TOLERANCE:
            raise ValueError(
                f"the parts differ from the margin by {error:.2g} nats; at most {MARGIN_TOLERANCE} is allowed"
            )


def iterate_rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries keyed by column name."""
    for row in frame.to_dict("records"):
        yield {str(name): value for name, value in row.items()}
