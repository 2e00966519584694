"""Decoding defenses: prefilled responses, and the blend of a model with its expert."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import derive_readout, make_adapter, make_toy_session, toy_tokenizer
from vision_models import draw_image, open_session, run_plainly

from analysis.attacks import DIRECT_ATTACK, get_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.judges.rules import RULE_JUDGES
from analysis.mechanism.attribution import DirectLogitAttribution
from analysis.mechanism.components import locate_components
from analysis.models.cache import ScoreCache
from analysis.models.session import ModelSession, generate_responses
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.studies.cost import time_conditions
from analysis.studies.preflight import _normalize_text, check_condition
from analysis.studies.responses import _make_keys
from defenses.adapters import load_adapter
from defenses.catalog import choose_defenses, get_defense
from defenses.chats import prefill_response
from defenses.contract import Chat, Defense, ModelInfo
from defenses.decoding import Coca, SafeDecoding
from defenses.errors import UserError
from defenses.stack import Stack

QUERIES = sample_queries(load_queries("twins").queries, 4)
UNDEFENDED = get_defense("none")


@pytest.mark.parametrize(
    ("template", "kind", "separator"),
    [("llama2", "metaspace", " "), ("mistral0.3", "metaspace", " "), ("chatml", "bytes", "")],
)
def test_the_token_after_a_prefill_has_the_form_of_a_first_response_token(
    template: str, kind: str, separator: str
) -> None:
    chat_template = make_toy_session(template=template, kind=kind).chat_template
    chat = [{"role": "user", "content": "How do I sing?"}]
    prompt = chat_template.render_prompt(prefill_response(chat, "Sure, here it is:\n\n"))
    assert chat_template.has_leading_space == bool(separator)
    assert prompt.text.endswith("here it is:" if separator else "here it is:\n\n")
    assert _normalize_text(prompt.prefill) == "Sure,hereitis:"


def test_a_readout_with_a_prefill_fails_the_preflight_of_a_prefilled_prompt() -> None:
    session = make_toy_session()
    opener = tuple(session.loaded_model.tokenizer.encode("Sure, here", add_special_tokens=False))
    readout = derive_readout(session, QUERIES, UNDEFENDED, opener)
    checks = check_condition(session, "safety_prefix", get_defense("safety_prefix"), QUERIES, readout)
    (failed,) = [check for check in checks if not check.passed]
    assert failed.observed.startswith("the readout") and "'Sure,here'" in failed.observed
    attacked = check_condition(session, "none", UNDEFENDED, QUERIES, readout, get_attack("prefill"))
    assert not all(check.passed for check in attacked)


def test_the_preflight_of_a_blend_checks_the_blended_logits(tmp_path: Path) -> None:
    session = make_toy_session()
    blend = SafeDecoding(adapter=load_adapter(make_adapter(tmp_path / "x", seed=3)))
    readout = derive_readout(session, QUERIES, UNDEFENDED)
    blended, undefended = (
        {check.name: check for check in check_condition(session, defense.name, defense, QUERIES, readout)}
        for defense in (blend, UNDEFENDED)
    )
    assert all(check.passed for check in blended.values())
    assert blended["coverage"].observed != undefended["coverage"].observed


def test_the_expert_needs_the_released_weights(tmp_path: Path) -> None:
    make_adapter(tmp_path / "aligned", seed=1)
    model_info = ModelInfo("toy", toy_tokenizer(), (), (tmp_path,), "toy")
    assert not get_defense("safe_decoding").prepare(model_info).missing_requirements()
    in_state = get_defense("safe_decoding").prepare(replace(model_info, state="x"))
    assert "released weights" in in_state.missing_requirements()


# --- CoCA: a blend of the logits after two prompts -------------------------------------------------------

LINEAR = Readout("words", ("I", "Sure"), (301, 302), (1.0, -1.0), threshold=0.5)


def score(session: ModelSession, defense: Defense, queries: list[Query] | None = None) -> list[float]:
    return score_condition(session, defense.name, defense, queries or QUERIES, LINEAR)["margin"].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_margin_of_coca_is_that_of_the_principle_plus_alpha_times_its_effect(family: str) -> None:
    session, coca = make_toy_session(family), Coca(alpha=2.5)
    principle, plain = score(session, replace(coca, alpha=0.0)), score(session, UNDEFENDED)
    expected = [3.5 * with_it - 2.5 * without for with_it, without in zip(principle, plain, strict=True)]
    assert score(session, coca) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(principle, abs=1e-2) and principle != pytest.approx(plain, abs=1e-2)
    assert replace(coca, alpha=0.0).logit_blend() == ()


def test_a_stack_with_coca_blends_the_prompts_of_all_other_members() -> None:
    session = make_toy_session()
    for name in ("policy", "smooth_llm", "erase_and_check"):
        (_, other) = (d.prepare(ModelInfo("toy", toy_tokenizer(), ())) for d in choose_defenses([name], []))
        for stack in (Stack((other, Coca())), Stack((Coca(), other))):
            principle = Stack(
                tuple(replace(m, alpha=0.0) if isinstance(m, Coca) else m for m in stack.members)
            )
            prompts = session.render_prompts(stack, DIRECT_ATTACK.build_query_chats(QUERIES))
            by_part = [
                session.render_prompts(part, DIRECT_ATTACK.build_query_chats(QUERIES))
                for part in (principle, other)
            ]
            for copies, with_it, without in zip(prompts, *by_part, strict=True):
                assert [[m.text for m in prompt.members] for prompt in copies] == [
                    [a.text, b.text] for a, b in zip(with_it, without, strict=True)
                ]
            if other.pool == "mean":  # a maximum over copies is not linear
                margins = [score(session, part) for part in (principle, other)]
                expected = [5 * with_it - 4 * without for with_it, without in zip(*margins, strict=True)]
                assert score(session, stack) == pytest.approx(expected, abs=1e-4)


def plain_logits(session: ModelSession, defense: Defense, query: Query) -> torch.Tensor:
    """Return the last logits of one plain forward pass over the defense's own prompt."""
    (chat,) = DIRECT_ATTACK.build_query_chats([query])
    prompt = session.chat_template.render_prompt(defense.rewrite(chat.chat, random.Random(0)))
    with torch.inference_mode():
        return session.loaded_model.model(input_ids=torch.tensor([prompt.ids])).logits[0, -1]


def test_the_first_response_token_is_the_largest_of_the_blended_logits_of_plain_passes() -> None:
    session, coca = make_toy_session(), Coca()
    responses = generate_responses(session, coca, DIRECT_ATTACK.build_query_chats(QUERIES), max_new_tokens=3)
    differs = 0
    for query, (response,) in zip(QUERIES, responses, strict=True):
        principle, plain = (plain_logits(session, d, query) for d in (coca, UNDEFENDED))
        blended = principle + 4 * (principle - plain)
        assert response.ids[0] == int(blended.argmax())
        differs += int(blended.argmax()) not in (int(principle.argmax()), int(plain.argmax()))
        # The rest follows from the prompt with the principle.
        (prompt,) = session.render_prompts(coca, DIRECT_ATTACK.build_query_chats([query]))[0]
        with torch.inference_mode():
            ids = torch.tensor([[*prompt.ids, response.ids[0]]])
            assert response.ids[1] == int(session.loaded_model.model(input_ids=ids).logits[0, -1].argmax())
    assert differs


def test_coca_blends_prompts_with_the_image_of_the_query() -> None:
    session, image = open_session("llava"), draw_image(130, 70)
    query, text = Query("q", "What is this?", True, image=image), "Do no harm."
    coca = Coca(text=text)
    principle, _ = run_plainly("llava", image, query.text, text)
    plain, _ = run_plainly("llava", image, query.text)
    blended = principle + 4 * (principle - plain)
    assert score(session, coca, [query]) == pytest.approx([float(blended[301] - blended[302])], abs=1e-3)
    ((response,),) = generate_responses(
        session, coca, DIRECT_ATTACK.build_query_chats([query]), max_new_tokens=1
    )
    assert response.ids == (int(blended.argmax()),)


def test_keys_of_coca_depend_on_both_prompts_and_alpha(tmp_path: Path) -> None:
    loaded_model = make_toy_session().loaded_model
    session = ModelSession.from_model(loaded_model, score_cache=ScoreCache(tmp_path / "s.sqlite"))
    fresh = make_toy_session()
    assert score(session, Coca()) == pytest.approx(score(fresh, Coca()), abs=1e-4)
    counter = session.engine.work_counter
    for defense in (Coca(alpha=1.0), Coca(text="Be kind."), ForgetfulBlend()):
        assert score(session, defense) == pytest.approx(score(fresh, defense), abs=1e-4)
    counter.reset_counts()
    assert score(session, Coca()) == pytest.approx(score(fresh, Coca()), abs=1e-4)
    assert counter.computed_tokens == 0
    judge = RULE_JUDGES["keywords"]
    chats = DIRECT_ATTACK.build_query_chats(QUERIES[:1])
    keys = {
        _make_keys(session, chats, defense, QUERIES[:1], judge, LINEAR)[0]
        for defense in (Coca(), Coca(alpha=1.0), ForgetfulBlend(), UNDEFENDED)
    }
    assert len(keys) == 4


@dataclass(frozen=True)
class ForgetfulBlend(Defense):
    """Has the prompt and the weights of CoCA, and blends another prompt."""

    name = "coca"
    blends_prompts = True

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return Coca().rewrite(chat, rng)

    def logit_blend(self) -> tuple[tuple[float, Defense], ...]:
        return (5.0, Coca(alpha=0.0)), (-4.0, get_defense("policy"))


def test_coca_passes_the_preflight_costs_two_prompts_and_has_no_place_in_the_layers() -> None:
    session, coca = make_toy_session(), Coca()
    checks = check_condition(session, "coca", coca, QUERIES, LINEAR)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    query_chats = DIRECT_ATTACK.build_query_chats(QUERIES[:1])
    lengths = [
        len(session.render_prompts(d, query_chats)[0][0].ids) for d in (replace(coca, alpha=0.0), UNDEFENDED)
    ]
    (row,) = time_conditions(session, {"coca": coca}, query_chats).to_dict("records")
    assert (row["prompt_tokens"], row["calls"]) == (sum(lengths), 2)
    attribution = DirectLogitAttribution(locate_components(session.loaded_model.model), LINEAR)
    with pytest.raises(UserError, match=r"^coca mixes the logits of several prompts") as error:
        attribution.attribute_margins(session, coca, query_chats)
    assert "\n" not in str(error.value)
