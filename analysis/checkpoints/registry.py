"""Registry of chat models by short name; adding a model means adding one row."""

from __future__ import annotations

from dataclasses import dataclass

# Vicuna's tokenizer has no chat template. This is the format it was fine-tuned on, without the default system
# sentence.
_VICUNA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class RegisteredModel:
    """One row of the registry.

    Attributes:
        name: short name, as in `--model`.
        repo: `owner/name` on the Hugging Face hub.
        note: one remark for `analyze list models`.
        gated: whether the license must be accepted on the hub before download.
        revision: branch, tag or commit.
        chat_template: Jinja template for a tokenizer that has none.
    """

    name: str
    repo: str
    note: str = ""
    gated: bool = False
    revision: str = "main"
    chat_template: str | None = None


MODEL_REGISTRY = {
    model.name: model
    for model in (
        RegisteredModel(
            "smollm2",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "embedded (Q4_1 GGUF, Apache-2.0); rarely refuses",
        ),
        RegisteredModel("llama2", "meta-llama/Llama-2-7b-chat-hf", "the model of both papers", gated=True),
        RegisteredModel("llama2-13b", "meta-llama/Llama-2-13b-chat-hf", gated=True),
        RegisteredModel("llama3", "meta-llama/Meta-Llama-3-8B-Instruct", gated=True),
        RegisteredModel("llama3.1", "meta-llama/Llama-3.1-8B-Instruct", gated=True),
        RegisteredModel("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", gated=True),
        RegisteredModel("llama3.2", "meta-llama/Llama-3.2-3B-Instruct", gated=True),
        RegisteredModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct"),
        RegisteredModel("qwen2.5", "Qwen/Qwen2.5-7B-Instruct"),
        RegisteredModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", "thinking is disabled"),
        RegisteredModel("qwen3", "Qwen/Qwen3-8B", "thinking is disabled"),
        RegisteredModel(
            "gemma2-2b",
            "google/gemma-2-2b-it",
            "no system role: system text is merged into the user turn",
            gated=True,
        ),
        RegisteredModel(
            "gemma2",
            "google/gemma-2-9b-it",
            "no system role: system text is merged into the user turn",
            gated=True,
        ),
        RegisteredModel("gemma3-1b", "google/gemma-3-1b-it", gated=True),
        RegisteredModel("gemma3", "google/gemma-3-4b-it", "reads images", gated=True),
        RegisteredModel("mistral", "mistralai/Mistral-7B-Instruct-v0.3"),
        RegisteredModel("phi3.5", "microsoft/Phi-3.5-mini-instruct"),
        RegisteredModel("phi4-mini", "microsoft/Phi-4-mini-instruct"),
        RegisteredModel(
            "vicuna",
            "lmsys/vicuna-7b-v1.5",
            "needs a safetensors copy; the published weights are pickled",
            chat_template=_VICUNA_TEMPLATE,
        ),
        RegisteredModel("llava", "llava-hf/llava-1.5-7b-hf", "reads images; cuts them to a square"),
        RegisteredModel("llava-13b", "llava-hf/llava-1.5-13b-hf", "reads images; cuts them to a square"),
        RegisteredModel("llava-next", "llava-hf/llava-v1.6-mistral-7b-hf", "reads images"),
        RegisteredModel("qwen2.5-vl", "Qwen/Qwen2.5-VL-7B-Instruct", "reads images"),
        RegisteredModel("qwen3-vl", "Qwen/Qwen3-VL-8B-Instruct", "reads images"),
        RegisteredModel(
            "llama-3.2-vision",
            "meta-llama/Llama-3.2-11B-Vision-Instruct",
            "reads images, by cross-attention; one per prompt",
            gated=True,
        ),
        RegisteredModel("smolvlm", "HuggingFaceTB/SmolVLM-256M-Instruct", "reads images"),
        RegisteredModel("smolvlm-500m", "HuggingFaceTB/SmolVLM-500M-Instruct", "reads images"),
        RegisteredModel("internvl3", "OpenGVLab/InternVL3-8B-hf", "reads images"),
    )
}
