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

from analysis import generation, manifest, saving, showing, states
from analysis.datasets import TABLE
from analysis.models import LoadedModel
from analysis.queries import QuerySet
from analysis.request import Request, teller
from defenses import Chat, Host, UserError, adapters
from defenses.backdoor import SECRET_LENGTH, Secret, find_secret
from defenses.errors import unknown
from defenses.settings import value
from defenses.training.keeping import write, write_manifest
from defenses.training.recipes import RECIPES, Answer, Recipe
from defenses.training.trainer import Settings
from defenses.training.trainer import train as fit

_KEPT = ".resume"  # beside the results, until they are there
_ANSWER_TOKENS = 10  # of the model's own answers to benign requests


def train(
    request: Request,
    recipe: str,
    settings: Sequence[str],
    out: Path | None,
    trigger: Path | None = None,
    length: int = SECRET_LENGTH,
) -> int:
    """Train an adapter, or a whole checkpoint, and write it with its manifest and its loss curve."""
    started, clock = datetime.now(UTC), time.perf_counter()
    row = RECIPES.get(recipe)
    if row is None:
        raise unknown("recipe", recipe, RECIPES)
    how = _settings(settings, request.seed).resolved(row.epochs)
    if importlib.util.find_spec("trl") is None:
        raise UserError("training needs TRL: pip install 'refusalscope[train]'")
    console = Console(stderr=True)
    data = request.asked(teller(console))
    _refuse_testing_only(data)
    data = data.split("train" if "train" in data.splits else "all").limit(request.limit).checked()
    if out is not None:
        _refuse_finished(saving.usable(out))
    bench, host = request.open(console)
    loaded = bench.loaded
    if out is None:
        _refuse_finished(out := saving.usable(host.adapters[0] / row.makes))
    secret = _secret(row, host, length, trigger)
    record = _record(row, loaded, data, how, secret)

    def render(chat: Chat) -> tuple[int, ...]:
        return bench.renderer.render(chat).ids

    def own(chats: list[Chat]) -> list[Answer]:
        stop = loaded.tokenizer.eos_token_id
        answers = generation.answers(bench.engine, [render(chat) for chat in chats], _ANSWER_TOKENS, stop)
        texts = loaded.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ended = [len(answer) < _ANSWER_TOKENS for answer in answers]
        return [Answer(text, ends) for text, ends in zip(texts, ended, strict=True)]

    with console.status("asking the model how it answers benign requests"):
        examples = row.make(data.queries, secret.text if secret else "", own)
    kept = _resumable(out, record)
    try:
        with showing.progress(console) as bar:
            task = bar.add_task("training", total=None)

            def tell(step: int, steps: int, loss: float) -> None:
                bar.update(task, completed=step, total=steps, description=f"training (loss {loss:.2f})")

            tuned, history = fit(loaded.model, loaded.tokenizer, render, examples, how, kept, tell)
    except KeyboardInterrupt:
        teller(console)(f"Interrupted: the same command goes on from the last epoch kept in {kept}")
        return 130
    record |= {
        "n_examples": len(examples),
        "created": started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 1),
    }
    _write(out, tuned, loaded, how, record, pd.DataFrame(history, columns=["step", "loss"]))
    shutil.rmtree(kept, ignore_errors=True)
    root, _ = states.split(request.model)
    teller(console)(
        f"{len(examples)} examples, {len(history)} steps, {record['wall_seconds']:.0f} s; last loss "
        f"{history[-1][1]:.3f}. The weights are in {out}: -m {out if how.full else f'{root}:{out}'}"
    )
    return 0


def _settings(given: Sequence[str], seed: int) -> Settings:
    values: dict[str, Any] = {"seed": seed}
    for setting in given:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: it takes key=value")
        values[key] = value(Settings, key, text)
    return Settings(**values)


def _secret(recipe: Recipe, host: Host, length: int, trigger: Path | None) -> Secret | None:
    if not recipe.needs_secret:
        if trigger is not None:
            raise UserError(
                f"--secret {trigger}: the recipe {recipe.name!r} uses no secret; only backdoor does"
            )
        return None
    return find_secret(host, length, trigger)


def _record(
    recipe: Recipe, loaded: LoadedModel, data: QuerySet, how: Settings, secret: Secret | None
) -> dict[str, Any]:
    """What makes the same weights again; an interrupted training goes on only where all of it is the same."""
    seen = set(adapters.fingerprints(query.text for query in data.queries)) | loaded.trained_on
    return {
        "recipe": recipe.name,
        "base": {"id": loaded.origin["id"], "sha256": loaded.origin["sha256"]},
        "started_from": {"name": loaded.name, "state_sha256": loaded.origin.get("state_sha256", "")},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "settings": json.loads(json.dumps(dataclasses.asdict(how))),
        "secret": secret.fingerprint if secret else None,
        "data": {"name": data.name, "sha256": data.sha256, "split": "train", "n": len(data.queries)},
        "versions": manifest.versions("refusalscope", "torch", "transformers", "peft", "trl"),
        "trained_on": sorted(seen),
    }


def _refuse_testing_only(data: QuerySet) -> None:
    for source in data.sources:
        if source["name"] in TABLE and TABLE[source["name"]].testing_only:
            raise UserError(
                f"--data {data.name}: {source['name']} may not be trained on ({source['licence']}); "
                "take other data"
            )


def _refuse_finished(out: Path) -> None:
    if (out / adapters.MANIFEST).exists():
        raise UserError(f"{out} holds a finished training, which is never overwritten: choose another -o")


def _resumable(out: Path, record: dict[str, Any]) -> Path:
    """The folder for checkpoints; one of an interrupted training with other inputs is an error."""
    kept = out / _KEPT
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


def _write(
    out: Path, tuned: Any, loaded: LoadedModel, how: Settings, record: dict[str, Any], history: pd.DataFrame
) -> None:
    from analysis.plots import loss

    with saving.beside(out) as folder:
        if how.full:
            tuned.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            write_manifest(folder, record)
        else:
            write(folder, tuned, loaded.adapter, record)
        history.to_csv(folder / "loss.csv", index=False, float_format="%.6g")
        picture: Any = loss(history, f"{record['recipe']}, {loaded.name}").figure
        picture.savefig(folder / "loss.png")
