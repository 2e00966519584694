"""Stacks: members act from left to right, each as it acts alone, and a batch equals its single queries."""

import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import (
    derive_readout,
    make_adapter,
    make_mean_activations,
    make_toy_session,
    render_query,
    tiny_model,
    toy_tokenizer,
)

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.models.session import generate_responses
from analysis.readouts.prompt_scores import score_prompts
from analysis.run import build_conditions, score_condition
from analysis.studies.manifest import describe_defense
from analysis.studies.preflight import check_condition
from defenses.adapters import load_adapter
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import get_defense
from defenses.chats import copy_chat, get_last_user_text
from defenses.contract import Defense, ModelInfo
from defenses.decoding import SafeDecoding
from defenses.errors import UserError
from defenses.rng import QueryRng
from defenses.stack import Stack, list_members
from defenses.tuning import SafetyTuning

QUERIES = sample_queries(load_queries("twins").queries, 4)
UNDEFENDED = get_defense("none")


@pytest.fixture(scope="module")
def session():
    """A toy model; tests do not change it."""
    return make_toy_session()


@pytest.fixture(scope="module")
def readout(session):
    """The words readout of the toy model."""
    return derive_readout(session, QUERIES, UNDEFENDED)


@pytest.fixture(scope="module")
def model_info(tmp_path_factory):
    """The properties of the toy model."""
    folder = tmp_path_factory.mktemp("secrets")
    return ModelInfo(
        "toy", toy_tokenizer(), (folder,), (), "toy", compute_mean_activations=make_mean_activations
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A defense with tuned weights."""
    return SafetyTuning(adapter=load_adapter(make_adapter(tmp_path_factory.mktemp("a") / "x", seed=3)))


def render_chats(session, defense, queries=QUERIES):
    """Return the chats of each query."""
    return [
        [prompt.chat for prompt in prompts]
        for prompts in session.render_prompts(defense, DIRECT_ATTACK.build_query_chats(queries))
    ]


def render_requests(session, name):
    """Return the last user turns of each query under a defense."""
    chats = render_chats(session, get_defense(name))
    return [[get_last_user_text(chat) for chat in copies] for copies in chats]


def score_margins(session, readout, defense, queries=QUERIES):
    """Return the margins of the queries."""
    return score_condition(session, defense.name, defense, queries, readout)["margin"].tolist()


# --- prompts ----------------------------------------------------------------------------------------------


def test_the_left_member_acts_first(session, readout):
    tone_first, policy_first = get_defense("tone_reminder+policy"), get_defense("policy+tone_reminder")
    tone, policy = get_defense("tone_reminder").get_reminder(), get_defense("policy").get_reminder()
    for (chat,), (other_chat,) in zip(
        render_chats(session, tone_first), render_chats(session, policy_first), strict=True
    ):
        assert chat[0]["content"] == f"{policy}\n\n{tone}"
        assert other_chat[0]["content"] == f"{tone}\n\n{policy}"
    assert score_margins(session, readout, tone_first) != score_margins(session, readout, policy_first)


@pytest.mark.parametrize("name", ["word_drop+self_reminder", "smooth_llm+policy", "paraphrase+smooth_llm"])
def test_a_batch_equals_its_single_queries(session, readout, name):
    settings = {"copies": "3"} if "smooth_llm" in name else {}
    stack = get_defense(name, settings | ({"tokens": "8"} if "paraphrase" in name else {}))
    batch = render_chats(session, stack)
    assert batch == [render_chats(session, stack, [query])[0] for query in QUERIES]
    single_margins = [score_margins(session, readout, stack, [query])[0] for query in QUERIES]
    assert score_margins(session, readout, stack) == pytest.approx(single_margins, abs=1e-4)
    assert len({len(copies) for copies in batch}) == 1


def test_every_member_draws_the_random_numbers_that_it_draws_alone(session):
    alone = render_requests(session, "smooth_llm")
    assert alone == render_requests(session, "smooth_llm+tone_reminder")
    assert alone == render_requests(session, "policy+smooth_llm")
    assert all(len(set(copies)) == 10 for copies in alone)


def test_tokens_are_split_as_alone_and_differently_in_every_copy(session, model_info):
    (alone,) = render_query(session, get_defense("retokenization").prepare(model_info), QUERIES[0])
    stack = get_defense("retokenization+policy").prepare(model_info)
    (stacked,) = render_query(session, stack, QUERIES[0])
    undefended = render_query(session, UNDEFENDED, QUERIES[0])[0]
    assert stacked.ids[-len(alone.ids) :] == alone.ids != undefended.ids
    # Very little noise, so that the texts of the copies differ in one character only.
    stack = get_defense("smooth_llm+retokenization", {"copies": "4", "smooth_llm.rate": "0.001"})
    copies = render_query(session, stack.prepare(model_info), QUERIES[0])
    assert len({prompt.ids for prompt in copies}) == 4
    assert len({len(prompt.ids) for prompt in copies}) > 1


def test_a_member_rewrites_every_copy_and_all_calls_are_batched():
    session, batch_sizes = make_toy_session(), []
    complete_calls = session.defense_calls.complete_calls

    def record_calls(calls):
        batch_sizes.append(len(calls))
        return complete_calls(calls)

    session.defense_calls.complete_calls = record_calls
    stack = get_defense("smooth_llm+paraphrase", {"copies": "3", "tokens": "8"})
    assert [len(copies) for copies in render_chats(session, stack)] == [3] * len(QUERIES)
    assert batch_sizes == [3 * len(QUERIES)]


@dataclass(frozen=True)
class TwoCopies(Defense):
    """Returns two copies without declaring it."""

    def rewrite(self, chat, rng):
        return copy_chat(chat)

    def rewrite_copies(self, chat, rng):
        return [self.rewrite(chat, rng)] * 2


def test_copies_with_different_pooling_cannot_be_combined(session, model_info):
    message = "smooth_llm pools its copies by their mean and erase_and_check pools its copies by their max"
    with pytest.raises(UserError, match=message):
        get_defense("smooth_llm+erase_and_check")
    stack = Stack((TwoCopies(), get_defense("erase_and_check"))).prepare(model_info)
    message = "two_copies pools its copies by their mean and erase_and_check by their max"
    with pytest.raises(UserError, match=message):
        render_chats(session, stack)
    stack = get_defense("word_drop+erase_and_check", {"tokens": "3"}).prepare(model_info)
    assert stack.pool == "max" and {len(copies) for copies in render_chats(session, stack)} <= {3, 4}


def test_a_stack_passes_the_preflight_under_an_attack(model_info):
    session = make_toy_session()
    readout = derive_readout(session, QUERIES, UNDEFENDED)
    checks_by_stack = {
        name: check_condition(
            session, name, get_defense(name).prepare(model_info), QUERIES[:2], readout, get_attack("prefill")
        )
        for name in ("word_drop+self_reminder", "policy+refusal_steering")
    }
    for checks in checks_by_stack.values():
        assert not [check for check in checks if not check.passed]
    assert "user's words survive" in {check.name for check in checks_by_stack["policy+refusal_steering"]}


# --- models -----------------------------------------------------------------------------------------------


def test_all_members_are_applied_and_the_model_is_restored_bit_for_bit(model_info, weights):
    model, steering = tiny_model(), get_defense("refusal_steering").prepare(model_info)

    def compute_logits():
        with torch.no_grad():
            return model(input_ids=torch.tensor([[5, 6, 7]])).logits

    before = compute_logits()
    with weights.apply_to(model), steering.apply_to(model):
        expected = compute_logits()
    with Stack((weights, steering)).apply_to(model):
        assert torch.equal(compute_logits(), expected)
    assert torch.equal(compute_logits(), before) and not torch.equal(expected, before)


def test_the_fingerprint_of_a_stack_is_that_of_its_only_change_or_of_all_changes(model_info, weights):
    steering = get_defense("refusal_steering").prepare(model_info)
    policy = get_defense("policy")
    assert Stack((policy, weights)).weights_fingerprint() == weights.weights_fingerprint()
    assert Stack((policy, get_defense("word_drop"))).weights_fingerprint() == ""
    assert Stack((weights, steering)).weights_fingerprint() not in (
        weights.weights_fingerprint(),
        steering.weights_fingerprint(),
        Stack((steering, weights)).weights_fingerprint(),
        None,
    )


def test_a_user_defined_change_without_a_fingerprint_is_not_cacheable():
    @dataclass(frozen=True)
    class Mine(Defense):
        def rewrite(self, chat, rng):
            return copy_chat(chat)

        @contextmanager
        def apply_to(self, model):
            yield

    stack = Stack((get_defense("policy"), Mine()))
    assert stack.is_user_defined
    assert stack.weights_fingerprint() is None and stack.cacheable_fingerprint() is None


def test_a_blend_in_a_stack_combines_its_models_on_the_prompts_of_the_other_members(
    session, readout, weights
):
    policy = get_defense("policy")
    blend = SafeDecoding(alpha=3.0, adapter=weights.adapter)
    model_margins = score_margins(session, readout, policy)
    expert_margins = score_margins(session, readout, Stack((policy, weights)))
    expected = [
        model + 3 * (expert - model) for model, expert in zip(model_margins, expert_margins, strict=True)
    ]
    for stack in (Stack((policy, blend)), Stack((blend, policy))):
        assert score_margins(session, readout, stack) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(model_margins, abs=1e-2)
    responses = generate_responses(
        session, Stack((policy, blend)), DIRECT_ATTACK.build_query_chats(QUERIES[:2]), max_new_tokens=3
    )
    assert all(len(response.ids) == 3 for copies in responses for response in copies)


def test_a_blend_of_one_model_is_scaled_by_its_weight(session, readout):
    @dataclass(frozen=True)
    class Twice(Defense):
        def rewrite(self, chat, rng):
            return copy_chat(chat)

        def logit_blend(self):
            return ((2.0, UNDEFENDED),)

    expected = [2 * margin for margin in score_margins(session, readout, UNDEFENDED)]
    assert score_margins(session, readout, Twice()) == pytest.approx(expected, abs=1e-4)


# --- attributes -------------------------------------------------------------------------------------------


def test_secrets_requirements_and_training_queries_are_those_of_all_members(model_info):
    backdoor = Backdoor(secret=Secret("tulip seven harbor"))
    steering = get_defense("refusal_steering").prepare(model_info)
    stack = Stack((get_defense("policy"), backdoor, steering))
    assert stack.secret_texts() == ("tulip seven harbor",)
    assert stack.trained_on() == {"a query"}
    assert "backdoor: no tuned weights" in stack.missing_requirements() and build_conditions([stack]) == {}
    description = describe_defense(stack)
    assert list(description["members"]) == ["policy", "backdoor", "refusal_steering"]
    assert "tulip" not in f"{description} {stack!r}" and description["members"]["backdoor"]["secrets"]
    assert list_members(stack) == stack.members and list_members(UNDEFENDED) == (UNDEFENDED,)


def test_the_cost_of_a_stack_is_that_of_its_most_expensive_member():
    assert get_defense("policy+tone_reminder").cost == "static"
    assert get_defense("policy+paraphrase+safety_tuning").cost == "one call"
    assert get_defense("safety_tuning+policy").cost == "weights"


def test_a_stack_of_texts_scores_as_one_defense_with_the_same_text(session, readout):
    stack, policy = get_defense("tone_reminder+policy"), get_defense("policy")
    combined = replace(policy, text=f"{policy.text}\n\n{get_defense('tone_reminder').get_reminder()}")
    stack_scores, combined_scores = (
        score_prompts(
            session.loaded_model,
            session.engine,
            defense,
            [prompt.ids for prompt in render_query(session, defense, QUERIES[0])],
            readout,
        )
        for defense in (stack, combined)
    )
    assert torch.equal(stack_scores, combined_scores)


# --- random numbers ---------------------------------------------------------------------------------------


def test_the_generator_of_a_stack_can_be_copied():
    rng = QueryRng("0/query", "word_drop")
    rng.random()
    duplicate = copy.deepcopy(rng)
    assert duplicate.random() == rng.random()
    assert duplicate.get_member_rng("policy").random() == rng.get_member_rng("policy").random()


def test_a_stack_rewrites_with_any_generator():
    stack, chat = get_defense("word_drop+policy"), [{"role": "user", "content": "How do I bake good bread?"}]
    assert stack.rewrite(chat, random.Random(3)) == stack.rewrite(chat, random.Random(3))
