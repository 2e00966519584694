"""Tiny random vision-language models of several families, with the processors of their own classes."""

from __future__ import annotations

import hashlib
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import _SIZES, VOCAB, toy_tokenizer
from PIL import Image

from analysis.checkpoints.processor import build_processor
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.models.vision import ImageReader
from defenses.images import QueryImage

_TEXT = {**_SIZES, "max_position_embeddings": 4096}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "initializer_range": 0.2,
}
# A template of one image part and text parts, as those of the released models.
_TEMPLATE = (
    "{%% for m in messages %%}<|im_start|>{{ m['role'] }}\n"
    "{%% for part in m['content'] %%}{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}"
    "{%% endif %%}{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


def _make_tokenizer(tokens: list[str], shown: str, **attributes: str) -> Any:
    """Return the toy tokenizer with the tokens of a family, and a template that shows images."""
    from transformers import PreTrainedTokenizerFast

    plain = toy_tokenizer()
    plain.add_tokens(tokens, special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE % shown,
        model_specific_special_tokens=attributes,
    )


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _build_llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _make_tokenizer(["<image>"], "<image>\n")
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=_square(56))
    processor = LlavaProcessor(
        images, tokenizer, 14, "default", tokenizer.chat_template, num_additional_image_tokens=1
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration, (config, processor)


def _build_llava_next() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    tokenizer = _make_tokenizer(["<image>"], "<image>\n")
    grid = [[56, 112], [112, 56], [112, 112]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=_square(56), image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        images, tokenizer, 14, "default", tokenizer.chat_template, num_additional_image_tokens=1
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=grid,
    )
    return LlavaNextForConditionalGeneration, (config, processor)


def _build_smolvlm(as_released: bool = False) -> tuple[Any, Any]:
    """Return a tiny configuration, or that of SmolVLM-256M with images in one tile."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
        SmolVLMProcessor,
    )

    tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = _make_tokenizer(
        tokens,
        "<image>",
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    edge = 512 if as_released else 56
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * edge},
        max_image_size={"longest_edge": edge},
        do_image_splitting=not as_released,
    )
    settings = {"image_seq_len": 64 if as_released else 4, "chat_template": tokenizer.chat_template}
    processor = build_processor(SmolVLMProcessor, images, tokenizer, settings)
    text, vision = {**_TEXT, "model_type": "llama"}, {**_VISION}
    if as_released:
        text |= {"vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536}
        text |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        vision |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        vision |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
        vision["initializer_range"] = text["initializer_range"] = 0.02
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4 if as_released else 2,
    )
    return SmolVLMForConditionalGeneration, (config, processor)


def _build_idefics3() -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = _make_tokenizer(
        tokens,
        "<image>",
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    config = Idefics3Config(
        vision_config={**_VISION},
        text_config={**_TEXT, "model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration, (config, processor)


def _build_internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
    )

    tokenizer = _make_tokenizer(
        ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        "<IMG_CONTEXT>\n",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessorPil(size=_square(56), crop_to_patches=True, min_patches=1, max_patches=4)
    processor = build_processor(
        InternVLProcessor,
        images,
        tokenizer,
        {"image_seq_length": 4, "chat_template": tokenizer.chat_template},
    )
    config = InternVLConfig(
        vision_config={**_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={**_TEXT, "model_type": "qwen2"},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration, (config, processor)


def _build_qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
    )

    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _make_tokenizer(tokens, "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = build_processor(
        Qwen2_5_VLProcessor, images, tokenizer, {"chat_template": tokenizer.chat_template}
    )
    get = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": 0.2,
        },
        text_config={
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        image_token_id=get("<|image_pad|>"),
        video_token_id=get("<|video_pad|>"),
        vision_start_token_id=get("<|vision_start|>"),
        vision_end_token_id=get("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration, (config, processor)


def _build_qwen3_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLImageProcessorPil,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )

    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _make_tokenizer(tokens, "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, patch_size=16
    )
    processor = build_processor(
        Qwen3VLProcessor, images, tokenizer, {"chat_template": tokenizer.chat_template}
    )
    get = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
            "num_position_embeddings": 64,
        },
        text_config={
            **_TEXT,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        image_token_id=get("<|image_pad|>"),
        video_token_id=get("<|video_pad|>"),
        vision_start_token_id=get("<|vision_start|>"),
        vision_end_token_id=get("<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration, (config, processor)


def _build_gemma3() -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    tokens = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer = _make_tokenizer(
        tokens,
        "<start_of_image>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    images = Gemma3ImageProcessorPil(size=_square(56))
    processor = Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)
    get = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512},
        vision_config={**_VISION},
        mm_tokens_per_image=4,
        boi_token_index=get("<start_of_image>"),
        eoi_token_index=get("<end_of_image>"),
        image_token_index=get("<image_soft_token>"),
    )
    return Gemma3ForConditionalGeneration, (config, processor)


_BUILDERS = {
    "llava": _build_llava,
    "llava_next": _build_llava_next,
    "smolvlm": _build_smolvlm,
    "smolvlm-256m": partial(_build_smolvlm, as_released=True),
    "idefics3": _build_idefics3,
    "internvl": _build_internvl,
    "qwen2_5_vl": _build_qwen2_5_vl,
    "qwen3_vl": _build_qwen3_vl,
    "gemma3_vl": _build_gemma3,
}
VISION_FAMILIES = tuple(family for family in _BUILDERS if family != "smolvlm-256m")


@cache
def build_vision_model(family: str) -> tuple[Any, Any]:
    """Return a random model of a family and its processor; the same objects each time."""
    model_class, (config, processor) = _BUILDERS[family]()
    assert len(processor.tokenizer) <= VOCAB
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval(), processor


def save_vision_model(folder: Path, family: str) -> Path:
    """Write a tiny model and its processor into a folder, as save_pretrained() does, and return it."""
    model, processor = build_vision_model(family)
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # the part for videos needs torchvision
    names = ("image_seq_len", "image_seq_length", "patch_size", "vision_feature_select_strategy")
    settings = {name: getattr(processor, name) for name in names if hasattr(processor, name)}
    settings["num_additional_image_tokens"] = getattr(processor, "num_additional_image_tokens", 0)
    settings["processor_class"] = type(processor).__name__
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def draw_image(width, height, seed=0):
    """Return an image of random pixels."""
    pixels = np.random.default_rng([seed, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return QueryImage(
        f"{width}x{height}", hashlib.sha256(f"{width}{height}{seed}".encode()).hexdigest(), image.copy
    )


@cache
def open_session(family):
    """Return a session with a tiny model of a family."""
    model, processor = build_vision_model(family)
    reader = ImageReader(processor, model, family)
    return ModelSession.from_model(
        LoadedModel(family, model, processor.tokenizer, {"id": family}, image_reader=reader)
    )


def run_plainly(family, image, text="What is this?", system="", more_ids=()):
    """Return the last logits of a plain pass with everything that the processor returns, and its ids."""
    model, processor = build_vision_model(family)
    parts = [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]
    chat = [{"role": "user", "content": parts}]
    if system:
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, *chat]
    rendered = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[rendered],
        images=[image.load()] if image else None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    if more_ids:
        length = len(more_ids)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([more_ids])], dim=1)
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                fill = torch.full((1, length), int(name == "attention_mask"))
                inputs[name] = torch.cat([inputs[name], fill], dim=1)
    known = {
        name: value for name, value in inputs.items() if image or name in ("input_ids", "attention_mask")
    }
    with torch.inference_mode():
        logits = model(**known, use_cache=False).logits[0, -1].float()
    return logits, inputs["input_ids"][0].tolist()
