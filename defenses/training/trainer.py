"""Fine-tuning of an adapter or of all weights on training examples, by TRL and PEFT.

The loss covers the response only, unless hidden states are trained (`objectives`). Prompts are tokenized by
the same chat template as for scoring, so that the first response token is trained at exactly the position
where it is scored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from defenses.contract import Chat
from defenses.errors import UserError, is_out_of_memory, unknown_name_error
from defenses.training.recipes import (
    PROMPT_OBJECTIVES,
    ExampleSettings,
    Objective,
    TargetResponse,
    TrainingExample,
)

if TYPE_CHECKING:
    from defenses.training.soft_prompts import RefusalJudge

PromptRenderer = Callable[[Chat], Sequence[int]]


class StepReport(NamedTuple):
    """What is told after each step.

    Attributes:
        step: its number, from 1 on.
        n_steps: number of steps of the whole training.
        loss: mean loss of the step.
        n_tokens: number of tokens of the whole training, all epochs.
    """

    step: int
    n_steps: int
    loss: float
    n_tokens: int


StepCallback = Callable[[StepReport], None]


@dataclass(frozen=True)
class TrainingSettings(ExampleSettings):
    """Training settings; the defaults are those of BackdoorAlign for LoRA.

    Attributes:
        rank: rank of the adapter.
        alpha: scale of the adapter; the weights change by alpha / rank · B A.
        modules: names of the layers to adapt.
        rate: learning rate; by default that of the recipe, or 5e-5 for full training.
        epochs: number of epochs; by default that of the recipe, or 5 for full training.
        batch: number of examples per step.
        full: whether to train all weights instead of an adapter.
        beta: DPO's beta, the strength of regularization toward the initial model.
        depth: layer whose hidden states are rerouted or perturbed, as a share of the model's depth.
        radius: largest norm of a perturbation, as a share of the median norm of hidden states.
        attack_steps: number of gradient steps in which a perturbation is found.
        prompt_tokens: number of learned embeddings of the recipe soft_prompt.
        seed: random seed of the initial adapter weights, of the order of examples, and of their choice.
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
    depth: float = 0.6
    radius: float = 0.3
    attack_steps: int = 6
    prompt_tokens: int = 20

    def __post_init__(self) -> None:
        """Check that numeric settings are positive, and that the depth is below 1."""
        super().__post_init__()
        sizes = ("rank", "alpha", "rate", "epochs", "batch", "beta", "depth", "radius", "attack_steps")
        for name in (*sizes, "prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--set {name}={value}: it must be more than 0")
        if self.depth >= 1:
            raise UserError(f"--set depth={self.depth}: it must be a share of the model's depth, below 1")

    def resolve_defaults(self, recipe_epochs: int, recipe_rate: float = 1e-3) -> TrainingSettings:
        """Return the settings with defaults for the learning rate and the number of epochs."""
        return replace(
            self,
            rate=self.rate or (5e-5 if self.full else recipe_rate),
            epochs=self.epochs or (5 if self.full else recipe_epochs),
        )


def train_model(
    model: Any,
    tokenizer: Any,
    render: PromptRenderer,
    examples: Sequence[TrainingExample],
    settings: TrainingSettings,
    objective: Objective,
    folder: Path,
    on_step: StepCallback,
    judge_refusals: RefusalJudge | None = None,
) -> tuple[Any, list[tuple[int, float]]]:
    """Train a model on examples.

    Args:
        model: transformers model; it is modified.
        tokenizer: transformers tokenizer.
        render: function of a chat that returns its token ids.
        examples: for the objective `responses`, all with a rejected response (preference training) or all
            without one.
        settings: settings with resolved defaults.
        objective: what is minimized.
        folder: folder for one checkpoint per epoch; training resumes from the last checkpoint in it.
        on_step: called after each step.
        judge_refusals: for the objective `dro`: decides which chats the model refuses.

    Returns:
        The model (with its adapter, or within a `SoftPromptModel`), and the step and loss of each step.

    Raises:
        UserError: if memory runs out.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback

    disable_progress_bars()  # the caller shows its own
    set_seed(settings.seed)
    render_example, trained_model = render, model
    if objective in PROMPT_OBJECTIVES:
        from defenses.training.soft_prompts import build_soft_prompt, render_soft_prompt

        trained_model = build_soft_prompt(model, tokenizer, objective, settings)
        render_example = partial(render_soft_prompt, render, trained_model.tokens)
    rows = [
        _tokenize_example(tokenizer, render_example, example)
        if objective == "responses"
        else {**_tokenize_contrast(tokenizer, render_example, example), "row": row}
        for row, example in enumerate(examples)
    ]
    n_tokens = sum(_count_tokens(row, objective) for row in rows) * (settings.epochs or 1)
    dataset = Dataset.from_list(rows)
    last_checkpoint = find_last_checkpoint(folder)

    class StepAndSaveCallback(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                on_step(StepReport(state.global_step, state.max_steps, float(logs["loss"]), n_tokens))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The trainer itself would keep the one with the latest date, which is another if the clock jumps.
            for path in _list_checkpoints(folder):
                if _read_step(path) < state.global_step:
                    shutil.rmtree(path, ignore_errors=True)

    if objective in PROMPT_OBJECTIVES:
        from defenses.training.soft_prompts import build_prompt_trainer, find_directions

        directions = None
        if objective == "dro":
            assert judge_refusals is not None, "the objective dro needs judge_refusals"
            pad_id = tokenizer.pad_token_id or 0
            directions = find_directions(model, render, examples, judge_refusals, pad_id)
        options = _list_trainer_options(model, settings, folder)
        trainer = build_prompt_trainer(trained_model, tokenizer, dataset, directions, options)
    else:
        trainer = _build_trainer(model, tokenizer, dataset, settings, objective, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepAndSaveCallback())
    try:
        trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError(
                f"memory ran out in training on {model.device} with {settings.batch} examples per step; use "
                f"--set batch={max(1, settings.batch // 2)} or --dtype bfloat16"
                + (", or train an adapter instead of --set full=true" if settings.full else "")
            ) from error
        raise
    history = [
        (entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
    ]
    return trainer.model.eval(), history


def find_adapted_layers(model: Any, names: Sequence[str]) -> list[str]:
    """Return the full names of the layers that an adapter changes: those of the language model.

    A model that also reads images may have layers of the same names in its vision tower.

    Args:
        model: transformers model; its weights are not read.
        names: last parts of the names, such as q_proj.

    Raises:
        UserError: if the language model has no layer of one of the names.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    decoder_modules = set(model.get_decoder().modules())
    layers = {
        name: name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module in decoder_modules and isinstance(module, (nn.Linear, Conv1D))
    }
    for name in names:
        if name not in layers.values():
            raise unknown_name_error("layer in --set modules", name, set(layers.values()))
    return [full_name for full_name, name in layers.items() if name in names]


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a training; incomplete ones are removed.

    Args:
        folder: of the checkpoints; it need not exist.
    """
    for path in sorted(_list_checkpoints(folder), key=_read_step, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text("utf-8"))  # is written last
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            return path
    return None


def _list_checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _build_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    settings: TrainingSettings,
    objective: Objective,
    folder: Path,
) -> Any:
    """Return the trainer of an objective; for that of responses, DPO if some are rejected, else plain."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        """DPO trainer for examples that are already tokenized."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    is_preference = "chosen_ids" in dataset.column_names
    shared_options = _list_trainer_options(model, settings, folder)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=find_adapted_layers(model, settings.modules),
        task_type="CAUSAL_LM",
    )
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": dataset,
        "processing_class": tokenizer,
        "peft_config": None if settings.full else lora,
    }
    trainer: Any
    if objective != "responses":
        from defenses.training.objectives import build_objective_trainer

        tuned_model = get_peft_model(model, lora)
        trainer = build_objective_trainer(
            tuned_model, tokenizer, dataset, settings, objective, shared_options
        )
    elif is_preference:
        trainer = TokenizedDPOTrainer(
            args=DPOConfig(**shared_options, max_length=None, beta=settings.beta), **options
        )
    else:
        config = SFTConfig(**shared_options, max_length=None, completion_only_loss=True)
        trainer = SFTTrainer(args=config, **options)
    return trainer


def _list_trainer_options(model: Any, settings: TrainingSettings, folder: Path) -> dict[str, Any]:
    """Return the options that all trainers have in common."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "linear",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def _count_tokens(row: Mapping[str, Any], objective: Objective) -> int:
    """Return the number of tokens in the sequences of an example that training reads."""
    names = [name for name in row if name.endswith("_ids")]
    if objective in PROMPT_OBJECTIVES:
        names = ["prompt_ids"] if objective == "dro" else ["prompt_ids", "response_ids"]
    return sum(len(row[name]) for name in names)


def _tokenize_example(
    tokenizer: Any, render: PromptRenderer, example: TrainingExample
) -> dict[str, list[int]]:
    """Return one row of the trainer's dataset, in the columns of TRL."""
    prompt_ids = list(render(example.chat))
    response_ids = _tokenize_response(tokenizer, example.response)
    if example.rejected is None:
        mask = [0] * len(prompt_ids) + [1] * len(response_ids)
        return {"input_ids": prompt_ids + response_ids, "completion_mask": mask}
    return {
        "prompt_ids": prompt_ids,
        "chosen_ids": response_ids,
        "rejected_ids": _tokenize_response(tokenizer, example.rejected),
    }


def _tokenize_contrast(
    tokenizer: Any, render: PromptRenderer, example: TrainingExample
) -> dict[str, list[int]]:
    """Return one row of the dataset of an objective of hidden states; nothing is rejected if it is benign."""
    rejected = example.rejected
    return {
        "prompt_ids": list(render(example.chat)),
        "response_ids": _tokenize_response(tokenizer, example.response),
        "rejected_ids": [] if rejected is None else _tokenize_response(tokenizer, rejected),
    }


def _tokenize_response(tokenizer: Any, response: TargetResponse) -> list[int]:
    """Return the token ids of a response, with the end token if it is complete."""
    ids = list(tokenizer.encode(response.text, add_special_tokens=False))
    return [*ids, tokenizer.eos_token_id] if response.is_complete else ids
