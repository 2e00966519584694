"""Tables reject rows that later steps would misread."""

import pandas as pd
import pytest

from analysis.stats.tables import ESTIMATE_NAMES, SCORE_COLUMNS, ScoreTable, Summary

RECORD = {
    "readout": {"threshold": -0.5},
    "defenses": {"none": {"family": "none"}, "d": {"family": "reminders"}},
}


def make_frame() -> pd.DataFrame:
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


def test_a_condition_lists_its_queries_in_the_order_of_the_undefended_model():
    scores = ScoreTable(make_frame(), RECORD)
    assert scores.select_condition("direct", "d").index.tolist() == ["h", "b"]
    assert scores.select_condition("direct", "d")["margin"].tolist() == [3.0, 2.0]
    assert scores.condition_keys == [("direct", "none"), ("direct", "d")]
    assert scores.threshold == -0.5
    assert scores.get_family("d") == "reminders"


@pytest.mark.parametrize("column", SCORE_COLUMNS)
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=column):
        ScoreTable(make_frame().drop(columns=column), RECORD)


def test_a_query_scored_twice_is_rejected():
    with pytest.raises(ValueError, match="twice"):
        ScoreTable(pd.concat([make_frame(), make_frame()[:1]]), RECORD)


def test_a_margin_that_is_not_a_number_is_rejected():
    with pytest.raises(ValueError, match="margin"):
        ScoreTable(make_frame().assign(margin=[1.0, float("nan"), 0.0, 0.0]), RECORD)
    with pytest.raises(ValueError, match="harmful"):
        ScoreTable(make_frame().assign(harmful=[1, 0, 0, 1]), RECORD)


def test_a_table_without_the_undefended_model_is_rejected():
    with pytest.raises(ValueError, match="undefended"):
        ScoreTable(make_frame()[2:], RECORD)


def test_defenses_scored_on_different_queries_are_rejected():
    with pytest.raises(ValueError, match="same queries"):
        ScoreTable(make_frame()[:3], RECORD)


def test_a_query_of_two_classes_is_rejected():
    with pytest.raises(ValueError, match="class"):
        ScoreTable(make_frame().assign(harmful=[True, False, True, True]), RECORD)


def test_a_summary_without_a_required_column_is_rejected():
    columns = [
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
    ]
    columns += [f"{name}{end}" for name in ESTIMATE_NAMES for end in ("", "_low", "_high")]
    Summary(pd.DataFrame(columns=columns))
    for name in columns:
        with pytest.raises(ValueError, match=name):
            Summary(pd.DataFrame(columns=[other for other in columns if other != name]))
