"""Attention knockout blocks attention to the defense's own tokens and changes nothing else."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOY_READOUT, make_toy_session, pair_runs, read_plain_margins, tiny_model
from PIL import Image
from vision_models import build_vision_model

from analysis.attacks import choose_attacks
from analysis.datasets.loading import load_queries
from analysis.mechanism.interventions import measure_image_knockout_table
from analysis.mechanism.knockout import (
    ATTENTION_READERS,
    compute_knockout_margin,
    describe_unsupported_attention,
)
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.models.token_spans import mask_user_tokens
from analysis.models.vision import ImageReader
from analysis.stats.attribution import ContrastEstimator
from defenses.catalog import get_defense
from defenses.images import QueryImage

QUERIES = load_queries("contrast").select_split("test").limit_queries(4).queries
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")


def decode_masked(session, prompt, mask, wanted=True):
    """Return the text of the tokens that a mask selects, or leaves out."""
    return session.chat_template.decode_tokens(
        [token for token, selected in zip(prompt.ids, mask, strict=True) if selected == wanted]
    )


def test_the_tokens_of_a_defense_are_those_of_its_text():
    session = make_toy_session()
    paired_runs = pair_runs(session, REMINDER, QUERIES)
    masks, prompts = paired_runs.find_defense_tokens(), paired_runs.render_prompts(REMINDER)
    for mask, prompt, query in zip(masks, prompts, QUERIES, strict=True):
        defense_text = decode_masked(session, prompt, mask)
        other_text = decode_masked(session, prompt, mask, wanted=False)
        assert "responsible" in defense_text and "responsible" not in other_text
        assert query.text in other_text
        assert query.text not in defense_text and "<|im_start|>" not in defense_text
    assert not any(map(any, pair_runs(session, NONE, QUERIES).find_defense_tokens()))


@pytest.mark.parametrize("name", ["many_shot", "prefill", "system_override", "prefix_injection"])
def test_the_text_of_an_attack_does_not_belong_to_the_defense(name):
    (attack,) = choose_attacks([name])
    session = make_toy_session()
    paired_runs = pair_runs(session, REMINDER, QUERIES[:2], attack=attack)
    assert not any(map(any, replace(paired_runs, defense=NONE).find_defense_tokens()))
    masks, prompts = paired_runs.find_defense_tokens(), paired_runs.render_prompts(REMINDER)
    for mask, prompt in zip(masks, prompts, strict=True):
        defense_text = decode_masked(session, prompt, mask)
        assert "responsible" in defense_text and len(defense_text) < 350, defense_text


def test_user_text_that_a_defense_has_changed_is_still_the_users():
    paired_runs = pair_runs(make_toy_session(), get_defense("character_swap"), QUERIES)
    assert not any(map(any, paired_runs.find_defense_tokens()))


def test_a_knockout_blocks_attention_in_its_layers_and_nothing_else():
    session = make_toy_session()
    paired_runs = pair_runs(session, REMINDER, QUERIES[:2])
    before, after = (
        read_plain_margins(session, defense, paired_runs.encode_prompts(defense))
        for defense in (NONE, REMINDER)
    )
    knockouts = paired_runs.list_knockouts()
    effects = paired_runs.measure_knockouts(REMINDER, paired_runs.find_defense_tokens()) - before[:, None]
    without = [column for column, (_, layers) in enumerate(knockouts) if not layers]
    assert effects[:, without] == pytest.approx(np.stack([after - before] * 2, 1), abs=1e-4)
    blocked = [column for column in range(len(knockouts)) if column not in without]
    assert (np.abs(effects[:, blocked] - (after - before)[:, None]) > 1e-4).all()
    # If only the response position is blocked, the defense still acts through the other tokens.
    all_layers = {reader: column for column, (reader, layers) in enumerate(knockouts) if layers == range(2)}
    difference = effects[:, all_layers["answer"]] - effects[:, all_layers["everything"]]
    assert (np.abs(difference) > 1e-4).all()


def test_blocked_tokens_have_no_effect_apart_from_their_number():
    session = make_toy_session()
    paired_runs = pair_runs(session, REMINDER, QUERIES[:1])
    (ids,), (mask,) = paired_runs.encode_prompts(REMINDER), paired_runs.find_defense_tokens()
    other_ids = tuple(301 if hidden else token for token, hidden in zip(ids, mask, strict=True))
    margins = [
        compute_knockout_margin(session, prompt_ids, mask, range(2), "everything", TOY_READOUT)
        for prompt_ids in (ids, other_ids)
    ]
    assert margins[0] == pytest.approx(margins[1], abs=1e-5)
    plain, other_plain = read_plain_margins(session, NONE, [ids, other_ids])
    assert plain != pytest.approx(other_plain, abs=1e-3)


def test_unsupported_attention_is_named():
    model = copy.deepcopy(tiny_model())
    model.config._attn_implementation = "eager"
    reason = describe_unsupported_attention(model)
    assert reason == "LlamaForCausalLM uses eager attention, and attention knockout needs sdpa"
    assert not describe_unsupported_attention(tiny_model())


@pytest.fixture(scope="module")
def image_runs():
    """A tiny LLaVA, which reads queries with images undefended and under a reminder."""
    model, processor = build_vision_model("llava")
    reader = ImageReader(processor, model, "llava")
    loaded = LoadedModel("llava", model, processor.tokenizer, {"id": "llava"}, image_reader=reader)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    images = [QueryImage(str(row), str(row) * 64, Image.fromarray(pixels[row]).copy) for row in range(2)]
    queries = [replace(query, image=image) for query, image in zip(QUERIES[:2], images, strict=True)]
    return replace(pair_runs(ModelSession.from_model(loaded), REMINDER, queries), components=None)


def test_the_tokens_of_a_defense_are_found_around_an_image(image_runs):
    """The text of a prompt describes an image, whose tokens are many."""
    masks, prompts = image_runs.find_defense_tokens(), image_runs.render_prompts(REMINDER)
    for mask, prompt, (_, chat) in zip(masks, prompts, image_runs.query_chats, strict=True):
        defense_text = decode_masked(image_runs.session, prompt, mask)
        other_text = decode_masked(image_runs.session, prompt, mask, wanted=False)
        assert "responsible" in defense_text and "responsible" not in other_text
        assert chat[-1]["content"] in other_text and "[16 image tokens]" in other_text
        assert "<|im_start|>" not in defense_text
        user_mask = mask_user_tokens(image_runs.session.chat_template, prompt, chat)
        assert decode_masked(image_runs.session, prompt, user_mask).strip() == chat[-1]["content"]


def test_a_knockout_of_images_is_a_mask_of_attention(image_runs):
    """Margins of plain passes over the pixels, with an attention mask made by hand."""
    model = image_runs.session.loaded_model.model
    knockouts = image_runs.list_knockouts()
    hidden = image_runs.find_image_tokens(REMINDER)
    assert [sum(mask) for mask in hidden] == [16, 16]
    margins = image_runs.measure_knockouts(REMINDER, hidden)
    for row, (ids, mask) in enumerate(zip(image_runs.encode_prompts(REMINDER), hidden, strict=True)):
        for reader in ATTENTION_READERS:
            allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            start = len(ids) - 1 if reader == "answer" else max(np.flatnonzero(mask)) + 1
            allowed[start:, torch.tensor(mask)] = False
            bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
            with torch.inference_mode():
                inputs = model.image_reader.build_plain_inputs(ids)
                logits = model(**inputs, attention_mask=bias[None, None], use_cache=False).logits[0, -1:]
            expected = float(TOY_READOUT.compute_margins(logits)[0, 0])
            column = knockouts.index((reader, range(2)))
            assert margins[row, column] == pytest.approx(expected, abs=1e-4)
            assert abs(expected - margins[row, knockouts.index((reader, range(0)))]) > 1e-3


def test_the_effect_without_images_is_measured_against_the_undefended_run_without_them(image_runs):
    estimator = ContrastEstimator(pd.Series(["a", "a"]), np.array([True, False]), 0)
    table = measure_image_knockout_table(image_runs, estimator)
    before, after = (
        image_runs.measure_knockouts(defense, image_runs.find_image_tokens(defense))
        for defense in (image_runs.undefended, REMINDER)
    )
    assert table["shift"].to_numpy() == pytest.approx((after - before).mean(axis=0), abs=1e-6)
    assert set(table["tokens"]) == {"image"} and len(table) == len(image_runs.list_knockouts())
