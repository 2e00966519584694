"""The headline counts verdicts of defenses, and says what is provisional or not counted."""

import pandas as pd
from saved_runs import DEFENSES, make_summary

from analysis.report.headline import describe_effects, describe_validity


def test_the_headline_counts_the_verdicts_of_defenses_only():
    text = describe_effects(make_summary(DEFENSES), "toy")
    assert text == (
        "Results for 3 defenses on toy, from first-token margins: 1 shifts toward refusal, 1 away from it, "
        "1 inconclusive; 1 separates harmful from benign queries better (smooth_llm), 1 worse, "
        "1 inconclusive."
    )


def test_the_headline_marks_provisional_results_and_leaves_out_contradicted_ones():
    summary = make_summary(DEFENSES)
    summary.loc[summary["defense"] == "policy", "trusted"] = "not validated"
    summary.loc[summary["defense"] == "smooth_llm", "trusted"] = "not trusted"
    text = describe_effects(summary, "toy")
    assert text.startswith("Results for 2 defenses on toy")
    assert "none separates harmful from benign queries better, 1 worse" in text
    assert "1 is provisional" in text
    assert "1 is not counted, because generated text contradicts the readout" in text
    assert "All are provisional" in describe_effects(make_summary(DEFENSES, trusted="not validated"), "toy")
    assert describe_effects(make_summary(DEFENSES, trusted="not trusted"), "toy").startswith(
        "No conclusion is possible about 3 defenses"
    )


def test_the_headline_names_the_attack_and_counts_ensembles_apart_from_defenses():
    summary = make_summary({"a+b": ("ensemble", 1.0, 0.0, "shift +")} | DEFENSES, attack="persona")
    text = describe_effects(summary, "toy", "persona")
    assert text.startswith("Results for 3 defenses and 1 ensemble on toy under the attack persona")
    assert "2 shift t" in text
    reference_only = make_summary({"none": DEFENSES["none"]})
    assert (
        describe_effects(reference_only, "toy")
        == "No defense was evaluated on toy, only references and controls."
    )


def test_the_headline_counts_defenses_without_an_effect():
    names = {"a": "equivalent", "b": "equivalent", "c": "inconclusive", "d": "not judged"}
    defenses = {name: ("reminders", 0.1, 0.0, verdict) for name, verdict in names.items()}
    text = describe_effects(make_summary(defenses), "toy")
    counts = ", 2 equivalent, 1 inconclusive, 1 not judged"
    assert text.endswith(
        f"toward refusal{counts}; none separates harmful from benign queries better{counts}."
    )
    older = make_summary({"policy": ("reminders", 0.1, 0.0, "no effect found")})
    assert describe_effects(older, "toy").endswith("better, 1 no effect found.")


def test_a_headline_from_judged_responses_needs_no_trust_in_the_readout():
    summary = make_summary(DEFENSES, trusted="not trusted", based_on="responses")
    text = describe_effects(summary, "toy")
    assert text.startswith("Results for 3 defenses on toy, from judged responses: 1 shifts toward refusal")
    assert "provisional" not in text and "not counted" not in text


def test_the_headline_of_a_validation_names_each_readout():
    rows = pd.DataFrame(
        {
            "readout": ["responses", "words", "question", "responses", "words", "question"],
            "trusted": ["cannot tell", "trusted", "cannot tell", "trusted", "trusted", "not trusted"],
            "rate_trusted": ["trusted", "not trusted", "cannot tell", "trusted", "trusted", "cannot tell"],
        }
    )
    assert describe_validity(rows, "toy") == (
        "Agreement of readouts with generated text on toy: judged first tokens of responses are trusted for "
        "single queries in 1 of 2 conditions (contradicted in 0), for rates in 2 (contradicted in 0); "
        "words is trusted for single queries in 2 of 2 conditions (contradicted in 0), for rates in 1 "
        "(contradicted in 1); question is trusted for single queries in 0 of 2 conditions (contradicted in "
        "1), for rates in 0 (contradicted in 0)."
    )


def test_the_headline_of_an_older_validation_says_nothing_about_rates():
    rows = pd.DataFrame({"readout": ["words"], "trusted": ["trusted"]})
    text = describe_validity(rows, "toy")
    assert text.endswith("words is trusted for single queries in 1 of 1 condition (contradicted in 0).")
