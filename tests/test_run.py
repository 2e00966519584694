"""The straight line, on a random model: margins are means of readings, the same each time, for parts too."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import FOUR, derive_readout, make_toy_session, render_query
from scipy.special import expit

from analysis import run
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.models.session import ModelSession
from analysis.readouts.readout import Readout
from analysis.run import build_conditions, iterate_condition_scores, score_condition
from analysis.stats.tables import SCORE_COLUMNS
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import get_defense
from defenses.contract import Chat, Defense
from defenses.errors import UserError
from defenses.images import QueryImage, replace_last_image

ASKED = sample_queries(load_queries("twins").queries, 6)
READOUT = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0), threshold=0.5)
NONE = get_defense("none")


@dataclass(frozen=True)
class Shuffling(Defense):
    """Reads several shuffled copies of the words, as SmoothLLM does."""

    family = "noise"
    copies: int = 3

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        words = chat[0]["content"].split()
        rng.shuffle(words)
        return [{"role": "user", "content": " ".join(words)}]

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        return [self.rewrite(chat, rng) for _ in range(self.copies)]


@pytest.mark.parametrize("template", FOUR)
def test_a_margin_is_the_mean_over_the_readings_each_read_by_itself(template: str) -> None:
    bench, defense = make_toy_session("qwen2", template), Shuffling()
    frame = score_condition(bench, "shuffling", defense, ASKED, READOUT)
    for row, query in enumerate(ASKED):
        prompts = render_query(bench, defense, query)
        alone = [
            bench.engine.read_first_token([prompt.ids], READOUT.compute_margins)[0] for prompt in prompts
        ]
        assert len({prompt.ids for prompt in prompts}) > 1
        assert frame["margin"][row] == pytest.approx(float(sum(one[0] for one in alone)) / 3, abs=1e-4)
        assert frame["coverage"][row] == pytest.approx(float(sum(one[1] for one in alone)) / 3, abs=1e-4)
        assert frame["prompt_tokens"][row] == sum(len(prompt.ids) for prompt in prompts)
    assert set(frame["readings"]) == {3}


def test_the_columns_are_those_of_scores_csv_and_readings_only_where_there_are_several() -> None:
    frame = score_condition(make_toy_session(), "none", NONE, ASKED, READOUT)
    assert list(frame.columns) == list(SCORE_COLUMNS)
    assert list(frame["query"]) == [query.id for query in ASKED]
    assert list(frame["harmful"]) == [query.harmful for query in ASKED]
    assert list(frame["p_refuse"]) == pytest.approx(list(expit(frame["margin"] - 0.5)))


@dataclass(frozen=True)
class WithoutImage(Defense):
    """Removes the image, so that a model of texts can read the query."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return replace_last_image(chat, None)


def test_scores_have_the_digest_of_the_image_if_any_query_has_one() -> None:
    image = QueryImage("a.png", "0" * 64, lambda: None)
    queries = [replace(ASKED[0], image=image), *ASKED[1:]]
    frame = score_condition(make_toy_session(), "without_image", WithoutImage(), queries, READOUT)
    assert list(frame.columns) == [*SCORE_COLUMNS, "image"]
    assert list(frame["image"].fillna("")) == ["0" * 64] + [""] * 5


def test_an_answer_prefix_goes_behind_every_prompt() -> None:
    bench = make_toy_session()
    longer = Readout("words", READOUT.tokens, READOUT.ids, READOUT.weights, response_prefix=(301, 302))
    frame = score_condition(bench, "none", NONE, ASKED, longer)
    for row, query in enumerate(ASKED):
        (prompt,) = render_query(bench, NONE, query)
        alone = bench.engine.read_first_token([(*prompt.ids, 301, 302)], READOUT.compute_margins)[0, 0]
        assert frame["margin"][row] == pytest.approx(float(alone), abs=1e-4)
        assert frame["prompt_tokens"][row] == len(prompt.ids) + 2


def test_randomness_hangs_on_seed_query_and_defense_and_on_nothing_else() -> None:
    def ids(seed: int, query: Query, defense: Defense) -> list[tuple[int, ...]]:
        bench = ModelSession.from_model(make_toy_session().loaded_model, seed=seed)
        return [prompt.ids for prompt in render_query(bench, defense, query)]

    class Other(Shuffling):
        """Shuffles under another name."""

    one, two = ASKED[0], Query("another", ASKED[0].text, True)
    assert ids(1, one, Shuffling()) == ids(1, one, Shuffling())
    random.seed(3)
    assert ids(1, one, Shuffling()) == ids(1, one, Shuffling())
    assert ids(1, one, Shuffling()) != ids(2, one, Shuffling())
    assert ids(1, one, Shuffling()) != ids(1, two, Shuffling())
    assert ids(1, one, Shuffling()) != ids(1, one, Other())


def test_the_same_run_gives_the_same_numbers_also_for_fewer_queries_in_another_order() -> None:
    bench, defense = make_toy_session(), Shuffling()
    frame = score_condition(bench, "shuffling", defense, ASKED, READOUT).set_index("query")["margin"]
    again = score_condition(bench, "shuffling", defense, ASKED, READOUT).set_index("query")["margin"]
    some = score_condition(bench, "shuffling", defense, ASKED[3::-1], READOUT).set_index("query")["margin"]
    assert frame.equals(again)
    assert list(some) == pytest.approx(list(frame[some.index]), abs=1e-4)


def test_a_prompt_longer_than_the_context_is_an_error_that_names_query_and_limit() -> None:
    long = Query("q1", "word " * 1100, True)
    with pytest.raises(
        UserError, match=r"'q1' under 'none' makes a prompt of \d+ tokens, and toy reads 2048"
    ):
        render_query(make_toy_session(), NONE, long)


@dataclass(frozen=True)
class Raising(Defense):
    """A user's own defense with a mistake in it."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        raise IndexError("list index out of range")


def test_a_users_defense_that_raises_is_the_users_mistake_and_ours_is_ours() -> None:
    with pytest.raises(UserError, match=r"'raising' raised IndexError on query '.*': list index"):
        render_query(make_toy_session(), Raising(), ASKED[0])

    class Ours(Raising):
        """One of the shipped families."""

        family = "reminders"

    Ours.__module__ = "defenses.reminders"
    with pytest.raises(IndexError):
        render_query(make_toy_session(), Ours(), ASKED[0])


def test_parts_are_scored_behind_the_whole_and_differ_from_it() -> None:
    bench = make_toy_session()
    chosen = [NONE, Backdoor(secret=Secret("tulip seven harbor"))]
    scored = dict(iterate_condition_scores(bench, build_conditions(chosen), ASKED, READOUT))
    assert (
        list(scored) == list(build_conditions(chosen)) == ["none", "backdoor/no_weights", "backdoor/neither"]
    )
    margins = [tuple(frame["margin"]) for frame in scored.values()]
    assert len(set(margins)) == 3
    assert [set(frame["defense"]) for frame in scored.values()] == [{name} for name in scored]


def test_conditions_are_yielded_as_they_are_finished() -> None:
    told: list[tuple[str, int]] = []
    steps = iterate_condition_scores(
        make_toy_session(),
        build_conditions([NONE, Shuffling()]),
        ASKED,
        READOUT,
        on_progress=lambda *news: told.append(news),
    )
    name, _ = next(steps)
    assert name == "none" and {one for one, _ in told} == {"none"}
    next(steps)
    assert sum(count for one, count in told if one == "none") == len(ASKED)
    assert {one for one, _ in told} == {"none", "shuffling"}


def test_progress_counts_queries_also_where_each_is_read_several_times() -> None:
    told: list[int] = []
    score_condition(make_toy_session(), "shuffling", Shuffling(), ASKED, READOUT, on_progress=told.append)
    assert sum(told) == len(ASKED)


def test_the_page_stays_a_page() -> None:
    assert len(Path(str(run.__file__)).read_text("utf-8").splitlines()) < 210


@pytest.mark.embedded
def test_the_embedded_models_margins_are_those_of_plain_passes(smollm2: object) -> None:
    import torch

    from analysis.models.loading import LoadedModel

    assert isinstance(smollm2, LoadedModel)
    bench, defense = ModelSession.from_model(smollm2), get_defense("self_reminder")
    readout = derive_readout(bench, ASKED, NONE)
    frame = score_condition(bench, "self_reminder", defense, ASKED, readout)
    for margin, query in zip(frame["margin"], ASKED, strict=True):
        ids = torch.tensor([[*render_query(bench, defense, query)[0].ids, *readout.response_prefix]])
        with torch.inference_mode():
            logits = smollm2.model(input_ids=ids, use_cache=False).logits[:, -1]
        assert margin == pytest.approx(float(readout.compute_margins(logits)[0, 0]), abs=1e-4)
