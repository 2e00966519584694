"""Models that read images: prompts as the processor writes them, margins as of plain passes over pixels.

The numbers in the names of tests are those of the mistakes that other tools have made with images
(docs/images.md). The right values come from the processor and the model of transformers alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB
from gguf_models import write_gguf
from tokenizers.processors import TemplateProcessing
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, Phi4MultimodalConfig
from vision_models import (
    TEXT_SIZES,
    VISION_FAMILIES,
    VISION_SIZES,
    build_vision_model,
    draw_image,
    open_session,
    run_plainly,
    save_vision_model,
)

from analysis.checkpoints.configuration import read_config
from analysis.checkpoints.processor import read_processor
from analysis.models.batches import BatchForm, CacheUse
from analysis.models.engine import Engine
from analysis.models.generation import choose_cache_use, generate_token_ids
from analysis.models.image_tokens import contains_image, is_image_id
from analysis.models.loading import LoadedModel, open_checkpoint
from analysis.models.plain_passes import choose_batch_form, compute_plain_logits, run_in_float32
from analysis.models.session import ModelSession, check_token_ids
from analysis.models.vision import ImageReader
from defenses.errors import UserError

# Of different sizes and numbers of tiles; two of equal size, which could be exchanged without an error.
IMAGES = (draw_image(130, 70), draw_image(60, 60), draw_image(300, 100), draw_image(60, 60, seed=1))


def make_chat(image, text="What is this?", system=""):
    turns = [{"role": "user", "content": text} | ({"image": image} if image else {})]
    return [{"role": "system", "content": system}, *turns] if system else turns


CASES = [
    (image, f"What is this?{' Really?' * index}", system)
    for index, image in enumerate(IMAGES)
    for system in ("", "You are kind.")
] + [(None, "What is this?", "")]


@cache
def render_prompts(family):
    """Return the token ids of the prompts of all cases."""
    template = open_session(family).chat_template
    return [template.render_prompt(make_chat(*case)).ids for case in CASES]


@cache
def run_cases_plainly(family):
    """Return the last logits and the ids of plain passes over all cases."""
    logits, ids = zip(*(run_plainly(family, *case) for case in CASES), strict=True)
    return torch.stack(logits), ids


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_prompts_are_those_of_the_processor(family):
    """Mistakes 2 and 11: pixels if and only if placeholders, ids as the processor writes them."""
    placeholder = open_session(family).chat_template.image_reader.placeholder_id
    _, plain_ids = run_cases_plainly(family)
    for case, ids, expected in zip(CASES, render_prompts(family), plain_ids, strict=True):
        assert [placeholder if is_image_id(token) else token for token in ids] == expected
        assert contains_image(ids) == (case[0] is not None)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_logits_are_those_of_plain_passes_in_any_order(family):
    """Mistakes 3, 5 to 9 and 15: batches of images of any size, text between them, in every order."""
    session, prompts = open_session(family), render_prompts(family)
    plain, _ = run_cases_plainly(family)
    forward = session.engine.read_first_token(prompts, lambda logits: logits)
    assert (forward - plain).abs().max() < 1e-4
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = session.engine.read_first_token([prompts[row] for row in order], lambda logits: logits)
    assert (shuffled - plain[order]).abs().max() < 1e-4
    assert (plain[2] - plain[6]).abs().max() > 0.1  # two images of equal size


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_fastest_form_that_is_right_is_used(family):
    """Mistakes 6 and 9: text before an image is shared also where its place or its kind is told apart."""
    forms = {"gemma3_vl": BatchForm.REPEATED, "gemma4_vl": BatchForm.PADDED, "mllama": BatchForm.PADDED}
    session, prompts = open_session(family), render_prompts(family)
    engine = session.engine.image_engine
    assert engine.batch_form is forms.get(family, BatchForm.PACKED)
    if engine.batch_form is BatchForm.PADDED:
        return
    plain, _ = run_cases_plainly(family)
    rows = [row for row, prompt in enumerate(prompts) if contains_image(prompt)]
    repeated = Engine(session.loaded_model.model, batch_form=BatchForm.REPEATED)
    logits = repeated.read_first_token([prompts[row] for row in rows], lambda logits: logits)
    assert (logits - plain[rows]).abs().max() < 1e-4
    with torch.inference_mode():  # the whole prompt but its last token is the prefix, its image included
        last = engine.make_last_token_reader(prompts[rows[0]])(2)
    assert (last - plain[rows[0]]).abs().max() < 1e-4


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_responses_are_those_of_plain_passes(family):
    """Mistake 10: every generated token is the one that a plain pass over the pixels ranks first."""
    session, prompts = open_session(family), render_prompts(family)
    placeholder = session.chat_template.image_reader.placeholder_id
    generated = generate_token_ids(session.engine, [prompts[0], prompts[4]], 3, frozenset())
    for image, text, response in zip(
        (IMAGES[0], IMAGES[2]), ("What is this?", "What is this? Really? Really?"), generated, strict=True
    ):
        for length, token in enumerate(response):
            if placeholder in response[:length]:
                break  # a random model may write the mark of an image
            logits, _ = run_plainly(family, image, text, more_ids=response[:length])
            assert logits[token] > logits.max() - 1e-4


def test_features_are_computed_once_for_each_image_and_state_of_the_weights():
    """Conditions reuse features; mistake 17: a change of the weights that read images makes them invalid."""
    model, processor = build_vision_model.__wrapped__("llava")
    reader = ImageReader(processor, model, "llava")
    session = ModelSession.from_model(
        LoadedModel("llava", model, processor.tokenizer, {"id": "llava"}, image_reader=reader)
    )
    prompts = [session.chat_template.render_prompt(make_chat(image)).ids for image in IMAGES]
    before = session.engine.read_first_token(prompts, lambda logits: logits)
    n_computed = reader.n_computed
    session.engine.read_first_token(prompts, lambda logits: logits)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # not read by features
    session.engine.read_first_token(prompts, lambda logits: logits)
    assert reader.n_computed == n_computed
    with torch.no_grad():
        model.lm_head.weight.div_(1.5)
        model.model.multi_modal_projector.linear_2.weight.mul_(1.5)
    after = session.engine.read_first_token(prompts, lambda logits: logits)
    assert reader.n_computed == n_computed + len(IMAGES)
    assert (after - before).abs().max() > 0.01
    # Other tensors, which may get the addresses of those that they replace, and hooks.
    layer = model.model.multi_modal_projector.linear_1
    for factor in (2, 3, 4):
        layer.weight.data = torch.full_like(layer.weight, factor / 100)
        _assert_plain(session, prompts[:1])
    layer.weight = torch.nn.Parameter(torch.full_like(layer.weight, 0.5))
    _assert_plain(session, prompts[:1])
    handle = layer.register_forward_hook(lambda module, args, output: output + 1)
    _assert_plain(session, prompts[:1])
    handle.remove()
    _assert_plain(session, prompts[:1])


def _assert_plain(session, prompts):
    """Assert that the engine's logits are those of plain passes over the pixels."""
    found = session.engine.read_first_token(prompts, lambda logits: logits)
    plain = [compute_plain_logits(session.loaded_model.model, ids)[-1] for ids in prompts]
    assert (found - torch.stack(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_5_vl"])
def test_half_precision_is_compared_in_float32(family):
    model, processor = build_vision_model.__wrapped__(family)
    reader = ImageReader(processor, model.bfloat16(), family)
    loaded = LoadedModel(family, model, processor.tokenizer, {"id": family}, image_reader=reader)
    session = ModelSession.from_model(loaded)
    ids = [session.chat_template.render_prompt(make_chat(image)).ids for image in IMAGES[:2]]
    assert session.engine.image_engine.batch_form is open_session(family).engine.image_engine.batch_form
    with run_in_float32(model):
        _assert_plain(session, ids)
    assert model.dtype is torch.bfloat16


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_an_image_in_a_prefix_that_is_repeated(family):
    """Caption calls of one query: the whole prompt is its own prefix."""
    session, prompts = open_session(family), render_prompts(family)
    engine = Engine(session.loaded_model.model, batch_form=BatchForm.REPEATED)
    found = generate_token_ids(engine, prompts[:1], 3, frozenset())
    assert found == generate_token_ids(session.engine, prompts[:1], 3, frozenset())
    # Logits at many positions, which reach into the image, so that the prefix ends before it.
    n_positions = len(prompts[0]) - 8
    with torch.inference_mode():
        ((_, logits),) = session.engine.image_engine.iterate_logits(prompts[:1], [n_positions])
    plain = compute_plain_logits(session.loaded_model.model, prompts[0])[-n_positions:]
    assert (logits - plain).abs().max() < 1e-4


def test_a_bos_that_the_processor_writes_is_written():
    """Mistake 11: where the template writes none and the tokenizer would, as for LLaVA-1.5."""
    _, processor = build_vision_model.__wrapped__("llava")
    tokenizer, model = processor.tokenizer, build_vision_model("llava")[0]
    tokenizer.bos_token = "<s>"
    post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    tokenizer.backend_tokenizer.post_processor = post_processor
    loaded = LoadedModel("mine", model, tokenizer, {"id": "mine"})
    session = ModelSession.from_model(replace(loaded, image_reader=ImageReader(processor, model, "mine")))
    for image in (IMAGES[0], None):
        parts = [
            *([{"type": "image", "image": image.load()}] if image else []),
            {"type": "text", "text": "Hi"},
        ]
        expected = processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"][0]
        chat = make_chat(image, "Hi")
        ids = session.chat_template.render_prompt(chat).ids
        assert len(ids) == len(expected) and ids[0] == expected[0] == tokenizer.bos_token_id
        assert session.chat_template.count_expected_bos(chat) == 1


def test_features_beyond_the_limit_are_kept_in_files(monkeypatch):
    session, prompts = open_session("qwen3_vl"), render_prompts("qwen3_vl")
    expected = session.engine.read_first_token(prompts, lambda logits: logits)
    monkeypatch.setattr("analysis.models.image_features.MAX_FEATURE_BYTES", 1)
    reader = session.chat_template.image_reader
    reader.feature_store.forget()
    n_computed = reader.n_computed
    for _ in range(2):
        found = session.engine.read_first_token(prompts, lambda logits: logits)
        assert torch.equal(found, expected)
    assert reader.n_computed == n_computed + len(IMAGES)
    assert reader.feature_store.n_files == len(IMAGES) - 1
    monkeypatch.setattr("analysis.models.image_features.MIN_FREE_BYTES", 2**62)  # a disk that is full
    reader.feature_store.forget()
    assert torch.equal(session.engine.read_first_token(prompts, lambda logits: logits), expected)
    assert reader.feature_store.n_files == 0


def test_ids_tell_images_apart_and_edits_too():
    """Mistake 16: equal prompts have equal ids only if their images are equal."""
    template = open_session("llava").chat_template
    image, other = IMAGES[1], IMAGES[3]

    def render(image):
        return template.render_prompt(make_chat(image)).ids

    edited = image.edit(lambda pixels: pixels.rotate(90), "rotate/90")
    assert render(image) == render(replace(image, name="another file"))
    assert len({render(image), render(other), render(edited)}) == 3
    check_token_ids(open_session("llava").loaded_model, [render(image)])


@pytest.mark.parametrize("family", ["llava", "gemma3_vl"])
def test_marks_of_images_in_texts_are_no_images(family):
    """Mistake 12: what a user or a defense writes adds no image and takes the place of none."""
    template = open_session(family).chat_template
    marks = template.image_reader.reserved_texts
    text = f"Look: {' '.join(marks)}"
    ids = template.render_prompt(make_chat(IMAGES[0], text)).ids
    assert sum(map(is_image_id, ids)) == len(template.image_reader.prepare(IMAGES[0]).ids)
    assert not set(template.tokenizer.encode("".join(marks))) & set(ids[-12:])


def test_text_needs_no_placeholder():
    session = open_session("llava")
    reader = ImageReader.__new__(ImageReader)
    reader.processor = SimpleNamespace(all_special_multimodal_tokens=[])
    reader.model, reader.name = SimpleNamespace(config=None), "mine"
    template = replace(session.chat_template, image_reader=reader)
    assert (
        template.render_prompt(make_chat(None)).ids
        == session.chat_template.render_prompt(make_chat(None)).ids
    )
    with pytest.raises(UserError, match="no placeholder for images"):
        _ = reader.placeholder_id


def test_share_of_pixels_that_reach_the_model():
    """Mistake 1: the processor of LLaVA-1.5 cuts off what lies outside of the central square."""
    cropping = open_session("llava").chat_template.image_reader
    assert cropping.prepare(draw_image(150, 50)).seen_share == pytest.approx(1 / 3, abs=0.02)
    assert "150×50 → 56×56, 3" in cropping.prepare(draw_image(150, 50)).describe()
    assert "images reach the model in part only" in cropping.describe_losses()
    wholes = ("llava_next", "llava_onevision", "idefics3", "internvl", "qwen2_5_vl", "gemma3_vl", "gemma4_vl")
    for family in (*wholes, "mllama"):
        shown = open_session(family).chat_template.image_reader.prepare(draw_image(150, 50))
        assert shown.seen_share > 0.95, family
        assert not open_session(family).chat_template.image_reader.describe_losses()


def test_images_that_are_read_by_cross_attention():
    """Llama 3.2: features are reused, one image per prompt, and its first template had no system turn."""
    session, prompts = open_session("mllama"), render_prompts("mllama")
    reader = session.chat_template.image_reader
    session.engine.read_first_token(prompts, lambda logits: logits)
    n_computed = reader.n_computed
    session.engine.read_first_token(prompts, lambda logits: logits)
    assert reader.n_computed == n_computed
    assert session.engine.image_engine.batch_form is BatchForm.PADDED
    assert session.engine.batch_form is BatchForm.PACKED  # text alone
    assert choose_cache_use(session.engine.image_engine) is CacheUse.PADDED
    assert "[image: 1 token, 300×100 → 3 × 28×28" in reader.prepare(IMAGES[2]).describe()
    with pytest.raises(UserError, match="one image per prompt only"):
        session.chat_template.render_prompt(make_chat(IMAGES[0]) + make_chat(IMAGES[1]))
    tokenizer, source = session.loaded_model.tokenizer, session.loaded_model.tokenizer.chat_template
    refusal = "{% if 'image' in messages | string and messages[0]['role'] == 'system' %}"
    tokenizer.chat_template = refusal + "{{ raise_exception('no system turn') }}{% endif %}" + source
    try:
        template = replace(session.chat_template)
        with_image = template.render_prompt(make_chat(IMAGES[0], "Hi", "Be kind.")).text
        assert "system" not in with_image and with_image.index("Be kind.") < with_image.index("Hi")
        assert "system" in template.render_prompt(make_chat(None, "Hi", "Be kind.")).text
        assert any("beside an image" in notice for notice in template.notices)
    finally:
        tokenizer.chat_template = source


def test_processor_and_model_that_do_not_fit_are_named():
    """Mistake 4: a processor that writes another number of placeholders than the model has features."""
    model, processor = build_vision_model.__wrapped__("llava")
    processor.patch_size = 28
    session = ModelSession.from_model(
        LoadedModel(
            "mine",
            model,
            processor.tokenizer,
            {"id": "mine"},
            image_reader=ImageReader(processor, model, "mine"),
        )
    )
    ids = session.chat_template.render_prompt(make_chat(IMAGES[0])).ids
    with pytest.raises(UserError, match=r"writes 4 placeholders .* 16 features .* do not fit"):
        session.engine.read_first_token([ids], lambda logits: logits)


def test_models_and_templates_of_text_alone():
    template = open_session("llava").chat_template
    text_only = replace(template, image_reader=None)
    with pytest.raises(UserError, match=r"reads text only.*\+ocr"):
        text_only.render_prompt(make_chat(IMAGES[0]))
    silent_source = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    template.tokenizer.chat_template, source = silent_source, template.tokenizer.chat_template
    try:  # the mark then stands before the text, as LLaVA was trained
        ids = replace(template).render_prompt(make_chat(IMAGES[0])).ids
        assert [is_image_id(token) for token in ids[:17]] == [True] * 16 + [False]
    finally:
        template.tokenizer.chat_template = source


def test_models_that_cannot_be_given_images_say_why(tmp_path):
    config = PaliGemmaConfig(
        vision_config={**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT_SIZES, "model_type": "gemma", "head_dim": 16},
        image_token_index=VOCAB - 1,
        projection_dim=64,
    )
    torch.manual_seed(0)
    with pytest.raises(UserError, match="reads later tokens at earlier positions"):
        choose_batch_form(PaliGemmaForConditionalGeneration(config).eval())
    config.save_pretrained(tmp_path)  # known before weights are loaded
    with pytest.raises(UserError, match=r"^\S+ \(paligemma\) reads its prompt in both directions .* use a"):
        read_config(tmp_path, "mine")
    with pytest.raises(
        UserError, match=r"^transformers loads mine \(phi4_multimodal\) without images, .* use a"
    ):
        read_processor(tmp_path, Phi4MultimodalConfig(), None, "mine")
    path = write_gguf(tmp_path / "mine.gguf")
    loaded = open_checkpoint(str(path), "cpu", "float32", offline=True).build_without_weights()
    template = ModelSession.from_model(loaded).chat_template
    assert "images" not in template.identity and template.render_prompt(make_chat(None)).ids
    with pytest.raises(
        UserError, match=r"^\S+ holds the language part of a model only, as every \.gguf, .*use"
    ):
        template.render_prompt(make_chat(IMAGES[0]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "internvl", "mllama"])
def test_saved_folders_are_loaded_with_a_pinned_processor(family, tmp_path):
    """Mistake 14: the implementation of the image processor is the same everywhere, and recorded."""
    folder = save_vision_model(tmp_path / family, family)
    loaded = open_checkpoint(str(folder), "cpu", "float32", offline=True).load_weights()
    identity = loaded.image_reader.identity
    assert identity["image_processor"].endswith("Pil")
    ids = ModelSession.from_model(loaded).chat_template.render_prompt(make_chat(IMAGES[2])).ids
    expected = open_session(family).chat_template.render_prompt(make_chat(IMAGES[2])).ids
    assert ids == expected
