"""`analyze ensembles` and `analyze recommend`: their tables follow from the scores."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_cli, save_model, set_home_folder
from rich.console import Console
from scipy.stats import binom

from analysis.attacks import choose_attacks
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, QuerySet
from analysis.judges.judge import Verdict
from analysis.judges.rules import RuleJudge
from analysis.stats.predictors import SAME_ON_CALIBRATION, STACK_PREDICTORS
from analysis.stats.risk_control import count_queries_needed
from analysis.stats.voting import ENSEMBLE_COORDINATES, VOTE_RULES
from analysis.studies.cost import time_conditions
from analysis.studies.ensembles import load_overlap, rank_promising_stacks, score_ensembles
from analysis.studies.recommend import (
    CandidateRefusals,
    RecommendationLimits,
    certify_ensembles,
    select_recommendations,
)
from analysis.studies.run_spec import BOTH_SPLITS, RunSpec
from defenses.errors import UserError

NAMES = ["policy", "self_reminder", "word_drop", "keyword_only"]
VERDICTS = [Verdict("none"), Verdict("full"), Verdict("unjudged")]  # by the length of the query, modulo 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy model, its own cache, and a run of `ensembles` in `out`."""
    place = tmp_path_factory.mktemp("ensembles")
    with pytest.MonkeyPatch.context() as patch:
        set_home_folder(patch, place)
        patch.setattr(
            "analysis.studies.ensembles._MAX_ROWS_WITH_INTERVALS", 0
        )  # intervals for the front are enough
        save_model(place / "toy")
        args = [f"-d{name}" for name in [*NAMES, "policy+word_drop", "random_tokens"]]
        profile = {"defense": "policy", "other": "self_reminder", "contrast": ["shift", "discrimination"]}
        pd.DataFrame(profile | {"cosine": 0.5}).to_csv(place / "profiles.csv", index=False)
        args += ["-o", place / "out", "--stacks", 2, "--overlap", place / "profiles.csv"]
        result = run_cli("ensembles", "-m", place / "toy", *args, *SHORT)
        assert result.code == 0, result.err
        (place / "said.txt").write_text(result.out)
    return place


SHORT = (
    "--limit",
    "24",
    "--attack",
    "direct",
    "--attack",
    "prefix_injection",
    "--set",
    "random_tokens.length=9",
)


@pytest.fixture
def kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, its cache in use."""
    set_home_folder(monkeypatch, place)
    return place


def make_spec(place: Path, limit: int = 24) -> RunSpec:
    """Return what is asked of the toy model."""
    return RunSpec(
        str(place / "toy"),
        "contrast",
        BOTH_SPLITS,
        limit,
        None,
        "cpu",
        "auto",
        0,
        True,
        choose_attacks(["direct"]),
    )


def test_every_table_and_figure_is_written(place: Path) -> None:
    tables = {"scores", "summary", "mechanisms", "ensembles", "additivity", "distance", "candidates", "cost"}
    tables |= {"predictors", "interacting"}
    drawn = {"forecast", "interactions", "front"}
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {f"{one}.csv" for one in tables | drawn} | {f"{one}.png" for one in drawn} | {"run.json"}
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["chosen_on"] == "calibration" and record["reported_on"] == "test" and not record["failed"]
    members = record["defenses"]["policy+word_drop"]["members"]
    assert list(members) == ["policy", "word_drop"] and members["word_drop"]["settings"]["rate"] == 0.3
    said = " ".join((place / "said.txt").read_text().split())
    assert (
        "direct: 5 stacks of the test split, predicted from the calibration split" in said
        and "Not compared" not in said
        and "Stacks that interact, direct, shift (against " in said
        and "on the Pareto front" in said
    )
    candidates = pd.read_csv(place / "out" / "candidates.csv")
    assert "random_tokens" not in set(candidates["members"]) and "none" in set(candidates["members"])


def test_votes_and_their_rates_follow_from_the_scores(place: Path) -> None:
    scores = pd.read_csv(place / "out" / "scores.csv")
    threshold = json.loads((place / "out" / "run.json").read_text())["readout"]["threshold"]
    rows = pd.read_csv(place / "out" / "ensembles.csv").set_index(["attack", "split", "members", "how"])
    pool = {"mean": "mean", "highest": "max", "lowest": "min"}
    for (attack, split), here in scores.groupby(["attack", "split"]):
        margins = here.pivot_table("margin", "query", "defense")
        harmful = here.drop_duplicates("query").set_index("query")["harmful"].loc[margins.index]
        for team in combinations(NAMES, 2):
            found = [
                members
                for members in rows.loc[(attack, split)].index.levels[0]
                if set(members.split("+")) == set(team)
            ]
            for how, name in pool.items():
                row = next(
                    rows.loc[(attack, split, one, how)]
                    for one in found
                    if (attack, split, one, how) in rows.index
                )
                refused = margins[list(team)].agg(name, axis=1) > threshold
                assert row["observed_refusal_rate"] == pytest.approx(refused[harmful].mean())
                assert row["observed_over_refusal_rate"] == pytest.approx(refused[~harmful].mean())
    assert not rows.index.duplicated().any()


def test_controls_and_the_undefended_model_are_in_no_ensemble(place: Path) -> None:
    rows = pd.read_csv(place / "out" / "ensembles.csv")
    teams = rows.loc[rows["how"] != "alone", "members"].str.split("+").explode()
    assert set(teams) == set(NAMES)
    assert {"none", "random_tokens"} < set(rows.loc[rows["how"] == "alone", "members"])


def test_a_stack_is_scored_as_alone_and_predicted_from_its_members(kept: Path) -> None:
    result = run_cli(
        "-d",
        "policy+word_drop",
        "-d",
        "policy",
        "-d",
        "word_drop",
        "-m",
        kept / "toy",
        "--limit",
        24,
        "--responses",
        "none",
        "-o",
        kept / "one",
    )
    assert result.code == 0, result.err
    alone = pd.read_csv(kept / "one" / "scores.csv").pivot_table("margin", "query", "defense")
    scores = pd.read_csv(kept / "out" / "scores.csv")
    mine = scores[(scores["attack"] == "direct") & (scores["split"] == "test")].pivot_table(
        "margin", "query", "defense"
    )
    pd.testing.assert_frame_equal(alone, mine[alone.columns], atol=1e-4, check_exact=False)
    rows = pd.read_csv(kept / "out" / "ensembles.csv").set_index(["attack", "split", "members", "how"])
    row = rows.loc["direct", "test", "policy+word_drop", "stack"]
    # The prediction comes from the members on the calibration split.
    direct = scores[(scores["attack"] == "direct") & (scores["split"] == "calibration")]
    half = direct.pivot_table("margin", "query", "defense")
    change = half["policy"] + half["word_drop"] - 2 * half["none"]
    is_harmful = scores.drop_duplicates("query").set_index("query")["harmful"]
    for side, moved in (("predicted", change), ("observed", alone["policy+word_drop"] - alone["none"])):
        harmful = is_harmful.loc[moved.index]
        by_class = moved[harmful].mean(), moved[~harmful].mean()
        assert row[f"{side}_shift"] == pytest.approx(sum(by_class) / 2, abs=1e-4)
        assert row[f"{side}_discrimination"] == pytest.approx(by_class[0] - by_class[1], abs=1e-4)
    assert row["interaction_shift_low"] <= row["interaction_shift"] <= row["interaction_shift_high"]


def test_named_random_and_promising_stacks_are_run_and_the_others_only_predicted(place: Path) -> None:
    rows = pd.read_csv(place / "out" / "ensembles.csv")
    stacks = rows[(rows["how"] == "stack") & (rows["attack"] == "direct") & (rows["split"] == "calibration")]
    # Six pairs, and the user's own order of one of them.
    assert len(stacks) == 7 and stacks["predicted_shift"].notna().all()
    ran = set(stacks.loc[stacks["observed_shift"].notna(), "members"])
    assert "policy+word_drop" in ran and "word_drop+policy" in set(stacks["members"])
    assert len(ran) == 5  # the named one, two random ones, then two promising ones
    # The named and the random ones decided by which prediction the promising ones were selected.
    predictor = json.loads((place / "out" / "run.json").read_text())["stack_predictor"]
    assert predictor["measured_stacks"] == 3 and predictor["name"] in STACK_PREDICTORS
    fit = pd.read_csv(place / "out" / "predictors.csv")
    assert set(fit["how"]) == {"stack"} and set(fit["n"]) == {5}
    assert set(fit["predictor"]) == {*STACK_PREDICTORS, SAME_ON_CALIBRATION}
    assert (fit[fit["is_best"]].groupby(["attack", "split", "outcome"]).size() == 1).all()
    interacting = pd.read_csv(place / "out" / "interacting.csv")
    assert set(interacting["members"]) == ran and len(interacting) == 2 * 5 * 5


def test_single_defenses_have_the_same_estimates_in_ensembles_and_summary(place: Path) -> None:
    rows = pd.read_csv(place / "out" / "ensembles.csv").set_index(["attack", "split", "members", "how"])
    summary = pd.read_csv(place / "out" / "summary.csv").set_index(["attack", "defense"])
    for (attack, name), want in summary.iterrows():
        how = "stack" if "+" in name else "alone"
        row = rows.loc[attack, "test", name, how]
        for coordinate in ENSEMBLE_COORDINATES:
            for end in ("", "_low", "_high"):
                assert row[f"observed_{coordinate}{end}"] == pytest.approx(
                    want[f"{coordinate}{end}"], abs=1e-6
                )


def test_the_recommendation_is_the_certified_candidate_that_refuses_most_harmful_queries(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.studies.ensembles._MAX_ROWS_WITH_INTERVALS", 0)
    args = [f"-d{name}" for name in NAMES]
    limits = ["--max-over-refusal", "90%", "-o", kept / "rec", "--json", "--stacks", 1]
    result = run_cli("recommend", "-m", kept / "toy", *args, *SHORT[:2], *limits)
    assert result.code == 0, result.err
    told = json.loads(result.out)
    found = pd.read_csv(kept / "rec" / "recommendation.csv")
    assert [one["role"] for one in told] == found["role"].tolist()
    first = found.iloc[0]
    certification = pd.read_csv(kept / "rec" / "certification.csv")
    assert "fitted" not in set(certification["how"])
    by_responses = certification["how"].isin(["alone", "stack"])
    assert (by_responses == (certification["based_on"] == "responses")).all() and by_responses.any()
    # What was tested follows from the scores: benign calibration queries that did not decide the order.
    scores = pd.read_csv(kept / "rec" / "scores.csv")
    record = json.loads((kept / "rec" / "run.json").read_text())
    n_benign = scores.loc[~scores["harmful"] & (scores["split"] == "calibration"), "query"].nunique()
    n_tested = certification["n_tested"].iloc[0]
    assert 0.6 * n_benign < n_tested < n_benign
    tested = certification[certification["p_value"].notna()]
    assert binom.cdf(tested["n_refused"], n_tested, 0.9).tolist() == pytest.approx(tested["p_value"].tolist())
    assert certification.loc[certification["p_value"].isna(), "n_refused"].isna().all()
    assert ((tested["p_value"] <= 0.1) == (tested["status"] == "certified")).all()
    assert (tested["status"] == "failed").sum() <= 1 and len(tested) >= 1
    assert record["guarantee"].startswith("In at least 90 of 100 calibration samples")
    candidates = pd.read_csv(kept / "rec" / "candidates.csv").set_index(["members", "how"])
    certified = certification[certification["status"] == "certified"]
    assert first["role"] == ("recommended" if len(certified) else "closest")
    if len(certified):
        rates = candidates.loc[pd.MultiIndex.from_frame(certified[["members", "how"]]), "harmful_calibration"]
        assert first["harmful_calibration"] == rates.max() and first["certified"]
    # Rates on the test split: by the margins of votes, otherwise by the responses.
    for row in found.to_dict("records"):
        if row["based_on"] == "margins":
            assert row["over_refusal"] == pytest.approx(1 - row["benign_test"])
            assert row["harmful"] == pytest.approx(row["harmful_test"])
    assert first["over_refusal_low"] <= first["over_refusal"] <= first["over_refusal_high"]
    # Jeffreys' interval of a share: its probability to be below the limit follows the same draws.
    assert (first["p_meets"] > 0.975) == (first["over_refusal_high"] < 0.9) or 0.02 < first["p_meets"] < 0.98


def test_ensembles_of_three_are_recommended_under_attack_within_a_cost(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.studies.ensembles._MAX_ROWS_WITH_INTERVALS", 0)
    args = [
        *(f"-d{name}" for name in NAMES),
        "--limit",
        24,
        "--attack",
        "persona",
        "--size",
        3,
        "--stacks",
        1,
    ]
    limits = ["--max-over-refusal", "100%", "--max-cost", "2.5", "--responses", "none"]
    result = run_cli("recommend", "-m", kept / "toy", *args, *limits, "-o", kept / "three")
    assert result.code == 0, result.err
    rows = pd.read_csv(kept / "three" / "ensembles.csv")
    assert set(rows["attack"]) == {"direct", "persona"}  # how users ask is always measured, too
    three = rows[(rows["size"] == 3) & (rows["attack"] == "direct") & (rows["split"] == "test")]
    assert three.groupby("how").size().to_dict() == dict.fromkeys([*VOTE_RULES, "stack"], 4)
    found = pd.read_csv(kept / "three" / "candidates.csv")
    first = pd.read_csv(kept / "three" / "recommendation.csv").iloc[0]
    assert first["cost"] <= 2.5 < found["cost"].max()
    certification = pd.read_csv(kept / "three" / "certification.csv")
    affordable = found[(found["cost"] <= 2.5) & (found["how"] != "fitted")]
    assert len(certification) == len(affordable)
    assert set(certification["status"]) <= {"certified", "not needed"}  # no rate exceeds 100 %
    certified = certification[certification["status"] == "certified"].merge(found, on=["members", "how"])
    assert first["harmful_calibration"] == certified["harmful_calibration"].max()
    both = rows[
        (rows["members"] == first["members"]) & (rows["how"] == first["how"]) & (rows["split"] == "test")
    ]
    assert first["harmful"] == pytest.approx(both["observed_refusal_rate"].mean()) and len(both) == 2
    said = " ".join(result.out.split())
    assert "Use " in said and "refuse more than 100% of new benign queries of this kind." in said
    assert "by first-token margins, not by judged responses" in said
    assert set(certification["based_on"]) == {"margins"}


def test_defenses_and_stacks_refuse_where_their_judged_responses_do_and_votes_by_margins(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = RuleJudge(
        "length of the query", lambda text, query: VERDICTS[len(query) % 3], lambda partial: False
    )
    monkeypatch.setattr("analysis.studies.recommend.RESPONSE_JUDGE", judge)
    spec = replace(make_spec(kept), max_responses=None)
    ensemble_run = score_ensembles(
        spec, ["policy", "word_drop", "policy+word_drop"], [], 2, 0, rank_promising_stacks, Console()
    )
    attack, scores = ensemble_run.setup.attacks[0], ensemble_run.split_scores["direct", "calibration"]
    is_benign = ~scores.margin_table.is_harmful
    refusals = CandidateRefusals(ensemble_run, spec, Console(quiet=True))
    stack = refusals.read_refusals("policy+word_drop", "stack", attack, "calibration", is_benign)
    texts = {query.id: query.text for query in ensemble_run.setup.query_set.queries}
    ids = ensemble_run.scores["calibration"].select_condition("direct", "none").index[is_benign]
    # A response without a verdict counts as a refusal.
    expected = [len(texts[name]) % 3 != 0 for name in ids]
    assert stack.tolist() == expected and 0 < sum(expected) < len(expected)
    vote = refusals.read_refusals("policy+word_drop", "highest", attack, "calibration", is_benign)
    assert (
        vote.tolist() == (scores.get_member_margins(["policy", "word_drop"])[is_benign].max(1) > 0).tolist()
    )
    few = replace(refusals, spec=replace(spec, max_responses=5))
    assert few.select_answered("calibration", is_benign).sum() == 5
    assert not (few.select_answered("calibration", is_benign) & ~is_benign).any()
    none = replace(refusals, spec=replace(spec, max_responses=0))
    alone = none.read_refusals("policy", "alone", attack, "calibration", is_benign)
    assert alone.tolist() == (scores.get_member_margins(["policy"])[is_benign, 0] > 0).tolist()


def test_costs_are_cached(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    measure = time_conditions
    monkeypatch.setattr(
        "analysis.studies.cost.time_conditions",
        lambda session, conditions, *rest: timed.extend(conditions) or measure(session, conditions, *rest),
    )
    first = score_ensembles(
        make_spec(kept), ["policy", "tone_reminder"], [], 2, 0, rank_promising_stacks, Console()
    )
    assert "policy" not in timed and set(timed) <= {"none", "tone_reminder"}
    timed.clear()
    again = score_ensembles(
        make_spec(kept), ["policy", "tone_reminder"], [], 2, 0, rank_promising_stacks, Console()
    )
    assert not timed
    pd.testing.assert_frame_equal(first.costs, again.costs, check_dtype=False)


def test_if_nothing_is_certified_the_closest_candidate_and_its_need_of_queries_are_returned(
    kept: Path,
) -> None:
    ensemble_run = score_ensembles(
        make_spec(kept), NAMES, [], 2, 0, rank_promising_stacks, Console(), None, 0.25
    )
    found = ensemble_run.list_candidates()
    found = found[found["how"] != "fitted"].assign(
        benign_calibration=lambda frame: np.linspace(0.5, 0.96, len(frame))
    )
    limits = RecommendationLimits(0.1)
    refusals = CandidateRefusals(ensemble_run, make_spec(kept), Console(quiet=True))
    certification = certify_ensembles(ensemble_run, found, limits, refusals).assign(status="failed")
    first = select_recommendations(ensemble_run, found, certification, limits, refusals).iloc[0]
    assert first["role"] == "closest" and not first["certified"]
    assert first["members"] == found.iloc[-1]["members"]
    tested_share = certification["n_tested"].iloc[0] / ensemble_run.calibration_scores.class_sizes[1]
    assert first["n_benign_needed"] == np.ceil(count_queries_needed(0.04, 0.1) / tested_share)
    strict = RecommendationLimits(0.03)
    first = select_recommendations(ensemble_run, found, certification, strict, refusals).iloc[0]
    assert np.isnan(first["n_benign_needed"])  # at 4 %, no number of queries shows at most 3 %


def test_a_defense_that_fails_is_left_out_and_reported(kept: Path) -> None:
    file = kept / "broken.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom defenses import Defense\n@dataclass(frozen=True)\n"
        "class Broken(Defense):\n    '''Breaks.'''\n    def rewrite(self, chat, rng):\n        return 1 / 0\n"
    )
    args = ["-d", file, "-d", "policy", "-d", "self_reminder", "--limit", 24, "-o", kept / "broken"]
    result = run_cli("ensembles", "-m", kept / "toy", *args)
    assert (
        result.code == 1 and "Failed: broken: prompts: " in result.err and "ZeroDivisionError" in result.err
    )
    rows = pd.read_csv(kept / "broken" / "ensembles.csv")
    assert set(rows.loc[rows["how"] != "alone", "members"]) == {"policy+self_reminder"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("ensembles", "-dpolicy"), "only policy is left to combine, and it takes 2"),
        (("ensembles", "--size", "4"), "--size 4: an ensemble has 2 or 3 members"),
        (("ensembles", "--stacks", "-1"), "--stacks -1: it takes 0"),
        (("ensembles", "--readout", "all"), "--readout all: a run uses one"),
        (("ensembles", "-dpolicy+polcy"), "unknown defense 'polcy'"),
        (
            ("recommend", "--max-over-refusal", "5"),
            "--max-over-refusal 5: it takes a share, such as 5% or 0.05",
        ),
        (("recommend", "--max-over-refusal", "many"), "it takes a share"),
        (
            ("recommend", "--max-over-refusal", "5%", "--max-cost", "0.5"),
            "--max-cost 0.5: the undefended model costs 1",
        ),
        (("recommend",), "Missing option"),
        (("ensembles", "--overlap", "nowhere"), "--overlap nowhere: there is no profiles.csv or overlap.csv"),
    ],
)
def test_bad_input_is_a_one_line_error(kept: Path, args: tuple[str, ...], words: str) -> None:
    result = run_cli(*args, "-m", kept / "toy", "--limit", 24)
    (line,) = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert result.code == 2 and words in line


def test_the_overlap_is_read_from_a_folder_or_a_file_and_needs_its_columns(tmp_path: Path) -> None:
    overlap = pd.DataFrame({"defense": ["a"], "other": ["b"], "contrast": ["shift"], "cosine": [0.5]})
    overlap.to_csv(tmp_path / "profiles.csv", index=False)
    for path in (tmp_path, tmp_path / "profiles.csv"):
        pd.testing.assert_frame_equal(load_overlap(path), overlap, check_dtype=False)
    overlap.drop(columns="cosine").to_csv(tmp_path / "profiles.csv", index=False)
    with pytest.raises(UserError, match="lacks the columns cosine"):
        load_overlap(tmp_path)


def test_data_without_splits_are_split_at_random_with_pairs_kept_whole(tmp_path: Path) -> None:
    shipped = load_queries("twins").select_split("test").queries
    rows = "".join(f'"{q.text}",{q.harmful},{q.pair},{q.category}\n' for q in shipped)
    file = tmp_path / "mine.csv"
    file.write_text("text,harmful,pair,category\n" + rows)
    mine = load_queries(str(file))
    halved = mine.split_calibration_test(0)
    counts = pd.DataFrame(
        [(q.split, q.harmful, q.category, q.pair) for q in halved.queries], columns=list("shcp")
    )
    assert (counts.groupby(["s", "h"]).size() == len(shipped) // 4).all()
    assert (counts.groupby("p")["s"].nunique() == 1).all()
    assert (counts.groupby(["c", "s"]).size().unstack().diff(axis=1).iloc[:, -1].abs() <= 2).all()
    assert [q.split for q in mine.split_calibration_test(0).queries] == [q.split for q in halved.queries]
    assert [q.split for q in mine.split_calibration_test(1).queries] != [q.split for q in halved.queries]
    both = RunSpec("toy", str(file), BOTH_SPLITS, 12, None, "cpu", "auto", 0, True).select_queries()[0]
    assert pd.Series([q.split for q in both.queries]).value_counts().to_dict() == {
        "calibration": 12,
        "test": 12,
    }
    assert {q.split for q in load_queries("contrast").split_calibration_test(0).queries} == {
        "calibration",
        "test",
    }


def test_training_queries_are_in_neither_half_and_unsplit_ones_of_a_joined_set_in_both(
    tmp_path: Path,
) -> None:
    own = [Query(f"q{n}", f"How do I {n}?", n % 2 == 0, split=("train", "test")[n > 20]) for n in range(60)]
    data = QuerySet("own", tuple(own), "x")
    halved = data.split_calibration_test(0)
    assert {q.id for q in halved.queries} == {q.id for q in own if q.split == "test"}
    assert {q.split for q in halved.queries} == {"calibration", "test"}
    shipped = load_queries("twins")
    loose = tuple(Query(f"x{n}", f"What is {n}?", n % 2 == 0) for n in range(20))
    both = QuerySet("both", (*shipped.queries, *loose), "x").split_calibration_test(0)
    sides = pd.DataFrame(
        [(q.split, q.harmful) for q in both.queries if q.id[0] == "x"], columns=["split", "harmful"]
    )
    assert sides.groupby(["split", "harmful"]).size().tolist() == [5, 5, 5, 5]
    kept = {q.id: q.split for q in both.queries}
    assert all(kept[q.id] == q.split for q in shipped.queries if q.split != "train")


def test_too_few_defenses_are_an_error(kept: Path) -> None:
    with pytest.raises(UserError, match="it takes 2"):
        score_ensembles(
            make_spec(kept),
            ["policy", "random_tokens"],
            ["length=9"],
            2,
            1,
            rank_promising_stacks,
            Console(),
        )
