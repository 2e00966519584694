"""Several defenses at once: left acts first, each as it acts alone, and the batch equals the single query."""

import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import derive_readout, held, made_adapter, tiny_model, toy_bench, toy_tokenizer

from analysis.attacks import choose_attacks
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.models.session import generate_responses
from analysis.run import build_conditions, score_condition, score_prompts
from analysis.studies.manifest import describe_defense
from analysis.studies.preflight import check_condition
from defenses.adapters import load_adapter
from defenses.backdoor import Backdoor, Secret
from defenses.catalog import choose_defenses, get_defense
from defenses.chats import get_last_user_text
from defenses.contract import Defense, ModelInfo
from defenses.decoding import SafeDecoding
from defenses.errors import UserError
from defenses.rng import QueryRng
from defenses.stack import Stack, list_members
from defenses.tuning import SafetyTuning

ASKED = sample_queries(load_queries("twins").queries, 6)
NONE = get_defense("none")


def host(folder):
    """Return a host with a toy tokenizer."""
    return ModelInfo("toy", toy_tokenizer(), (folder / "secrets",), (), "toy", compute_mean_activations=held)


def read(bench, defense, asked=ASKED):
    """Return the chats that the model reads, by query and reading."""
    return [[prompt.chat for prompt in prompts] for prompts in bench.render_queries(defense, asked)]


def margins(bench, defense, asked=ASKED):
    """Return the margins of the queries."""
    readout = derive_readout(bench, ASKED, NONE)
    return score_condition(bench, defense.name, defense, asked, readout)["margin"].tolist()


# --- what is read -----------------------------------------------------------------------------------------


def test_the_left_one_acts_first():
    bench = toy_bench()
    one, other = get_defense("tone_reminder+policy"), get_defense("policy+tone_reminder")
    tone, policy = get_defense("tone_reminder").get_reminder(), get_defense("policy").get_reminder()
    for (there,), (back,) in zip(read(bench, one), read(bench, other), strict=True):
        assert there[0]["content"] == f"{policy}\n\n{tone}"
        assert back[0]["content"] == f"{tone}\n\n{policy}"
    assert margins(bench, one) != margins(bench, other)


@pytest.mark.parametrize("name", ["word_drop+self_reminder", "smooth_llm+policy", "paraphrase+smooth_llm"])
def test_a_batch_equals_its_queries_one_by_one_and_each_reads_both_defenses(name):
    bench, stack = toy_bench(), get_defense(name, {"copies": "3"} if "smooth" in name else {})
    together = read(bench, stack)
    alone = [read(bench, stack, [query])[0] for query in ASKED]
    assert together == alone
    one_by_one = [margins(bench, stack, [query])[0] for query in ASKED]
    assert margins(bench, stack) == pytest.approx(one_by_one, abs=1e-4)
    assert len({len(readings) for readings in together}) == 1


def test_every_member_draws_what_it_draws_alone():
    bench = toy_bench()
    alone = [[get_last_user_text(chat) for chat in chats] for chats in read(bench, get_defense("smooth_llm"))]
    behind = [
        [get_last_user_text(chat) for chat in chats]
        for chats in read(bench, get_defense("smooth_llm+tone_reminder"))
    ]
    before = [
        [get_last_user_text(chat) for chat in chats]
        for chats in read(bench, get_defense("policy+smooth_llm"))
    ]
    assert alone == behind == before
    assert all(len(set(copies)) == 10 for copies in alone)


def test_tokens_are_cut_as_they_are_cut_alone_and_every_copy_otherwise(tmp_path):
    bench = toy_bench()
    (alone,) = bench.render_query(get_defense("retokenization").prepare(host(tmp_path)), ASKED[0])
    stack = get_defense("retokenization+policy").prepare(host(tmp_path))
    (behind,) = bench.render_query(stack, ASKED[0])
    assert behind.ids[-len(alone.ids) :] == alone.ids != bench.render_query(NONE, ASKED[0])[0].ids
    # Noise that changes next to nothing, so that the copies are the same text but for one character.
    stack = get_defense("smooth_llm+retokenization", {"copies": "4", "smooth_llm.rate": "0.001"})
    copies = bench.render_query(stack.prepare(host(tmp_path)), ASKED[0])
    assert len({prompt.ids for prompt in copies}) == 4
    assert len({len(prompt.ids) for prompt in copies}) > 1


def test_a_member_rewords_every_reading_of_the_one_before_it_and_all_are_asked_together():
    bench, asked = toy_bench(), []
    answer = bench.defense_calls.complete_calls

    def watched(asks):
        asked.append(len(asks))
        return answer(asks)

    bench.defense_calls.complete_calls = watched
    stack = get_defense("smooth_llm+paraphrase", {"copies": "3"})
    assert [len(chats) for chats in read(bench, stack)] == [3] * len(ASKED)
    assert asked == [3 * len(ASKED)]


def test_readings_that_are_pooled_in_two_ways_have_no_margin(tmp_path):
    with pytest.raises(
        UserError, match="smooth_llm by the mean and erase_and_check by the max of its readings"
    ):
        get_defense("smooth_llm+erase_and_check")

    @dataclass(frozen=True)
    class Mine(Defense):  # says nothing of its several readings
        def rewrite(self, chat, rng):
            return [dict(message) for message in chat]

        def rewrite_copies(self, chat, rng):
            return [self.rewrite(chat, rng)] * 2

    stack = Stack((Mine(), get_defense("erase_and_check"))).prepare(host(tmp_path))
    with pytest.raises(
        UserError, match="mine goes by the mean of its readings and erase_and_check by the max"
    ):
        read(toy_bench(), stack)
    one = get_defense("word_drop+erase_and_check", {"tokens": "3"}).prepare(host(tmp_path))
    assert one.pool == "max" and {len(chats) for chats in read(toy_bench(), one)} <= {3, 4}


def test_a_stack_passes_the_preflight_under_an_attack(tmp_path):
    bench = toy_bench().with_attack(choose_attacks(["prefill"])[0])
    readout = derive_readout(bench, ASKED, NONE)
    for name in ("word_drop+self_reminder", "policy+refusal_steering"):
        stack = get_defense(name).prepare(host(tmp_path))
        failed = [one for one in check_condition(bench, name, stack, ASKED[:2], readout) if not one.passed]
        assert not failed
    names = {one.name for one in check_condition(bench, "x", stack, ASKED[:2], readout)}
    assert "user's words survive" in names


# --- what is armed ----------------------------------------------------------------------------------------


def tuned(folder):
    """Return tuned weights."""
    return SafetyTuning(adapter=load_adapter(made_adapter(folder / "x", seed=3)))


def test_all_members_are_armed_and_the_model_is_bit_for_bit_what_it_was(tmp_path):
    model, steering = tiny_model(), get_defense("refusal_steering").prepare(host(tmp_path))
    weights, ids = tuned(tmp_path), torch.tensor([[5, 6, 7]])

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    before = logits()
    with weights.apply_to(model), steering.apply_to(model):
        want = logits()
    with Stack((weights, steering)).apply_to(model):
        assert torch.equal(logits(), want)
    assert torch.equal(logits(), before) and not torch.equal(want, before)


def test_what_tells_a_change_of_the_model_is_that_of_the_only_member_that_makes_one(tmp_path):
    weights, policy = tuned(tmp_path), get_defense("policy")
    steering = get_defense("refusal_steering").prepare(host(tmp_path))
    assert Stack((policy, weights)).weights_fingerprint() == weights.weights_fingerprint()
    assert Stack((policy, get_defense("word_drop"))).weights_fingerprint() == ""
    both = Stack((weights, steering)).weights_fingerprint()
    assert both not in (
        weights.weights_fingerprint(),
        steering.weights_fingerprint(),
        Stack((steering, weights)).weights_fingerprint(),
        None,
    )


def test_a_change_of_the_users_own_that_nothing_tells_is_never_kept():
    @dataclass(frozen=True)
    class Mine(Defense):
        def rewrite(self, chat, rng):
            return [dict(message) for message in chat]

        @contextmanager
        def apply_to(self, model):
            yield

    stack = Stack((get_defense("policy"), Mine()))
    assert (
        stack.is_user_defined
        and stack.weights_fingerprint() is None
        and stack.cacheable_fingerprint() is None
    )


def test_a_blend_in_a_stack_is_that_of_its_models_reading_what_the_others_wrote(tmp_path):
    bench, policy = toy_bench(), get_defense("policy")
    blend = SafeDecoding(alpha=3.0, adapter=tuned(tmp_path).adapter)
    expert = Stack((policy, SafetyTuning(adapter=blend.adapter)))
    plain, other = margins(bench, policy), margins(bench, expert)
    want = [a + 3 * (b - a) for a, b in zip(plain, other, strict=True)]
    assert margins(bench, Stack((policy, blend))) == pytest.approx(want, abs=1e-4)
    assert margins(bench, Stack((blend, policy))) == pytest.approx(want, abs=1e-4)
    assert want != pytest.approx(plain, abs=1e-2)
    said = generate_responses(bench, Stack((policy, blend)), ASKED[:2], max_new_tokens=3)
    assert all(len(one.ids) == 3 for readings in said for one in readings)


def test_a_blend_of_one_model_counts_by_its_weight():
    @dataclass(frozen=True)
    class Twice(Defense):
        def rewrite(self, chat, rng):
            return [dict(message) for message in chat]

        def logit_blend(self):
            return ((2.0, NONE),)

    bench = toy_bench()
    assert margins(bench, Twice()) == pytest.approx([2 * one for one in margins(bench, NONE)], abs=1e-4)


# --- what it says of itself -------------------------------------------------------------------------------


def test_secrets_needs_and_seen_queries_are_those_of_all_members(tmp_path):
    backdoor = Backdoor(secret=Secret("tulip seven harbor"))
    steering = get_defense("refusal_steering").prepare(host(tmp_path))
    stack = Stack((get_defense("policy"), backdoor, steering))
    assert stack.secret_texts() == ("tulip seven harbor",)
    assert stack.trained_on() == {"a query"}
    assert "backdoor: no tuned weights" in stack.missing_requirements() and build_conditions([stack]) == {}
    told = describe_defense(stack)
    assert list(told["members"]) == ["policy", "backdoor", "refusal_steering"]
    assert "tulip" not in f"{told} {stack!r}" and told["members"]["backdoor"]["secrets"]
    assert list_members(stack) == stack.members and list_members(NONE) == (NONE,)


def test_the_dearest_member_says_what_it_costs():
    assert get_defense("policy+tone_reminder").cost == "static"
    assert get_defense("policy+paraphrase+safety_tuning").cost == "one call"
    assert get_defense("safety_tuning+policy").cost == "weights"


def test_a_member_has_the_settings_that_it_has_alone():
    found = choose_defenses(["policy", "word_drop + policy"], ["policy.text=Nothing is allowed."])
    assert [one.name for one in found] == ["none", "policy", "word_drop+policy"]
    assert found[1].text == found[2].members[1].text == "Nothing is allowed."
    assert [one.name for one in choose_defenses(["word_drop+policy", "word_drop + policy"], [])] == [
        "none",
        found[2].name,
    ]


def test_the_file_of_a_users_own_may_have_a_plus_in_its_name(tmp_path):
    file = tmp_path / "a+b.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom defenses import Defense\n@dataclass(frozen=True)\n"
        "class Mine(Defense):\n    '''Nothing.'''\n    def rewrite(self, chat, rng):\n        return chat\n"
    )
    assert get_defense(str(file)).name == "mine"
    other = file.rename(tmp_path / "ab.py")
    assert [one.name for one in get_defense(f"{other}+policy").members] == ["mine", "policy"]


def test_scores_of_a_stack_of_words_alone_are_found_among_those_of_the_same_words(tmp_path):
    bench = toy_bench()
    readout = derive_readout(bench, ASKED, NONE)
    stack, policy = get_defense("tone_reminder+policy"), get_defense("policy")
    text = f"{policy.text}\n\n{get_defense('tone_reminder').get_reminder()}"
    same = replace(policy, text=text)
    first, second = (
        score_prompts(
            bench.loaded_model, bench.engine, one, [p.ids for p in bench.render_query(one, ASKED[0])], readout
        )
        for one in (stack, same)
    )
    assert torch.equal(first, second)


def test_a_generator_of_a_stack_can_be_copied():
    dice = QueryRng("0/query", "word_drop")
    dice.random()
    again = copy.deepcopy(dice)
    assert (
        again.random() == dice.random()
        and again.get_member_rng("policy").random() == dice.get_member_rng("policy").random()
    )


def test_rewriting_without_a_bench_takes_any_generator():
    stack, chat = get_defense("word_drop+policy"), [{"role": "user", "content": "How do I bake good bread?"}]
    assert stack.rewrite(chat, random.Random(3)) == stack.rewrite(chat, random.Random(3))
