"""Tables refuse to exist when later steps would misread them."""

import pandas as pd
import pytest

from analysis.stats.tables import ESTIMATE_NAMES, SCORE_COLUMNS, ScoreTable, Summary

MADE = {
    "readout": {"threshold": -0.5},
    "defenses": {"none": {"family": "none"}, "d": {"family": "reminders"}},
}


def frame() -> pd.DataFrame:
    """Return two queries, undefended and defended; the second condition in another order."""
    rows = [
        ("h", True, "none", 1.0),
        ("b", False, "none", 0.0),
        ("b", False, "d", 2.0),
        ("h", True, "d", 3.0),
    ]
    return pd.DataFrame(
        [(q, "p", "any", h, "direct", d, m, 0.5, 9, 0.4) for q, h, d, m in rows], columns=list(SCORE_COLUMNS)
    )


def test_a_condition_lists_its_queries_in_the_order_of_the_undefended():
    scores = ScoreTable(frame(), MADE)
    assert scores.select_condition("direct", "d").index.tolist() == ["h", "b"]
    assert scores.select_condition("direct", "d")["margin"].tolist() == [3.0, 2.0]
    assert scores.condition_keys == [("direct", "none"), ("direct", "d")]
    assert scores.threshold == -0.5
    assert scores.get_family("d") == "reminders"


@pytest.mark.parametrize("column", SCORE_COLUMNS)
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=column):
        ScoreTable(frame().drop(columns=column), MADE)


def test_a_query_scored_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        ScoreTable(pd.concat([frame(), frame()[:1]]), MADE)


def test_a_margin_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="margin"):
        ScoreTable(frame().assign(margin=[1.0, float("nan"), 0.0, 0.0]), MADE)
    with pytest.raises(ValueError, match="harmful"):
        ScoreTable(frame().assign(harmful=[1, 0, 0, 1]), MADE)


def test_without_the_undefended_model_there_is_nothing_to_compare_with():
    with pytest.raises(ValueError, match="undefended"):
        ScoreTable(frame()[2:], MADE)


def test_defenses_scored_on_different_queries_are_refused():
    with pytest.raises(ValueError, match="same queries"):
        ScoreTable(frame()[:3], MADE)


def test_a_query_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="class"):
        ScoreTable(frame().assign(harmful=[True, False, True, True]), MADE)


def test_a_summary_without_a_promised_column_is_refused():
    wanted = [
        "attack",
        "defense",
        "family",
        "n_harmful",
        "n_benign",
        "p_shift",
        "p_discrimination",
        "verdict",
        "trusted",
    ]
    wanted += [f"{name}{end}" for name in ESTIMATE_NAMES for end in ("", "_low", "_high")]
    Summary(pd.DataFrame(columns=wanted))
    for name in wanted:
        with pytest.raises(ValueError, match=name):
            Summary(pd.DataFrame(columns=[column for column in wanted if column != name]))
