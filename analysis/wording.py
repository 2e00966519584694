"""Titles and captions of the figures of where in a model a defense acts; each caption needs no other page."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from analysis.captions import CaptionContext
from analysis.curves import MAX_NUMBERED_DEFENSES
from analysis.heads import MIN_DOTTED_CELL, choose_cell_size, find_color_limit
from analysis.panels import CONTRAST_LABELS, CURVE_STYLES, to_numbers

# A "{}" stands for the defense.
MECHANISM_TITLES = {
    "layers": "The layers in which a defense's effect appears",
    "parts": "Colored: the heads and MLPs that write the effect of {}",
    "top": "The parts that write most of the effect of {}",
    "directions": "Whether a defense moves what the model holds of refusal and of harm",
    "patches": "Beyond its placebos, a patch carries the effect of {}",
    "cuts": "Near 0: there the defense's own tokens have to be read",
    "weights": "Where the tuned weights of {} act",
    "profiles": "Blue: two defenses act through the same parts",
}
QueryCounts = tuple[int, int] | None
CONTRASTS_SENTENCE = (
    "Shift is the mean of the two class means of the margin's change against the undefended model (refuses "
    "more of everything), discrimination is harmful minus benign (tells harm from harmless better). "
)


def caption_layers(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `depth.layers` draws from these points."""
    halves = [name for name in points if str(name).endswith("_half")]
    marked = bool(points[halves].notna().any(axis=None))
    half = (
        "Below: the layer from which on the contrast stays beyond half of its final value; no mark where the "
        "final interval holds 0. "
    )
    last = f"{to_numbers(points['layer']).max():.0f}"
    return (
        f"Logit lens {format_query_counts(points, counts)}: the margin read off the residual stream that enters each "
        f"layer; {last} is behind the last one, the whole effect. {CONTRASTS_SENTENCE}{half * marked}"
        f"{format_interval_note(points, 'Bands')}{format_grey_note(points)}{format_run_sentences(points, context)}"
    )


def caption_part_map(cells: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `heads.heads` draws from these cells."""
    most = find_color_limit(cells[[*CONTRAST_LABELS]])
    beyond = int((cells[[*CONTRAST_LABELS]].abs() > most).any(axis=1).sum())
    cut = f"{beyond} parts beyond the ends of the scale have its end colors. " if beyond > 1 else ""
    cut = "One part beyond the ends of the scale has its end color. " if beyond == 1 else cut
    across = int(to_numbers(cells["head"]).max()) + 1 if cells["head"].notna().any() else 1
    room = min(choose_cell_size(int(to_numbers(cells["layer"]).max()) + 1, across)) >= MIN_DOTTED_CELL
    dot = "Dot: the 95\u00a0% interval excludes 0. " if room else "Intervals are in the table. "
    dot = keep_if_intervals(cells, dot)
    many = across + len({"mlp", "bias", "added"} & set(cells["kind"]))
    holes = len(cells) < many * (int(to_numbers(cells["layer"]).max()) + 1) or cells["shift"].isna().any()
    grey = "Grey: no such part. " * bool(holes)
    return (
        f"Direct logit attribution {format_query_counts(cells, counts)}: what each part of the model writes of the "
        f"change of the margin. {CONTRASTS_SENTENCE}Blue adds to it, orange takes from it; one scale for both "
        f"panels. {cut}{dot}{grey}The embedding and the final bias, which stand in no layer, are left "
        "out. "
        f"{format_run_sentences(cells, context)}"
    )


def caption_top_parts(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `parts.top` draws from these points."""
    total = points["n_parts"].iloc[0]
    sums = " and ".join(
        f"{format_signed_nats(points[name].sum())} of {format_signed_nats(points[f'total_{name}'].iloc[0])}\u00a0nats of {name}"
        for name in CONTRAST_LABELS
    )
    return (
        f"Direct logit attribution {format_query_counts(points, counts)}: the {len(points)} of {total} parts "
        "with the largest effect on either contrast (head layer.head); together they write "
        f"{sums}. {CONTRASTS_SENTENCE}{format_interval_note(points, 'Bars')}The parts were chosen by these numbers, so that the "
        f"largest look larger than they are. {format_run_sentences(points, context)}"
    )


def caption_directions(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `depth.directions` draws from these points."""
    return (
        "Projection of the residual stream of each layer on a direction learned on training queries (a row "
        f"per direction), {format_query_counts(points, counts)}, all held out. AUROC: how well the projection tells the "
        "classes; the thin line at .5 is chance. Shift (mean of the two class means of the change) and "
        "discrimination (harmful minus benign) are in units of the distance between the classes' training "
        f"means. {format_interval_note(points, 'Bands')}Upright dotted line: the layer chosen in training. "
        f"{format_grey_note(points)}{format_run_sentences(points, context)}"
    )


def caption_patches(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `transplants.patches` draws from these points."""
    said = {
        "undefended": "Into the undefended: activations at the answer position are those of the defended "
        "run; drawn is the change from undefended. ",
        "defended": "Into the defended: those of the undefended run; drawn is what is lost. ",
    }
    against = {
        "placebo": "Random: a random direction of the same norm. ",
        "neutral_prompt": "Neutral prompt: activations under a control prompt of the same length. ",
    }
    words = "".join(text for into, text in said.items() if (points["into"] == into).any())
    words += "".join(text for source, text in against.items() if (points["source"] == source).any())
    single = points[points["kind"] == "head"]
    shown = "Heads (layer.head): those with the largest effects. " * bool(len(single))
    return (
        f"Activation patching {format_query_counts(points, counts)}. {words}{CONTRASTS_SENTENCE}{shown}"
        f"{format_interval_note(points, 'Bands and bars')}{format_run_sentences(points, context)}"
    )


def caption_attention_knockouts(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `cuts.cuts` draws from these points."""
    return (
        f"What is left of the effect {format_query_counts(points, counts)} when attention to the defense's own tokens is "
        "cut in a range of layers (both ends included): filled, from the answer position only; hollow, from "
        f"every later token. {CONTRASTS_SENTENCE}{format_interval_note(points, 'Bars')}{format_grey_note(points)}{format_run_sentences(points, context)}"
    )


def caption_weight_patches(points: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `transplants.weights` draws from these points."""
    kinds = "Dots: in one kind of module, in all layers. " * bool((points["how"] == "module").any())
    return (
        f"The effect {format_query_counts(points, counts)} with the tuned weights' change switched on in some places and "
        "off in all others, the defended prompt always there (dotted: that prompt alone). "
        f"Curves: in one layer alone, or in it and all below. {kinds}{CONTRASTS_SENTENCE}"
        f"{format_interval_note(points, 'Bands and bars')}{format_run_sentences(points, context)}"
    )


def caption_profile_similarity(profiles: pd.DataFrame, context: CaptionContext, counts: QueryCounts = None) -> str:
    """Return the caption of the figure that `likeness.likeness` draws from these profiles."""
    few = len({*profiles["defense"], *profiles["other"]}) <= MAX_NUMBERED_DEFENSES
    sure = keep_if_intervals(profiles, f"{'Bold' if few else 'Dot'}: the 95\u00a0% interval excludes 0. ")
    return (
        "Cosine of what two defenses' parts (heads, MLPs and all others) write by direct logit attribution "
        f"{format_query_counts(profiles, counts)}, each pair drawn twice: 1, the same parts in the same proportions; 0, "
        f"unrelated. {CONTRASTS_SENTENCE}{sure}"
        f"{format_run_sentences(profiles, context)}"
    )


MECHANISM_CAPTIONS: dict[str, Callable[[pd.DataFrame, CaptionContext, QueryCounts], str]] = {
    "layers": caption_layers,
    "parts": caption_part_map,
    "top": caption_top_parts,
    "directions": caption_directions,
    "patches": caption_patches,
    "cuts": caption_attention_knockouts,
    "weights": caption_weight_patches,
    "profiles": caption_profile_similarity,
}


def format_query_counts(points: pd.DataFrame, counts: QueryCounts) -> str:
    if {"n_harmful", "n_benign"} <= set(points):
        spans = [points[name].dropna().astype(int) for name in ("n_harmful", "n_benign")]
        ends = [sorted({int(span.min()), int(span.max())}) for span in spans if len(span)]
        if len(ends) == 2:
            harmful, benign = ("\N{EN DASH}".join(map(str, end)) for end in ends)
            return f"on {harmful} harmful and {benign} benign queries"
    return f"on {counts[0]} harmful and {counts[1]} benign queries" if counts else "on the run's queries"


def format_grey_note(points: pd.DataFrame) -> str:
    return f"Grey: all past the first {len(CURVE_STYLES)}. " * (points["defense"].nunique() > len(CURVE_STYLES))


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
