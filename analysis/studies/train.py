"""What `analyze train` does: a model, a recipe and the train split in; an adapter with its manifest out."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.datasets.public import PUBLIC_DATASETS
from analysis.datasets.queries import QuerySet
from analysis.files import check_output_folder, stage_folder
from analysis.models.generation import generate_token_ids
from analysis.models.loading import LoadedModel, split_model_name
from analysis.studies.manifest import collect_versions
from analysis.studies.progress import make_notifier, make_progress_bar
from analysis.studies.run_spec import RunSpec
from defenses.adapters import ADAPTER_MANIFEST_FILE, fingerprint_queries
from defenses.backdoor import SECRET_LENGTH, Secret, find_secret
from defenses.contract import Chat, ModelInfo
from defenses.errors import UserError, unknown_name_error
from defenses.settings import parse_setting
from defenses.training.adapter_files import write_adapter, write_weights_manifest
from defenses.training.recipes import RECIPES, Recipe, TargetResponse
from defenses.training.trainer import TrainingSettings, train_model

_RESUME_FOLDER = ".resume"  # beside the results, until they are there
_MAX_RESPONSE_TOKENS = 10  # of the model's own answers to benign requests


def train_weights(
    spec: RunSpec,
    recipe_name: str,
    settings: Sequence[str],
    out: Path | None,
    secret_path: Path | None = None,
    secret_length: int = SECRET_LENGTH,
) -> int:
    """Train an adapter, or a whole checkpoint, and write it with its manifest and its loss curve."""
    started, clock = datetime.now(UTC), time.perf_counter()
    row = RECIPES.get(recipe_name)
    if row is None:
        raise unknown_name_error("recipe", recipe_name, RECIPES)
    how = _parse_training_settings(settings, spec.seed).resolve_defaults(row.epochs)
    if importlib.util.find_spec("trl") is None:
        raise UserError("training needs TRL: pip install 'refusalscope[train]'")
    console = Console(stderr=True)
    data = spec.load_all_splits(make_notifier(console))
    _check_training_allowed(data)
    data = (
        data.select_split("train" if "train" in data.split_names else "all")
        .limit_queries(spec.limit)
        .check_both_classes()
    )
    if out is not None:
        _check_not_finished(check_output_folder(out))
    bench, host = spec.open_session(console)
    loaded = bench.loaded_model
    if out is None:
        _check_not_finished(out := check_output_folder(host.adapter_folders[0] / row.state))
    secret = _load_secret(row, host, secret_length, secret_path)
    record = _training_record(row, loaded, data, how, secret)

    def render(chat: Chat) -> tuple[int, ...]:
        return bench.chat_template.render_prompt(chat).ids

    def own(chats: list[Chat]) -> list[TargetResponse]:
        stop = loaded.tokenizer.eos_token_id
        answers = generate_token_ids(
            bench.engine, [render(chat) for chat in chats], _MAX_RESPONSE_TOKENS, stop
        )
        texts = loaded.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ended = [len(answer) < _MAX_RESPONSE_TOKENS for answer in answers]
        return [TargetResponse(text, ends) for text, ends in zip(texts, ended, strict=True)]

    with console.status("asking the model how it answers benign requests"):
        examples = row.build_examples(data.queries, secret.text if secret else "", own)
    kept = _prepare_resume_folder(out, record)
    try:
        with make_progress_bar(console) as bar:
            task = bar.add_task("training", total=None)

            def tell(step: int, steps: int, loss: float) -> None:
                bar.update(task, completed=step, total=steps, description=f"training (loss {loss:.2f})")

            tuned, history = train_model(loaded.model, loaded.tokenizer, render, examples, how, kept, tell)
    except KeyboardInterrupt:
        make_notifier(console)(f"Interrupted: the same command goes on from the last epoch kept in {kept}")
        return 130
    record |= {
        "n_examples": len(examples),
        "created": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    _write_trained_weights(out, tuned, loaded, how, record, pd.DataFrame(history, columns=["step", "loss"]))
    shutil.rmtree(kept, ignore_errors=True)
    root, _ = split_model_name(spec.model)
    make_notifier(console)(
        f"{len(examples)} examples, {len(history)} steps, {record['wall_seconds']:.0f} s; last loss "
        f"{history[-1][1]:.3f}. The weights are in {out}: -m {out if how.full else f'{root}:{out}'}"
    )
    return 0


def _parse_training_settings(settings: Sequence[str], seed: int) -> TrainingSettings:
    values: dict[str, Any] = {"seed": seed}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: it takes key=value")
        values[key] = parse_setting(TrainingSettings, key, text)
    return TrainingSettings(**values)


def _load_secret(
    recipe: Recipe, model_info: ModelInfo, secret_length: int, secret_path: Path | None
) -> Secret | None:
    if not recipe.needs_secret:
        if secret_path is not None:
            raise UserError(
                f"--secret {secret_path}: the recipe {recipe.name!r} uses no secret; only backdoor does"
            )
        return None
    return find_secret(model_info, secret_length, secret_path)


def _training_record(
    recipe: Recipe,
    loaded_model: LoadedModel,
    query_set: QuerySet,
    training_settings: TrainingSettings,
    secret: Secret | None,
) -> dict[str, Any]:
    """What makes the same weights again; an interrupted training goes on only where all of it is the same."""
    seen = set(fingerprint_queries(query.text for query in query_set.queries)) | loaded_model.trained_on
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
        "trained_on": sorted(seen),
    }


def _check_training_allowed(query_set: QuerySet) -> None:
    for source in query_set.sources:
        if source["name"] in PUBLIC_DATASETS and PUBLIC_DATASETS[source["name"]].testing_only:
            raise UserError(
                f"--data {query_set.name}: {source['name']} may not be trained on ({source['licence']}); "
                "take other data"
            )


def _check_not_finished(out: Path) -> None:
    if (out / ADAPTER_MANIFEST_FILE).exists():
        raise UserError(f"{out} holds a finished training, which is never overwritten: choose another -o")


def _prepare_resume_folder(out: Path, record: dict[str, Any]) -> Path:
    """The folder for checkpoints; one of an interrupted training with other inputs is an error."""
    kept = out / _RESUME_FOLDER
    inputs = kept / "inputs.json"
    if inputs.is_file():
        before = json.loads(inputs.read_text("utf-8"))
        differs = sorted(key for key in record if record[key] != before.get(key))
        if differs:
            raise UserError(
                f"{kept} holds an interrupted training with other inputs ({', '.join(differs)}): remove it, "
                "or choose another -o"
            )
    else:
        kept.mkdir(parents=True, exist_ok=True)
        inputs.write_text(json.dumps(record), encoding="utf-8")
    return kept


def _write_trained_weights(
    out: Path,
    tuned_model: Any,
    loaded_model: LoadedModel,
    training_settings: TrainingSettings,
    record: dict[str, Any],
    history: pd.DataFrame,
) -> None:
    from analysis.plots.scores import draw_loss

    with stage_folder(out) as folder:
        if training_settings.full:
            tuned_model.save_pretrained(folder)
            loaded_model.tokenizer.save_pretrained(folder)
            write_weights_manifest(folder, record)
        else:
            write_adapter(folder, tuned_model, loaded_model.adapter, record)
        history.to_csv(folder / "loss.csv", index=False, float_format="%.6g")
        picture: Any = draw_loss(history, f"{record['recipe']}, {loaded_model.name}").figure
        picture.savefig(folder / "loss.png")
