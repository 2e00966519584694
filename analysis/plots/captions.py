"""What stands around each figure: a title that says what to see, a caption that needs no other page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.plots.layout import CURVE_STYLES


@dataclass(frozen=True)
class CaptionContext:
    """What a caption says about a run and no frame of scores can know.

    >>> run = CaptionContext("smollm2", "twins", "test", threshold=-1.2, refusal_words=("I",), compliance_words=("Sure",))
    >>> run.format_sentences("direct")[:56]
    'Model: smollm2. Data: twins, test split. Attack: none (q'

    Args:
        model: the model as a reader would look it up, with dtype or revision where that matters.
        data: name of the query set.
        split: which part of it was scored.
        threshold: margin above which the readout says "refuse", nats.
        refusal_words: first words that speak for refusal.
        compliance_words: first words that speak for compliance; empty where the readout has none.
        readout: what is read of them.
        judge: who decided what counts as a refusal, or where the threshold is from, as it reads in
            parentheses.
        interval: what the intervals are and how they were made.
    """

    model: str
    data: str
    split: str
    threshold: float
    refusal_words: tuple[str, ...]
    compliance_words: tuple[str, ...] = ()
    readout: str = "first-token logits of"
    judge: str = "no judge: first-token readout"
    interval: str = "95\u00a0% paired bootstrap that resamples pairs, stratified by class, 2,000 draws"

    def format_sentences(self, attack: str) -> str:
        """Return the part of a caption that all figures of a run share."""
        asked = "none (queries sent as they are)" if attack == "direct" else attack
        against = f" against {_quote_words(self.compliance_words)}" if self.compliance_words else ""
        cut = f"{self.threshold:.2f}".replace("-", "\N{MINUS SIGN}")  # no line ends after this sign
        return (
            f"Model: {self.model}. Data: {self.data}, {self.split} split. Attack: {asked}. "
            f"Readout: {self.readout} {_quote_words(self.refusal_words)}{against}; threshold "
            f"{cut}\u00a0nats, the same for every defense ({self.judge}). Intervals: {self.interval}."
        )


def _quote_words(words: Sequence[str], max_words: int = 12) -> str:
    more = f" and {len(words) - max_words} more" if len(words) > max_words else ""
    return (
        ", ".join(
            f"\N{LEFT DOUBLE QUOTATION MARK}{word}\N{RIGHT DOUBLE QUOTATION MARK}"
            for word in words[:max_words]
        )
        + more
    )


def format_count_range(counts: pd.Series[int]) -> str:
    """Return one count, or the lowest and the highest where the defenses of a run differ."""
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return str(low) if low == high else f"{low}\N{EN DASH}{high}"


def format_shared_query_counts(counts: tuple[int, int] | None) -> str:
    return f"on {counts[0]} harmful and {counts[1]} benign queries" if counts else "on the same queries"


def omit_interval_note(context: CaptionContext, has_no_intervals: bool) -> CaptionContext:
    """The context of a figure that may show no intervals."""
    return replace(context, interval="not drawn") if has_no_intervals else context


def make_caption_context(record: Mapping[str, Any], readout_name: str = "") -> CaptionContext:
    """Return what captions say about a run.

    Args:
        record: its `run.json`.
        readout_name: name of the readout, where the run has several.
    """
    data = record["data"]
    (readout,) = [one for one in record.get("readouts", []) if one["name"] == readout_name] or [
        record["readout"]
    ]
    fitted = readout.get("threshold_fitted")
    return CaptionContext(
        model=_format_model(record),
        data=str(data["name"]),
        split=str(record.get("reported_on", data["split"])),
        threshold=float(readout["threshold"]),
        readout=_format_readout(readout),
        judge=f"fitted {fitted}" if fitted else "no judge: first-token readout",
        refusal_words=tuple(str(token).strip() for token in readout.get("refuse", [])),
        compliance_words=tuple(str(token).strip() for token in readout.get("comply", [])),
    )


def _format_readout(readout: Mapping[str, Any]) -> str:
    """How logits are read, as a caption puts it in front of the words."""
    name = str(readout["name"])
    if readout.get("questions"):
        return "first-token logits, asked whether the request should be refused, of"
    if name.startswith("prefilled-"):
        return f"behind {name.removeprefix('prefilled-')} tokens of a complying opener, logits of"
    odds = readout.get("log_odds")
    return "log-odds, against all other first tokens, of" if odds else "first-token logits of"


def _format_model(record: Mapping[str, Any]) -> str:
    """The model as a reader would look it up: a path says nothing to anyone else."""
    name, found = str(record["model"]["name"]), str(record["model"].get("id", record["model"]["name"]))
    known = [found] if "/" in name or name == found else [name, found]
    return f"{known[0]} ({', '.join([*known[1:], *filter(None, [record.get('dtype')])])})".removesuffix(" ()")


QueryCounts = tuple[int, int] | None
CONTRASTS_SENTENCE = (
    "Shift is the mean of the two class means of the margin's change against the undefended model (refuses "
    "more of everything), discrimination is harmful minus benign (tells harm from harmless better). "
)


def format_query_counts(points: pd.DataFrame, counts: QueryCounts) -> str:
    if {"n_harmful", "n_benign"} <= set(points):
        spans = [points[name].dropna().astype(int) for name in ("n_harmful", "n_benign")]
        ends = [sorted({int(span.min()), int(span.max())}) for span in spans if len(span)]
        if len(ends) == 2:
            harmful, benign = ("\N{EN DASH}".join(map(str, end)) for end in ends)
            return f"on {harmful} harmful and {benign} benign queries"
    return f"on {counts[0]} harmful and {counts[1]} benign queries" if counts else "on the run's queries"


def format_grey_note(points: pd.DataFrame) -> str:
    return f"Grey: all past the first {len(CURVE_STYLES)}. " * (
        points["defense"].nunique() > len(CURVE_STYLES)
    )


def keep_if_intervals(points: pd.DataFrame, sentence: str) -> str:
    """Return what is said of intervals, nothing where none is known."""
    lows = [name for name in points if str(name).endswith("_low")]
    return sentence * bool(points[lows].notna().any(axis=None))


def format_interval_note(points: pd.DataFrame, marks: str) -> str:
    return keep_if_intervals(points, f"{marks} are 95\u00a0% intervals. ")


def format_run_sentences(points: pd.DataFrame, context: CaptionContext) -> str:
    known = context if keep_if_intervals(points, "known") else replace(context, interval="none known")
    return known.format_sentences(points["attack"].iloc[0])


def format_signed_nats(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
