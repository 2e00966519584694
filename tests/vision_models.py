"""Tiny random vision-language models of several families, with the processors of their own classes."""

from __future__ import annotations

import hashlib
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import _SIZES, VOCAB, toy_tokenizer
from PIL import Image

from analysis.checkpoints.processor import build_processor
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from analysis.models.vision import ImageReader
from defenses.images import QueryImage

TEXT_SIZES = {**_SIZES, "max_position_embeddings": 4096}
VISION_SIZES: dict[str, Any] = {
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


def _assemble(
    name: str, tokenizer: Any, images: Any, settings: dict[str, Any], **config: Any
) -> tuple[Any, Any, Any]:
    """Return the class of a model, its configuration and its processor.

    Args:
        name: with which the classes of transformers begin.
        tokenizer: of the family.
        images: the part of the processor that prepares images.
        settings: of the processor.
        **config: of the model, with the texts of tokens in the place of their ids.
    """
    settings |= {"chat_template": tokenizer.chat_template}
    processor = build_processor(getattr(transformers, f"{name}Processor"), images, tokenizer, settings)
    ids = {
        key: tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) else value
        for key, value in config.items()
    }
    made = getattr(transformers, f"{name}Config")(**ids)
    return getattr(transformers, f"{name}ForConditionalGeneration"), made, processor


_LLAVA = {
    "vision_config": {**VISION_SIZES, "projection_dim": 32, "model_type": "clip_vision_model"},
    "text_config": {**TEXT_SIZES, "model_type": "llama"},
    "image_token_index": "<image>",
    "vision_feature_layer": -1,
}
_LLAVA_PROCESSOR = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_GRID = [[56, 112], [112, 56], [112, 112]]


def _build_llava() -> tuple[Any, Any, Any]:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=_square(56))
    return _assemble(
        "Llava", _make_tokenizer(["<image>"], "<image>\n"), images, {**_LLAVA_PROCESSOR}, **_LLAVA
    )


def _build_llava_next() -> tuple[Any, Any, Any]:
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=_square(56), image_grid_pinpoints=_GRID
    )
    tokenizer = _make_tokenizer(["<image>"], "<image>\n")
    config = {**_LLAVA, "image_grid_pinpoints": _GRID}
    return _assemble("LlavaNext", tokenizer, images, {**_LLAVA_PROCESSOR}, **config)


def _build_llava_onevision() -> tuple[Any, Any, Any]:
    tokenizer = _make_tokenizer(["<image>", "<video>"], "<image>\n")
    images = transformers.LlavaOnevisionImageProcessorPil(size=_square(56), image_grid_pinpoints=_GRID)
    return _assemble(
        "LlavaOnevision",
        tokenizer,
        images,
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        vision_config={**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT_SIZES, "model_type": "qwen2"},
        image_token_index="<image>",
        video_token_index="<video>",
        image_grid_pinpoints=_GRID,
    )


def _build_idefics(name: str) -> tuple[Any, Any, Any]:
    """Return Idefics3, or SmolVLM, which is built alike."""
    images_class = getattr(transformers, f"{name}ImageProcessorPil")
    images = images_class(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return _assemble(
        name,
        _make_tokenizer([*_IDEFICS_TOKENS.values()], "<image>", **_IDEFICS_TOKENS),
        images,
        {"image_seq_len": 4},
        vision_config={**VISION_SIZES},
        text_config={**TEXT_SIZES, "model_type": "llama"},
        image_token_id="<image>",
        scale_factor=2,
    )


_IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def _build_smolvlm_256m() -> tuple[Any, Any, Any]:
    """Return the released configuration, with images in one tile."""
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 1024}, max_image_size={"longest_edge": 512}, do_image_splitting=False
    )
    text = {"vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    return _assemble(
        "SmolVLM",
        _make_tokenizer([*_IDEFICS_TOKENS.values()], "<image>", **_IDEFICS_TOKENS),
        images,
        {"image_seq_len": 64},
        vision_config=vision,
        text_config={
            **TEXT_SIZES,
            **text,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "model_type": "llama",
        }
        | {"initializer_range": 0.02},
        image_token_id="<image>",
        scale_factor=4,
    )


def _build_internvl() -> tuple[Any, Any, Any]:
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokens |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    images = transformers.GotOcr2ImageProcessorPil(
        size=_square(56), crop_to_patches=True, min_patches=1, max_patches=4
    )
    return _assemble(
        "InternVL",
        _make_tokenizer([*tokens.values()], "<IMG_CONTEXT>\n", **tokens),
        images,
        {"image_seq_length": 4},
        vision_config={**VISION_SIZES, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={**TEXT_SIZES, "model_type": "qwen2"},
        image_token_id="<IMG_CONTEXT>",
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _build_qwen_vl(name: str, patch_size: int, text: dict[str, Any], **vision: Any) -> tuple[Any, Any, Any]:
    """Return a Qwen-VL model; images have 4 × 4 to 8 × 8 patches."""
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    edges = {"shortest_edge": (4 * patch_size) ** 2, "longest_edge": (8 * patch_size) ** 2}
    images = transformers.Qwen2VLImageProcessorPil(size=edges, patch_size=patch_size)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    return _assemble(
        name,
        _make_tokenizer([*ids.values()], "<|vision_start|><|image_pad|><|vision_end|>"),
        images,
        {},
        vision_config={**sizes, "initializer_range": 0.2, **vision},
        text_config={**TEXT_SIZES, "rope_parameters": rope, **text},
        **ids,
    )


def _build_gemma3() -> tuple[Any, Any, Any]:
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokens["image_token"] = "<image_soft_token>"
    return _assemble(
        "Gemma3",
        _make_tokenizer([*tokens.values()], "<start_of_image>", **tokens),
        transformers.Gemma3ImageProcessorPil(size=_square(56)),
        {"image_seq_length": 4},
        text_config={**TEXT_SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512},
        vision_config={**VISION_SIZES},
        mm_tokens_per_image=4,
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
        image_token_index="<image_soft_token>",
    )


def _build_gemma4() -> tuple[Any, Any, Any]:
    tokens = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    tokens |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    text = {
        **TEXT_SIZES,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 512,
        "num_hidden_layers": 4,
    }
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    text |= {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
    text["use_bidirectional_attention"] = "vision"
    vision = {**VISION_SIZES, "head_dim": 16, "num_key_value_heads": 2, "pooling_kernel_size": 2}
    return _assemble(
        "Gemma4",
        _make_tokenizer([*tokens.values()], "<|image|>", **tokens),
        transformers.Gemma4ImageProcessorPil(patch_size=14, max_soft_tokens=70, pooling_kernel_size=2),
        {"image_seq_length": 70},
        text_config=text,
        vision_config=vision | {"position_embedding_size": 64},
        image_token_id="<|image|>",
        boi_token_id="<|image>",
        eoi_token_id="<image|>",
        audio_token_id="<|audio|>",
        boa_token_id="<|audio>",
        eoa_token_index="<audio|>",
        video_token_id="<|video|>",
    )


def _build_mllama() -> tuple[Any, Any, Any]:
    """Return a model that reads images by cross-attention: one placeholder, whatever the number of tiles."""
    tokenizer = _make_tokenizer(["<|image|>"], "<|image|>")
    tokenizer.chat_template = tokenizer.bos_token + tokenizer.chat_template
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "attention_heads": 2}
    vision |= {"num_global_layers": 1, "vision_output_dim": 96, "image_size": 28, "patch_size": 14}
    vision |= {"intermediate_layers_indices": [0, 1], "initializer_range": 0.2}
    return _assemble(
        "Mllama",
        tokenizer,
        transformers.MllamaImageProcessorPil(size=_square(28)),
        {},
        vision_config=vision,
        text_config={**TEXT_SIZES, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        image_token_index="<|image|>",
    )


_BUILDERS = {
    "llava": _build_llava,
    "llava_next": _build_llava_next,
    "llava_onevision": _build_llava_onevision,
    "smolvlm": partial(_build_idefics, "SmolVLM"),
    "smolvlm-256m": _build_smolvlm_256m,
    "idefics3": partial(_build_idefics, "Idefics3"),
    "internvl": _build_internvl,
    "qwen2_5_vl": partial(
        _build_qwen_vl, "Qwen2_5_VL", 14, {}, depth=2, fullatt_block_indexes=[1], window_size=56
    ),
    "qwen3_vl": partial(
        _build_qwen_vl,
        "Qwen3VL",
        16,
        {"head_dim": 16},
        depth=3,
        deepstack_visual_indexes=[0, 1],
        num_position_embeddings=64,
    ),
    "gemma3_vl": _build_gemma3,
    "gemma4_vl": _build_gemma4,
    "mllama": _build_mllama,
}
VISION_FAMILIES = tuple(family for family in _BUILDERS if family != "smolvlm-256m")


@cache
def build_vision_model(family: str) -> tuple[Any, Any]:
    """Return a random model of a family and its processor; the same objects each time."""
    model_class, config, processor = _BUILDERS[family]()
    assert len(processor.tokenizer) <= VOCAB
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:  # closed before training: images would change nothing
            weight.data.fill_(0.5)
    return model, processor


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
        if "cross_attention_mask" in inputs:  # what is generated reads the image as the last token does
            mask = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].repeat(1, length, 1, 1)], dim=1)
    known = {
        name: value for name, value in inputs.items() if image or name in ("input_ids", "attention_mask")
    }
    with torch.inference_mode():
        logits = model(**known, use_cache=False).logits[0, -1].float()
    return logits, inputs["input_ids"][0].tolist()
