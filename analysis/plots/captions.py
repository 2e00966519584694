"""Sentences that the captions of all figures share: model, data, attack, readout and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.families import PAPER_FAMILIES
from analysis.plots.layout import CURVE_STYLES

QueryCounts = tuple[int, int] | None

CONTRASTS_SENTENCE = (
    "Shift is the mean of the two class means of the margin's change against the undefended model (refuses "
    "more of everything); discrimination is harmful minus benign (separates harmful from benign better). "
)


@dataclass(frozen=True)
class CaptionContext:
    """Facts about a run that captions state and that the drawn table does not contain.

    >>> context = CaptionContext("smollm2", "twins", "test", threshold=-1.2, refusal_words=("I",))
    >>> context.format_sentences("direct").strip()[:56]
    'Model: smollm2. Data: twins, test split. Attack: none (q'

    Args:
        model: the model under a name that a reader can look up, with dtype or revision where that matters.
        data: name of the query set.
        split: part of the query set that was scored.
        threshold: margin above which the readout says "refuse", nats.
        refusal_words: first words that indicate refusal.
        compliance_words: first words that indicate compliance; empty if the readout has none.
        readout: how the readout uses the logits of these words.
        contrast: what stands between the two kinds of words.
        judge: origin of the threshold, as written in parentheses.
        interval: kind of the intervals and how they were computed.
        query_counts: numbers of harmful and benign queries drawn; None if they are unknown.
        attacks: attacks of the run, the one that users send first.
        judge_name: judge of the generated responses; empty if no response was judged.
        max_new_tokens: length limit of the generated responses, tokens.
        n_opening_tokens: length of their openings, which were judged as well, tokens; 0 without openings.
        response_basis: what `analyze` judged of the responses, and by which judge; empty if it judged none.
    """

    model: str
    data: str
    split: str
    threshold: float
    refusal_words: tuple[str, ...]
    compliance_words: tuple[str, ...] = ()
    readout: str = "first-token logits of"
    contrast: str = " against"
    judge: str = "no judge: first-token readout"
    interval: str = "95\u00a0% paired bootstrap that resamples pairs, stratified by class, 2,000 draws"
    query_counts: QueryCounts = None
    attacks: tuple[str, ...] = ("direct",)
    judge_name: str = ""
    max_new_tokens: int = 0
    n_opening_tokens: int = 0
    response_basis: str = ""

    def format_sentences(self, attack: str) -> str:
        """Return the sentences that the captions of all figures of a run share.

        Args:
            attack: attack of the figure.
        """
        against = f"{self.contrast} {_quote_words(self.compliance_words)}" if self.compliance_words else ""
        threshold = f"{self.threshold:.2f}".replace("-", "\N{MINUS SIGN}")  # no line breaks after this sign
        return (
            f"{self.format_setting(attack)} "
            f"Readout: {self.readout} {_quote_words(self.refusal_words)}{against}; threshold "
            f"{threshold}\u00a0nats, the same for every defense ({self.judge}). Intervals: {self.interval}."
        )

    def format_response_sentences(self, attack: str) -> str:
        """Return the shared sentences for a figure of judged responses, on which the readout has no bearing.

        Args:
            attack: attack of the figure.
        """
        return f"{self.format_setting(attack)} Intervals: 95\u00a0% Wilson, of each rate."

    def format_setting(self, attack: str) -> str:
        """Return the sentences on model, data and attack, as a paragraph, which figures print small."""
        attack_text = "none (queries sent unchanged)" if attack == "direct" else attack
        return f"\nModel: {self.model}. Data: {self.data}, {self.split} split. Attack: {attack_text}."


def make_caption_context(
    record: Mapping[str, Any], readout_name: str = "", query_counts: QueryCounts = None
) -> CaptionContext:
    """Return the facts that captions state about a run.

    Args:
        record: contents of the run's `run.json`.
        readout_name: name of the readout, if the run has several.
        query_counts: numbers of harmful and benign queries drawn; None if they are unknown.
    """
    data, judge = record["data"], record.get("judge") or {}
    named = [readout for readout in record.get("readouts", []) if readout["name"] == readout_name]
    readout = named[0] if named else record["readout"]
    fitted = readout.get("threshold_fitted")
    return CaptionContext(
        model=_format_model(record),
        data=str(data["name"]),
        split=str(record.get("reported_on", data["split"])),
        threshold=float(readout.get("threshold", math.nan)),  # several models have one each
        readout=_format_readout(readout),
        contrast=" against" if readout.get("base_value") is None else ", lowest after",
        judge=f"fitted {fitted}" if fitted else "no judge: first-token readout",
        refusal_words=_unique_words(readout.get("refuse", [])),
        compliance_words=_unique_words(readout.get("comply", [])),
        query_counts=query_counts,
        attacks=tuple(record.get("attacks", ["direct"])),
        judge_name=str(judge.get("name", "")),
        max_new_tokens=int(judge.get("new_tokens", 0)),
        n_opening_tokens=int(record.get("openings", {}).get("new_tokens", 0)),
        response_basis=format_response_basis(record),
    )


def format_response_basis(record: Mapping[str, Any]) -> str:
    """Return what `analyze` judged of the responses and by which judge; an empty text if it judged none.

    >>> format_response_basis({"responses": {"new_tokens": 24, "judge": {"name": "learned"}}})
    'first 24 tokens of the responses, judged by learned'

    Args:
        record: contents of the run's `run.json`.
    """
    responses = record.get("responses")
    if not responses:
        return ""
    return f"first {responses['new_tokens']} tokens of the responses, judged by {responses['judge']['name']}"


def format_family_note(families: Iterable[str]) -> str:
    """Return the sentence that explains the abbreviations of families; empty if none has one.

    >>> format_family_note(["steering"]), len(format_family_note(["steering", "noise"])) > 0
    ('', True)
    """
    is_in_paper = not PAPER_FAMILIES.keys().isdisjoint(families)
    return " In parentheses: abbreviations of families in Long et al. (2025)." if is_in_paper else ""


def format_count_range(counts: pd.Series[int]) -> str:
    """Return one count, or the lowest and the highest if the defenses of a run differ."""
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return str(low) if low == high else f"{low}\N{EN DASH}{high}"


def format_query_counts(points: pd.DataFrame, counts: QueryCounts) -> str:
    """Return "on N harmful and M benign queries", from the table's own columns if it has them."""
    if {"n_harmful", "n_benign"} <= set(points):
        columns = [points[name].dropna().astype(int) for name in ("n_harmful", "n_benign")]
        if all(len(column) for column in columns):
            harmful, benign = map(format_count_range, columns)
            return f"on {harmful} harmful and {benign} benign queries"
    return f"on {counts[0]} harmful and {counts[1]} benign queries" if counts else "on the run's queries"


def format_grey_note(points: pd.DataFrame) -> str:
    """Return the sentence that explains grey curves, empty if every defense has its own style."""
    many = points["defense"].nunique() > len(CURVE_STYLES)
    return f"Grey: all defenses after the first {len(CURVE_STYLES)}. " if many else ""


def keep_if_intervals(points: pd.DataFrame, sentence: str) -> str:
    """Return a sentence about intervals, empty if the table has none."""
    lows = [name for name in points if str(name).endswith("_low")]
    return sentence if points[lows].notna().any(axis=None) else ""


def format_interval_note(points: pd.DataFrame, marks: str) -> str:
    """Return the sentence that says which marks are the intervals, empty if the table has none."""
    return keep_if_intervals(points, f"{marks} are 95\u00a0% intervals. ")


def format_run_sentences(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the shared sentences for the attack of these points."""
    shown = context if keep_if_intervals(points, "known") else replace(context, interval="none known")
    return shown.format_sentences(points["attack"].iloc[0])


def omit_interval_note(context: CaptionContext, has_no_intervals: bool) -> CaptionContext:
    """Return the context of a figure that may draw no intervals."""
    return replace(context, interval="not drawn") if has_no_intervals else context


def format_signed_nats(value: float) -> str:
    """Return a value with its sign and two digits."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _quote_words(words: Sequence[str], max_words: int = 12) -> str:
    quoted = [
        f"\N{LEFT DOUBLE QUOTATION MARK}{word}\N{RIGHT DOUBLE QUOTATION MARK}" for word in words[:max_words]
    ]
    return ", ".join(quoted) + (f" and {len(words) - max_words} more" if len(words) > max_words else "")


def _unique_words(tokens: Sequence[Any]) -> tuple[str, ...]:
    """Return the words of tokens: "I" and " I" are two tokens and one word."""
    return tuple(dict.fromkeys(str(token).strip() for token in tokens))


def _format_readout(readout: Mapping[str, Any]) -> str:
    """Return how the readout uses the logits, as a caption writes it before the words."""
    name = str(readout["name"])
    if readout.get("questions"):
        return "first-token logits, asked whether the request should be refused, of"
    if name.startswith("prefilled-"):
        return f"after {name.removeprefix('prefilled-')} tokens of a complying opener, logits of"
    if readout.get("base_value") is not None:
        n_tokens = "the first tokens" if readout.get("branches") else "the first token"
        return f"log-odds of the expected refusal given {n_tokens} ({name}), highest after"
    return (
        "log-odds, against all other first tokens, of" if readout.get("log_odds") else "first-token logits of"
    )


def _format_model(record: Mapping[str, Any]) -> str:
    """Return the model under a name that a reader can look up; a local path means nothing to others."""
    name = str(record["model"]["name"])
    identifier = str(record["model"].get("id", name))
    names = [identifier] if "/" in name or name == identifier else [name, identifier]
    details = ", ".join([*names[1:], *filter(None, [record.get("dtype")])])
    return f"{names[0]} ({details})".removesuffix(" ()")
