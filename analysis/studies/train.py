"""The study of `analyze train`: fine-tune a model by a recipe; write the adapter with its manifest."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.datasets.public import PUBLIC_DATASETS
from analysis.datasets.queries import QuerySet
from analysis.files import check_output_folder, lock_folder, stage_folder, unlock_folder, write_text_file
from analysis.judges.judge import generate_verdicts
from analysis.judges.learned import LEARNED_JUDGE
from analysis.models.generation import generate_token_ids
from analysis.models.loading import LoadedModel, split_model_name
from analysis.models.session import ModelSession
from analysis.progress import format_duration, make_notifier, make_progress_bar, print_note
from analysis.studies.manifest import RunTimer, collect_versions
from analysis.studies.run_spec import RunSpec
from defenses.adapters import ADAPTER_MANIFEST_FILE, find_adapter, fingerprint_queries
from defenses.backdoor import SECRET_LENGTH, Secret, find_secret
from defenses.catalog import choose_defenses
from defenses.chats import get_last_user_text
from defenses.contract import Chat, Defense, ModelInfo, QueryChat
from defenses.errors import UserError, unknown_name_error
from defenses.none import Undefended
from defenses.settings import parse_setting
from defenses.soft_prompts import find_soft_prompt, name_soft_prompt, write_soft_prompt
from defenses.stack import list_members
from defenses.training.adapter_files import check_can_continue, write_adapter, write_weights_manifest
from defenses.training.recipes import RECIPES, Objective, Recipe, TargetResponse, TrainingExample
from defenses.training.soft_prompts import SoftPromptModel
from defenses.training.trainer import (
    StepReport,
    TrainingSettings,
    find_adapted_layers,
    find_last_checkpoint,
    train_model,
)
from defenses.tuned import TunedDefense

_DEFAULT_DATA = "contrast"  # that weights are trained on which the user does not train by name
_RESUME_FOLDER = ".resume"  # in the output folder, until the training is finished
_MEASURED_STEPS, _MEASURED_SECONDS = 3, 10  # after the first step, whichever ends first
_MAX_JUDGED_TOKENS = 16  # of responses whose refusals DRO learns from
_MAX_RESPONSE_TOKENS = 10  # maximum length of the model's own responses to benign queries


@dataclass
class RateMeter:
    """Measures how fast a training reads tokens in its first steps, to tell once how long it will take.

    Attributes:
        started: step and time (seconds) from which the rate is measured: the end of the first step, which is
            slower than others; None before it.
        is_told: whether the time has been told.
    """

    started: tuple[int, float] | None = None
    is_told: bool = False

    def estimate_time(self, report: StepReport, now: float | None = None) -> str:
        """Return the tokens of a training, their rate and the time that is left; empty if told or unknown.

        Args:
            report: the step that has ended.
            now: time in seconds; by default that of a clock.
        """
        now = time.perf_counter() if now is None else now
        if self.started is None:
            self.started = report.step, now
            return ""
        first_step, first_time = self.started
        n_measured = report.step - first_step
        if self.is_told or (n_measured < _MEASURED_STEPS and now - first_time < _MEASURED_SECONDS):
            return ""
        self.is_told = True
        seconds_per_step = (now - first_time) / n_measured
        rate = report.n_tokens / report.n_steps / max(seconds_per_step, 1e-9)
        left = format_duration(seconds_per_step * (report.n_steps - report.step))
        return f"{report.n_tokens:,} tokens in all epochs, {rate:,.0f} tokens/s: about {left} left"


class TrainingInterrupted(KeyboardInterrupt):
    """The user interrupted a training, which can be resumed.

    Attributes:
        folder: checkpoints of the interrupted training.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            f"Interrupted: the same command resumes from the last epoch, which is kept in {folder}"
        )


@dataclass(frozen=True)
class TrainedWeights:
    """Weights that a training has written.

    Attributes:
        folder: adapter, checkpoint or soft prompt, with its manifest and its loss curve.
        options: options of `analyze` that select the weights.
        manifest: content of the manifest.
        history: the loss by step.
    """

    folder: Path
    options: str
    manifest: dict[str, Any]
    history: pd.DataFrame

    def __str__(self) -> str:
        return (
            f"{self.manifest['n_examples']} examples, {len(self.history)} steps, "
            f"{self.manifest['wall_seconds']:.0f} s; last loss {self.history['loss'].iloc[-1]:.3f}. The "
            f"weights are in {self.folder}: {self.options}"
        )


def train_weights(
    spec: RunSpec,
    recipe_name: str,
    settings: Sequence[str],
    out: Path | None,
    console: Console,
    secret_path: Path | None = None,
    secret_length: int = SECRET_LENGTH,
) -> TrainedWeights:
    """Fine-tune a model; write an adapter or a whole checkpoint with its manifest and its loss curve.

    Args:
        spec: options of the run.
        recipe_name: name of the recipe.
        settings: settings of the training, `key=value`.
        out: output folder; None for the one in which defenses look for weights.
        console: shows progress.
        secret_path: file of the secret, for the recipe `backdoor`; None for the model's own secret.
        secret_length: length of the model's own secret in tokens.

    Raises:
        UserError: if an option has no valid value, or the output folder holds a finished training.
        TrainingInterrupted: if the user interrupts the training; the same call resumes it.
    """
    timer = RunTimer()
    recipe = RECIPES.get(recipe_name)
    if recipe is None:
        raise unknown_name_error("recipe", recipe_name, RECIPES)
    training_settings = _parse_training_settings(settings, spec.seed).resolve_defaults(
        recipe.epochs, recipe.rate
    )
    if training_settings.full and recipe.objective != "responses":
        raise UserError(
            f"--set full=true: the recipe {recipe.name!r} "
            + (
                "trains embeddings, and no weights"
                if recipe.learns_embeddings
                else "compares the model with and without an adapter, so it trains an adapter only"
            )
        )
    if importlib.util.find_spec("trl") is None:
        raise UserError("training needs TRL: pip install 'refusalscope[train]'")
    query_set = _load_training_queries(spec, console)
    if out is not None:
        _check_not_finished(check_output_folder(out))
    if secret_path is not None and not recipe.needs_secret:
        raise UserError(
            f"--secret {secret_path}: the recipe {recipe.name!r} uses no secret; only backdoor does"
        )
    opened = spec.open_model(console)
    model_info = opened.model_info
    checkpoint = opened.checkpoint
    if checkpoint is None:
        raise UserError(f"-m {spec.model}: a served model cannot be trained: name a model on this machine")
    if change := checkpoint.weight_change:
        raise UserError(
            f"-m {spec.model}: weights are trained for the model itself, so leave out :{change}; "
            f"{spec.model} then takes the trained weights on top"
        )
    if not training_settings.full and not recipe.learns_embeddings:
        find_adapted_layers(checkpoint.build_without_weights().model, training_settings.modules)
        if checkpoint.adapter is not None:
            check_can_continue(checkpoint.adapter)
    if out is None:
        name = name_soft_prompt(recipe.state, model_info.state) if recipe.learns_embeddings else recipe.state
        out = check_output_folder(model_info.adapter_folders[0] / name)
        _check_not_finished(out)
    if not lock_folder(out):
        raise UserError(f"{out}: another training that has not ended yet writes into it; choose another -o")
    try:
        _check_not_finished(out)  # by another process, which has ended since
        secret = find_secret(model_info, secret_length, secret_path) if recipe.needs_secret else None
        session = opened.load_session()
        loaded_model = session.loaded_model
        for notice in loaded_model.notices:
            print_note(console, notice)
        record = _training_record(recipe, loaded_model, query_set, training_settings, secret)

        def render(chat: Chat) -> tuple[int, ...]:
            return session.chat_template.render_prompt(chat).ids

        with console.status("generating the model's own responses to benign queries"):
            examples = recipe.build_examples(
                query_set.queries,
                secret.text if secret else "",
                lambda chats: _generate_own_responses(session, [render(chat) for chat in chats]),
                training_settings,
            )
        resume_folder = _prepare_resume_folder(out, record)
        if last := find_last_checkpoint(resume_folder):
            print_note(console, f"the interrupted training in {out} goes on from its {last.name}")
        n_epochs, batch = training_settings.epochs, training_settings.batch
        n_steps = math.ceil(len(examples) / batch) * (n_epochs or 1)
        print_note(
            console, f"training {recipe.name}: {len(examples)} examples, {n_steps} steps of up to {batch}"
        )
        tuned_model, losses = _fit_model(
            session, render, examples, training_settings, recipe.objective, resume_folder, console
        )
        record |= {"n_examples": len(examples), **timer.describe_time()}
        history = pd.DataFrame(losses, columns=["step", "loss"])
        _write_trained_weights(out, tuned_model, loaded_model, training_settings, record, history)
        shutil.rmtree(resume_folder, ignore_errors=True)
    finally:
        unlock_folder(out)
    base_name, _ = split_model_name(spec.model)
    if recipe.learns_embeddings:
        option = f"-m {spec.model} -d {recipe.name} --set {recipe.name}.weights={out}"
    else:
        option = f"-m {out}" if training_settings.full else f"-m {base_name}:{out}"
    return TrainedWeights(out, option, record, history)


def train_missing_weights(
    spec: RunSpec, defenses: Sequence[str | Defense], settings: Sequence[str], console: Console
) -> list[TrainedWeights]:
    """Train the weights that defenses lack and those that they are compared with, by their recipes.

    The weights are trained on the train split of the shipped queries, whatever is scored, and written to
    where defenses look for them. Weights that exist are kept.

    Args:
        spec: options of the run that needs the weights; it names the model.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        console: shows progress.

    Raises:
        UserError: if a training is not possible.
        TrainingInterrupted: if the user interrupts a training; the same call resumes it.
    """
    model_info = spec.open_model(console).model_info
    recipes = dict.fromkeys(
        recipe
        for defense in choose_defenses(defenses, settings)
        for member in list_members(defense)
        if isinstance(member, TunedDefense) and member.recipe in RECIPES and member.weights is None
        for recipe in (*member.reference_recipes, member.recipe)
        if not _has_weights(RECIPES[recipe], model_info)
    )
    training_spec = dataclasses.replace(spec, data=_DEFAULT_DATA, split="train", limit=None)
    trained = []
    for number, recipe in enumerate(recipes, 1):
        print_note(console, f"--train: recipe {recipe}, {number} of {len(recipes)}")
        trained.append(train_weights(training_spec, recipe, (), None, console))
    return trained


def _has_weights(recipe: Recipe, model_info: ModelInfo) -> bool:
    """Return whether a recipe's weights, or its soft prompt for this state of the model, exist."""
    find_weights = find_soft_prompt if recipe.learns_embeddings else find_adapter
    return find_weights(recipe.state, model_info) is not None


def _load_training_queries(spec: RunSpec, console: Console) -> QuerySet:
    """Return the train split of the data, or all of data without splits; raise if training is not allowed."""
    query_set = spec.load_all_splits(make_notifier(console))
    _check_training_allowed(query_set)
    split = "train" if "train" in query_set.split_names else "all"
    return query_set.select_split(split).limit_queries(spec.limit).check_both_classes()


def _generate_own_responses(
    session: ModelSession, prompts: Sequence[tuple[int, ...]]
) -> list[TargetResponse]:
    """Generate the model's own responses, and note which of them ended by themselves."""
    end_token_ids = session.loaded_model.end_token_ids
    responses = generate_token_ids(session.engine, prompts, _MAX_RESPONSE_TOKENS, end_token_ids)
    return [
        TargetResponse(session.chat_template.decode_response(response), len(response) < _MAX_RESPONSE_TOKENS)
        for response in responses
    ]


def _fit_model(
    session: ModelSession,
    render: Callable[[Chat], tuple[int, ...]],
    examples: Sequence[TrainingExample],
    training_settings: TrainingSettings,
    objective: Objective,
    resume_folder: Path,
    console: Console,
) -> tuple[Any, list[tuple[int, float]]]:
    """Fine-tune the model with a progress bar; return it and the loss by step."""
    with make_progress_bar(console) as bar:
        task = bar.add_task("training", total=None)

        def judge_refusals(chats: Sequence[Chat]) -> list[bool]:
            bar.update(task, total=len(chats), description="judging the model's responses")
            return _judge_refusals(session, chats, lambda n_chats: bar.advance(task, n_chats))

        rate_meter = RateMeter()

        def on_step(report: StepReport) -> None:
            description = f"training (loss {report.loss:.2f})"
            bar.update(task, completed=report.step, total=report.n_steps, description=description)
            if estimate := rate_meter.estimate_time(report):
                print_note(console, estimate)

        try:
            return train_model(
                session.loaded_model.model,
                session.loaded_model.tokenizer,
                render,
                examples,
                training_settings,
                objective,
                resume_folder,
                on_step,
                judge_refusals,
            )
        except KeyboardInterrupt as error:
            raise TrainingInterrupted(resume_folder) from error


def _judge_refusals(
    session: ModelSession, chats: Sequence[Chat], on_progress: Callable[[int], None]
) -> list[bool]:
    """Return whether the model's greedy response to each chat refuses."""
    query_chats = [QueryChat(f"training/{row}", chat) for row, chat in enumerate(chats)]
    requests = [get_last_user_text(chat) for chat in chats]
    verdicts = generate_verdicts(
        session,
        Undefended(),
        query_chats,
        requests,
        LEARNED_JUDGE,
        max_new_tokens=_MAX_JUDGED_TOKENS,
        on_progress=on_progress,
    )
    return [verdict.is_refusal for verdict in verdicts]


def _parse_training_settings(settings: Sequence[str], seed: int) -> TrainingSettings:
    """Parse `key=value` settings."""
    values: dict[str, Any] = {"seed": seed}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: it takes key=value")
        values[key] = parse_setting(TrainingSettings, key, text)
    return TrainingSettings(**values)


def _training_record(
    recipe: Recipe,
    loaded_model: LoadedModel,
    query_set: QuerySet,
    training_settings: TrainingSettings,
    secret: Secret | None,
) -> dict[str, Any]:
    """Return what reproduces the weights; an interrupted training resumes only if all of it is the same."""
    trained_on = set(fingerprint_queries(query.text for query in query_set.queries)) | loaded_model.trained_on
    return {
        "recipe": recipe.name,
        "base": {"id": loaded_model.origin["id"], "sha256": loaded_model.origin["sha256"]},
        "started_from": {
            "name": loaded_model.name,
            "state_sha256": loaded_model.origin.get("state_sha256", ""),
        },
        "dtype": str(loaded_model.model.dtype).removeprefix("torch."),
        "settings": json.loads(json.dumps(dataclasses.asdict(training_settings))),
        "secret": secret.fingerprint if secret else None,
        "data": {
            "name": query_set.name,
            "sha256": query_set.sha256,
            "split": "train",
            "n": len(query_set.queries),
        },
        "versions": collect_versions("refusalscope", "torch", "transformers", "peft", "trl"),
        "trained_on": sorted(trained_on),
    }


def _check_training_allowed(query_set: QuerySet) -> None:
    """Raise if the license of the data forbids training."""
    for source in query_set.sources:
        if source["name"] in PUBLIC_DATASETS and PUBLIC_DATASETS[source["name"]].testing_only:
            raise UserError(
                f"--data {query_set.name}: {source['name']} may not be trained on ({source['licence']}); "
                "use other data"
            )


def _check_not_finished(out: Path) -> None:
    """Raise if a folder holds finished weights."""
    if (out / ADAPTER_MANIFEST_FILE).exists():
        raise UserError(f"{out} holds a finished training, which is never overwritten: choose another -o")


def _prepare_resume_folder(out: Path, record: dict[str, Any]) -> Path:
    """Return the folder for checkpoints; raise if it belongs to a training with other inputs."""
    folder = out / _RESUME_FOLDER
    inputs = folder / "inputs.json"
    if inputs.is_file():
        try:
            earlier = dict(json.loads(inputs.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{inputs} is damaged ({error}): remove {folder}, or choose another -o"
            ) from error
        differs = sorted(key for key in record if record[key] != earlier.get(key))
        if differs:
            raise UserError(
                f"{folder} holds an interrupted training with other inputs ({', '.join(differs)}): remove "
                "it, or choose another -o"
            )
    else:
        write_text_file(inputs, json.dumps(record))
    return folder


def _write_trained_weights(
    out: Path,
    tuned_model: Any,
    loaded_model: LoadedModel,
    training_settings: TrainingSettings,
    record: dict[str, Any],
    history: pd.DataFrame,
) -> None:
    """Write weights, manifest and loss curve: all files, or, if one cannot be written, none."""
    from analysis.plots.scores import draw_loss

    with stage_folder(out, ADAPTER_MANIFEST_FILE) as folder:
        if isinstance(tuned_model, SoftPromptModel):
            write_weights_manifest(folder, write_soft_prompt(folder, tuned_model.embeddings, record))
        elif training_settings.full:
            tuned_model.save_pretrained(folder)
            loaded_model.tokenizer.save_pretrained(folder)
            write_weights_manifest(folder, record)
        else:
            write_adapter(folder, tuned_model, loaded_model.adapter, record)
        history.to_csv(folder / "loss.csv", index=False, float_format="%.6g")
        figure: Any = draw_loss(history, f"{record['recipe']}, {loaded_model.name}").figure
        figure.savefig(folder / "loss.png")
