"""Tables of the report name what they show, also for runs of older versions."""

from pathlib import Path

import numpy as np
import pandas as pd
from saved_runs import render_folders, write_run

from analysis.datasets.loading import load_query_texts
from analysis.plots.style import VERMILION
from analysis.report.folder import read_run
from analysis.report.results import Run
from analysis.report.tables import (
    build_control_tables,
    build_ensemble_tables,
    build_kind_tables,
    build_validity_tables,
)


def test_the_table_of_the_pareto_front_names_the_share_that_it_shows():
    candidates = pd.DataFrame(
        {
            "members": ["none"],
            "how": ["alone"],
            "harmful_test": [0.97],
            "benign_test": [0.23],
            "on_front": [True],
        }
    )
    recommended = pd.DataFrame({"members": ["policy"], "harmful": [0.5], "over_refusal": [0.03]})
    tables = {"candidates": candidates, "recommendation-5": recommended}
    front, recommendation = build_ensemble_tables(Run("run", {}, tables))
    # `benign_test` in candidates.csv is the share of benign queries that are answered.
    assert dict(zip(front.headers, front.rows[0], strict=True))["benign answered (%)"] == "23"
    assert "benign refused (%)" not in front.headers
    shown = dict(zip(recommendation.headers, recommendation.rows[0], strict=True))
    assert shown["benign refused (%)"] == "3"
    record = {"guarantee": "In at least 90 of 100 samples, it holds.", "guarantee_based_on": "margins"}
    titles = [table.title for table in build_ensemble_tables(Run("run", record, tables))]
    assert titles[1].endswith("refused. In at least 90 of 100 samples, it holds (refusals by margins)")


def make_kinds(attack="direct"):
    """Return `kinds.csv` of two defenses and two kinds of benign queries."""
    row = {"attack": attack, "family": "reminders", "n": 60, "n_responses": 60, "based_on": "responses"}
    names = {"defense": ["none", "none", "policy", "policy"], "kind": ["twin", "mine <i>"] * 2}
    values = {
        f"{name}{end}": value
        for name, values in (
            ("over_refusal_rate", [0.1, 0.0, 0.75, 0.25]),
            ("delta_auroc", [np.nan, np.nan, -0.5, 0.25]),
        )
        for end, value in (("", values), ("_low", values), ("_high", values))
    }
    return pd.DataFrame(row | names | values)


def test_over_refusal_and_the_change_of_auroc_are_shown_by_kind():
    kinds = pd.concat([make_kinds(), make_kinds("base64")])
    tables = build_kind_tables(Run("run", {}, {"kinds": kinds}))
    rates, aurocs, attacked, _ = tables
    assert rates.headers == ("defense", "twin (n = 60)", "mine <i> (n = 60)")
    assert rates.rows == (("undefended", "10 [10, 10]", "0 [0, 0]"), ("policy", "75 [75, 75]", "25 [25, 25]"))
    assert rates.title == "Benign refused (%), by kind of benign query"
    first, second = (int(colors[0].removeprefix(VERMILION), 16) for colors in rates.cell_colors)
    assert second > first, "the color of a cell grows with the rate"
    assert aurocs.rows == (
        ("undefended", "–", "–"),
        ("policy", "−0.50 [−0.50, −0.50]", "+0.25 [+0.25, +0.25]"),
    )
    assert aurocs.title == "ΔAUROC, by kind of benign query" and aurocs.cell_colors is None
    assert attacked.title.endswith("; attack: base64")
    single = kinds[kinds["kind"] == "twin"]
    assert build_kind_tables(Run("run", {}, {"kinds": single})) == build_kind_tables(Run("run", {}, {})) == []


def test_the_page_has_a_section_on_kinds_if_the_run_has_several(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "Kinds of benign queries" not in render_folders(folder)
    make_kinds().to_csv(folder / "kinds.csv", index=False)
    html = render_folders(folder)
    assert "<h3>Kinds of benign queries</h3>" in html and "mine &lt;i&gt; (n = 60)" in html


def test_no_shipped_table_names_its_defenses_by_another_column():
    tables = list((Path(__file__).parents[2] / "figures").glob("*/*.csv"))
    headers = {
        f"{path.parent.name}/{path.name}": path.read_text("utf-8").split("\n", 1)[0].strip().split(",")
        for path in tables
    }
    assert "defense" in headers["validity/validity.csv"] and "defense" in headers["validity/worth.csv"]
    assert [name for name, columns in headers.items() if "condition" in columns] == []


def test_the_validity_of_an_older_run_is_shown_by_defense(tmp_path):
    folder = write_run(tmp_path / "run")
    row = {"attack": "direct", "condition": "policy", "readout": "words", "n": 24, "trusted": "trusted"}
    pd.DataFrame([row]).to_csv(folder / "validity.csv", index=False)
    (table,) = build_validity_tables(read_run(folder, load_query_texts))
    assert table.headers[0] == "defense" and table.rows[0][0] == "policy"
    assert "rates" not in table.headers


def test_the_table_of_validity_tells_trust_in_single_queries_from_trust_in_rates():
    rate_errors = {
        f"rate_error_{name}{end}": [value, 0.0]
        for name, value in (("harmful", 0.12), ("benign", -0.3))
        for end in ("", "_low", "_high")
    }
    row = {"attack": "direct", "defense": "policy", "readout": ["words", "responses"], "n": 24}
    trust = {"trusted": "trusted", "rate_trusted": ["not trusted", "cannot tell"], "n_needed": [np.nan, 54]}
    thresholds = {"threshold": [-0.5, np.nan], "needed_threshold": [1.25, np.nan]}
    thresholds |= {"needed_threshold_low": [1.0, np.nan], "needed_threshold_high": [1.5, np.nan]}
    validity = pd.DataFrame(row | trust | rate_errors | thresholds)
    (table,) = build_validity_tables(Run("run", {}, {"validity": validity}))
    words, responses = (dict(zip(table.headers, cells, strict=True)) for cells in table.rows)
    assert (words["single queries"], words["rates"]) == ("trusted", "not trusted")
    assert words["rate error, harmful (points)"].startswith("+12")
    assert words["rate error, benign (points)"].startswith("−30")
    assert (words["threshold (nats)"], words["threshold needed (nats)"]) == ("−0.50", "+1.25 [+1.00, +1.50]")
    assert responses["queries per class needed for rates"] == "54"
    assert responses["threshold (nats)"] == responses["threshold needed (nats)"] == "–"


def test_a_cell_that_generated_text_contradicts_is_marked(tmp_path):
    html = render_folders(write_run(tmp_path / "run", attacks=("direct", "persona"), trusted="not trusted"))
    assert "50?" in html and "generated text contradicts the readout" in html and "(not trusted)" in html


def test_matched_controls_have_a_table_per_attack_and_only_rows_with_a_control():
    row = {"attack": "direct", "defense": "policy", "family": "reminders", "control": "neutral text"}
    row |= {"verdict_over_control": "equivalent", "control_note": "shift + as any neutral text of its size"}
    for effect in ("shift", "discrimination"):
        for prefix, value in (("", 0.5), ("response_", 12.0)):
            row |= {
                f"{prefix}{effect}_over_control{end}": value + change
                for end, change in (("", 0), ("_low", -0.2), ("_high", 0.2))
            }
    summary = pd.DataFrame([row, row | {"attack": "base64"}, row | {"defense": "none", "control": None}])
    tables = build_control_tables(Run("run", {}, {"summary": summary}))
    assert [table.title.partition("; ")[2] for table in tables] == ["", "attack: base64"]
    assert tables[0].rows == (
        (
            "policy",
            "neutral text",
            "equivalent",
            "shift + as any neutral text of its size",
            "+12 [+12, +12]",
            "+12 [+12, +12]",
            "+0.50 [+0.30, +0.70]",
            "+0.50 [+0.30, +0.70]",
        ),
    )
    assert build_control_tables(Run("run", {}, {"summary": summary.drop(columns="control")})) == []
