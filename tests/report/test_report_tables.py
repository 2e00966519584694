"""Tables of the report name what they show, also for runs of older versions."""

from pathlib import Path

import numpy as np
import pandas as pd
from saved_runs import render_folders, write_run

from analysis.datasets.loading import load_query_texts
from analysis.report.folder import read_run
from analysis.report.results import Run
from analysis.report.tables import build_ensemble_tables, build_validity_tables


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
