"""What is said below the figures of ensembles."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from analysis.captions import CaptionContext
from analysis.curves import MAX_BARRED_STACKS, MAX_SHAPED_VOTES, MAX_NUMBERED_DEFENSES


def caption_forecast(points: pd.DataFrame, context: CaptionContext, counts: tuple[int, int] | None = None) -> str:
    """Return the caption of the figure that `forecast.forecast` draws from these points.

    Args:
        points: what was drawn.
        context: what is said about the run.
        counts: harmful and benign queries of the split, where they are known.
    """
    stacked = int((points["how"] == "stack").sum())
    stacks = (
        "Stacks (all members worn at once) were run; their margins are predicted query by query, by adding "
        "up what each member changes of the undefended model. "
    )
    votes = (
        "Votes are read from the margins of their members; they are predicted from the members' means, "
        "spreads and correlations alone, as if margins were normal. "
    )
    kinds = "kind" in points and bool(points["kind"].isin(["intra", "inter"]).any())
    crowd = len(points) - stacked > MAX_SHAPED_VOTES
    hollow = (
        "Hollow: members work by two mechanisms (shift and discrimination), filled: by one"
        f"{', shown of stacks only' if crowd and stacked else ''}. "
    )
    barred = stacked <= MAX_BARRED_STACKS and bool(
        points.filter(like="_low")[points["how"] == "stack"].notna().any(axis=None)
    )
    bars = "Bars on stacks: 95\u00a0% intervals of what was observed. " if barred else ""
    return (
        f"Ensembles of two and more defenses, each a point, {format_shared_query_counts(counts)}: shift is the mean of the two "
        "class means of the margin's change against the undefended model, discrimination is harmful minus "
        f"benign. {stacks * bool(stacked)}{votes * (stacked < len(points))}"
        f"{hollow * (kinds and bool(stacked or not crowd))}"
        f"{bars}R²: of the prediction as it is, no line fitted; ρ: rank correlation (Spearman); both without "
        "shift and discrimination of means and fitted votes, which are right by definition; an "
        f"\N{EN DASH} stands where fewer than three, or all equal, were observed. "
        f"{omit_interval_note(context, not barred).format_sentences(points['attack'].iloc[0])}"
    )


def caption_interactions(cells: pd.DataFrame, context: CaptionContext, counts: tuple[int, int] | None = None) -> str:
    """Return the caption of the figure that `interactions.interactions` draws from these cells.

    Args:
        cells: what was drawn.
        context: what is said about the run.
        counts: harmful and benign queries of the split, where they are known.
    """
    few = len({*cells["first"], *cells["second"]}) <= MAX_NUMBERED_DEFENSES
    sure = bool(cells.filter(like="_low").notna().any(axis=None))
    values = cells[["interaction_shift", "interaction_discrimination"]]
    dash = "\N{EN DASH}: no value. " * bool(few and values.isna().any(axis=None))
    pairs = f"{len(cells)} pairs of defenses that were" if len(cells) > 1 else "one pair of defenses that was"
    mark = f"{'Bold' if few else 'Dot'}: the 95\u00a0% interval excludes 0. " if sure else ""
    return (
        f"The {pairs} run as stacks (both worn at once), each drawn twice, {format_shared_query_counts(counts)}: what was "
        "observed less what both members add up to, each by itself, of shift (mean of the two class means "
        "of the margin's change against the undefended model) and of discrimination (harmful minus benign). "
        f"0 (white): the two do not interact. {mark}{dash}"
        f"{omit_interval_note(context, not sure).format_sentences(cells['attack'].iloc[0])}"
    )


def caption_pareto_front(
    points: pd.DataFrame, context: CaptionContext, attacks: Sequence[str], counts: tuple[int, int] | None = None
) -> str:
    """Return the caption of the figure that `pareto.pareto` draws from these points.

    Args:
        points: what was drawn.
        context: what is said about the run.
        attacks: how queries were sent, what users send first.
        counts: harmful and benign queries of the split, where they are known.
    """
    front = int((points["on_front"] & (points["members"] != "none")).sum())
    left = front - int((points["number"] > 0).sum())
    named = (
        f"{left} of the front's {front} are not named: named are first those that no other beats in both "
        "rates whatever it costs, then those that refuse most harm there. "
    )
    several = len(attacks) > 1
    over = f" (the mean over {len(attacks)} ways of sending them; second panel: without the first)" * several
    sent = ", ".join("none" if name == "direct" else name for name in attacks) if several else attacks[0]
    unknown = "White: cost not measured. " * bool(points.loc[points["on_front"], "cost"].isna().any())
    return (
        f"Every single defense and ensemble that was observed, {format_shared_query_counts(counts)}: share of benign queries "
        f"answered{' as users send them' * several} and of harmful queries refused{over}. Large: on the "
        "front, that is, on the calibration split no other is at least as good in both rates and in cost "
        "and better in one; chosen there and shown here on the test split, where some no longer look best. "
        f"{named * bool(left)}{unknown}{omit_interval_note(context, True).format_sentences(sent)}"
    )


def format_shared_query_counts(counts: tuple[int, int] | None) -> str:
    return f"on {counts[0]} harmful and {counts[1]} benign queries" if counts else "on the same queries"


def omit_interval_note(context: CaptionContext, has_no_intervals: bool) -> CaptionContext:
    """The context of a figure that may show no intervals."""
    return replace(context, interval="not drawn") if has_no_intervals else context
