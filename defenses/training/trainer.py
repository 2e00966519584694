"""Training itself: examples and settings in, an adapter (or a whole checkpoint) out; by TRL and PEFT.

The loss is on the answer alone. Prompts are turned into ids by the same rendering that asks the model later,
so that the first answer token is learned exactly where it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from defenses.contract import Chat
from defenses.errors import UserError, is_out_of_memory
from defenses.training.recipes import TargetResponse, TrainingExample

PromptRenderer = Callable[[Chat], Sequence[int]]
# Told after each step: step, steps in all, loss.
StepCallback = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainingSettings:
    """How training goes; the defaults are those of BackdoorAlign for LoRA.

    Attributes:
        rank: of the adapter.
        alpha: its scale; the weights change by alpha / rank · B A.
        modules: the layers that get one, by name.
        rate: learning rate; by default 1e-3, and 5e-5 for full training.
        epochs: over the examples; by default the recipe's, and 5 for full training.
        batch: examples in one step.
        full: train all weights instead of an adapter.
        beta: of a preference: how strongly the model is held to what it was.
        seed: of initial weights and order.
    """

    name: ClassVar[str] = "training"

    rank: int = 8
    alpha: int = 32
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    rate: float | None = None
    epochs: int | None = None
    batch: int = 10
    full: bool = False
    beta: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no training can go by."""
        for name in ("rank", "alpha", "rate", "epochs", "batch", "beta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--set {name}={value}: it must be more than 0")

    def resolve_defaults(self, recipe_epochs: int) -> TrainingSettings:
        """Return the settings with what was left open: the recipe's epochs, the paper's for full training."""
        return replace(
            self,
            rate=self.rate or (5e-5 if self.full else 1e-3),
            epochs=self.epochs or (5 if self.full else recipe_epochs),
        )


def train_model(
    model: Any,
    tokenizer: Any,
    render: PromptRenderer,
    examples: Sequence[TrainingExample],
    settings: TrainingSettings,
    folder: Path,
    on_step: StepCallback,
) -> tuple[Any, list[tuple[int, float]]]:
    """Train a model on examples; return it (with its adapter) and the loss of each step.

    Args:
        model: of transformers; it is changed.
        tokenizer: of transformers.
        render: chat → token ids.
        examples: with a worse answer each for a preference, or without for all.
        settings: resolved.
        folder: for checkpoints, one an epoch; training goes on from the last one there.
        on_step: told after each step.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    disable_progress_bars()  # there is one already, the caller's
    set_seed(settings.seed)
    rows = [_tokenize_example(tokenizer, render, example) for example in examples]
    data = Dataset.from_list(rows)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                on_step(state.global_step, state.max_steps, float(logs["loss"]))

    trainer = _build_trainer(model, tokenizer, data, settings, folder)
    trainer.add_callback(Told())
    try:
        trainer.train(resume_from_checkpoint=last)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError(
                f"memory ran out in training on {model.device} with {settings.batch} examples a step: lower "
                f"it with --set batch={max(1, settings.batch // 2)}, or take --dtype bfloat16"
                + (", or an adapter instead of --set full=true" if settings.full else "")
            ) from error
        raise
    history = [(one["step"], float(one["loss"])) for one in trainer.state.log_history if "loss" in one]
    return trainer.model.eval(), history


def _build_trainer(model: Any, tokenizer: Any, dataset: Any, settings: TrainingSettings, folder: Path) -> Any:
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Preferring(DPOTrainer):
        """DPO on chats that have been rendered already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    prefer = "chosen_ids" in dataset.column_names
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "linear",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": None,
        "bf16": False,
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.modules),
        task_type="CAUSAL_LM",
    )
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": dataset,
        "processing_class": tokenizer,
        "peft_config": None if settings.full else lora,
    }
    trainer: Any
    if prefer:
        trainer = Preferring(args=DPOConfig(**shared, beta=settings.beta), **options)
    else:
        trainer = SFTTrainer(args=SFTConfig(**shared, completion_only_loss=True), **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenize_example(
    tokenizer: Any, render: PromptRenderer, example: TrainingExample
) -> dict[str, list[int]]:
    prompt = list(render(example.chat))
    answer = _tokenize_response(tokenizer, example.response)
    if example.rejected is None:
        mask = [0] * len(prompt) + [1] * len(answer)
        return {"input_ids": prompt + answer, "completion_mask": mask}
    return {
        "prompt_ids": prompt,
        "chosen_ids": answer,
        "rejected_ids": _tokenize_response(tokenizer, example.rejected),
    }


def _tokenize_response(tokenizer: Any, response: TargetResponse) -> list[int]:
    ids = list(tokenizer.encode(response.text, add_special_tokens=False))
    return [*ids, tokenizer.eos_token_id] if response.is_complete else ids
