"""What stands around each figure: a title that says what to see, a caption that needs no other page."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.curves import LINEAR_RANGE, is_stretched

FIGURE_TITLES = {
    "margins": "Shift moves both halves of a row; discrimination moves them apart",
    "plane": "Right: refuses more of everything. Up: separates better",
    "square": "What the secret adds, what the weights add, and what both do together",
    "calibration": "On the diagonal, the readout's probability can be believed",
    "rates": "On the diagonal, the readout counts refusals as the text does",
    "cost": "Up: separates better. Right: takes longer",
    "secrets": "Does it matter which secret? Each dot is one, trained anew",
    "attacks": "What is left of each defense under each attack",
    "roc": "Higher curve: separates better. Mark further along: refuses more",
    "forecast": "On the diagonal, an ensemble does what its members let expect",
    "interactions": "Blue: two defenses do more than both add up to. Orange: less",
    "front": "Up: refuses more harm. Right: answers more queries. Dark: slower",
}


@dataclass(frozen=True)
class CaptionContext:
    """What a caption says about a run and no frame of scores can know.

    >>> run = Context("smollm2", "twins", "test", threshold=-1.2, refusing=("I",), complying=("Sure",))
    >>> run.sentences("direct")[:56]
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


def caption_margins(curves: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.margins` draws from these curves.

    >>> curves = pd.DataFrame({"attack": "direct", "defense": "none", "harmful": [True, False], "n": [9, 8]})
    >>> curves = curves.assign(bandwidth=0.5)
    >>> of_margins(curves, Context("smollm2", "twins", "test", 0.0, ("I",)))[:54]
    'First-answer-token margins of 9 harmful queries (above'
    """
    harmful, benign = (format_count_range(curves.loc[curves["harmful"] == c, "n"]) for c in (True, False))
    width = curves["bandwidth"].iloc[0]
    several = (curves["defense"] != "none").any()
    grey = "Grey repeats the undefended model on the same queries. " if several else ""
    return (
        f"First-answer-token margins of {harmful} harmful queries (above each line) and {benign} benign "
        f"ones (below), a row per defense; ticks are medians. {grey}Dashed: the "
        "threshold; at the right, the share of each class beyond it with its interval. "
        f"Density: Gaussian kernel of SD {width:.2f}\u00a0nats, one scale for all rows. "
        f"{context.format_sentences(curves['attack'].iloc[0])}"
    )


def caption_plane(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.plane` draws from these points.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8], "family": ["noise"]})
    >>> of_plane(points, Context("smollm2", "twins", "test", 0.0, ("I",)))[:47]
    'Change of the first-answer-token margin against'
    """
    controls = " Controls (grey) are not defenses." if (points["family"] == "control").any() else ""
    doubtful = "trusted" in points and (points["trusted"] == "not trusted").any()
    hollow = " Hollow: generated text contradicts the readout there." if doubtful else ""
    bent = "shift" in points and is_stretched(points)
    scale = f" Both axes are logarithmic beyond ±{LINEAR_RANGE:g}\u00a0nats." if bent else ""
    return (
        "Change of the first-answer-token margin against the undefended model (the origin) on the same "
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} benign queries: shift is "
        "the mean of the two class means of the change, discrimination is harmful minus benign; bars are "
        f"95\u00a0% intervals. Shape and color name the family.{controls}{hollow}{scale} "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_attack_grid(cells: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `grid.grid` draws from these cells."""
    doubtful = "trusted" in cells and (cells["trusted"] == "not trusted").any()
    hollow = " Hollow and in italics: generated text contradicts the readout there." if doubtful else ""
    wide = max((cells[f"{x}_high"] - cells[f"{x}_low"]).max() for x in ("refusal_rate", "over_refusal_rate"))
    widest = f"; the widest of a rate spans {100 * wide:.0f} points" if wide == wide else ""
    harmful, benign = format_count_range(cells["n_harmful"]), format_count_range(cells["n_benign"])
    return (
        f"The same {harmful} harmful and {benign} benign queries, all sent through the attack of the column "
        "to the model under the defense of the row. First panel: mean over the harmful queries of the "
        "first-answer-token margin, less the threshold; positive (blue) refuses. Then the share of each "
        f"class whose margin exceeds the threshold.{hollow} Intervals are in the table beside the "
        f"figure{widest}. {context.format_sentences('by column')}"
    )


def caption_square(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.square` draws from these points."""
    name = points["defense"].str.partition("/")[0].iloc[0]
    return (
        f"{name} taken apart: tuned weights on or off, secret prompt on or off, each as the change of the "
        f"first-answer-token margin against the undefended model (the origin) on the same "
        f"{format_count_range(points['n_harmful'])} harmful and {format_count_range(points['n_benign'])} benign queries; bars are "
        "95\u00a0% intervals. Were the two ingredients independent, the arrows of one color would be equal. "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_validity(validity: pd.DataFrame, context: CaptionContext, judge_name: str, max_new_tokens: int) -> str:
    """Return what the captions of both figures of `analyze validate` say."""
    return (
        f"Greedy answers ({max_new_tokens} tokens) of {format_count_range(validity['n'])} queries under each of {len(validity)} "
        f"conditions, judged by their text (judge: {judge_name}), against the first-token readout at its "
        "threshold; the calibration curve pools all conditions, and its bars are Wilson 95\u00a0% intervals "
        "that take answers as independent. Not trusted: the upper end of the "
        "AUROC's interval against the text is under .80, or of kappa under .60; cannot tell: mostly, too "
        "few of one class. "
        f"{context.format_sentences(', '.join(validity['attack'].unique()))}"
    )


def caption_cost(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `price.price` draws from these points."""
    return (
        "Gain in AUROC on the queries of the run against the time until the first token: "
        f"{format_count_range(points['n'])} queries each alone, every one against itself undefended (geometric means; "
        "conditions took turns). Bars are 95\u00a0% intervals. Not in it: the answer's tokens, and training. "
        f"{context.format_sentences(points['attack'].iloc[0])}"
    )


def caption_secrets(points: pd.DataFrame, context: CaptionContext, max_new_tokens: int) -> str:
    """Return the caption of the figure that `strip.secrets` draws from these points."""
    return (
        "BackdoorAlign's weights trained once for each secret, all else equal, and asked under the attack's "
        f"system prompt, without the secret and with it: share of {format_count_range(points['text_refused_harmful_n'])} "
        f"harmful queries whose greedy answer ({max_new_tokens} tokens) holds none of the paper's 29 strings, with "
        "Wilson 95\u00a0% intervals; the tall tick is the mean over secrets. "
        f"Model: {context.model}. Data: {context.data}, {context.split} split."
    )


def caption_roc(points: pd.DataFrame, context: CaptionContext) -> str:
    """Return the caption of the figure that `plots.roc` draws from these points.

    >>> points = pd.DataFrame({"attack": ["direct"], "n_harmful": [9], "n_benign": [8]})
    >>> points = points.assign(defense="none", family="none")
    >>> of_roc(points, Context("smollm2", "twins", "test", 0.0, ("I",)))[:43]
    'Share refused among 9 harmful queries again'
    """
    of = points.drop_duplicates("defense")
    controls = int((of["family"] == "control").sum())
    grey = "; solid grey: AUROC changed less than in the six in color" * (len(of) - controls > 7)
    grey += "; dotted grey: controls, which are not defenses" * bool(controls)
    return (
        f"Share refused among {format_count_range(points['n_harmful'])} harmful queries against share refused among "
        f"{format_count_range(points['n_benign'])} benign ones as the cut moves over the first-answer-token "
        "margin; marks: the threshold of this run; dotted diagonal: chance. Color, dash and mark name the "
        f"defense{grey}. {context.format_sentences(points['attack'].iloc[0])}"
    )


def _quote_words(words: Sequence[str], max_words: int = 12) -> str:
    more = f" and {len(words) - max_words} more" if len(words) > max_words else ""
    return (
        ", ".join(
            f"\N{LEFT DOUBLE QUOTATION MARK}{word}\N{RIGHT DOUBLE QUOTATION MARK}" for word in words[:max_words]
        )
        + more
    )


def format_count_range(counts: "pd.Series[int]") -> str:
    """Return one count, or the lowest and the highest where the defenses of a run differ."""
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return str(low) if low == high else f"{low}\N{EN DASH}{high}"
