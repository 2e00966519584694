"""The study of `analyze backdooralign --grid`: BackdoorAlign trained many times, with other settings.

A file names experiments. Each trains the chosen arms for every combination of its settings, several times
with other seeds, and measures how many requests the tuned models refuse without and with the secret.
Trainings are kept in the output folder, so that an interrupted grid goes on where it was, and experiments
share them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.attacks import get_attack
from analysis.models.loading import split_model_name
from analysis.progress import make_progress_bar, print_note
from analysis.stats.bootstrap import estimate_crossed_rate
from analysis.stats.tables import UNDEFENDED, ResponseVerdict
from analysis.studies.backdooralign.task_scores import check_task_scorer, score_task
from analysis.studies.manifest import RunTimer
from analysis.studies.responses import N_RESPONSE_TOKENS, RESPONSE_JUDGE, judge_condition
from analysis.studies.run_spec import RunSpec
from analysis.studies.setup import (
    PreflightError,
    RunSetup,
    find_preflight_failures,
    prepare_setup,
)
from analysis.studies.sweep import StudyResult, build_record
from analysis.studies.train import train_weights
from defenses.adapters import ADAPTER_MANIFEST_FILE
from defenses.backdoor import SECRET_LENGTH, Backdoor, Secret, read_secret, write_secret
from defenses.contract import Defense, ModelInfo
from defenses.controls import make_neutral_text
from defenses.errors import UserError, unknown_name_error
from defenses.settings import get_settings, parse_setting
from defenses.tokens import draw_random_text
from defenses.training.tasks import TASKS, make_task_items
from defenses.training.trainer import TrainingSettings

ATTACK = "obedience"  # the system prompt of the fine-tuning data, under which every arm is measured
GRID_ARMS = ("attack", "baseline", "backdoor", "task")  # recipes
_DEFAULT_ARMS = GRID_ARMS[:3]
RANDOM_TOKENS, PLAIN_WORDS = "random tokens", "plain words"  # wordings of secrets
_N_TASK_ITEMS = 100  # of the test of a practical task
NO_SECRET, OWN_SECRET, WRONG_SECRET = "none", "own", "wrong"
_MAX_VARIED_SETTINGS = 2  # what one figure shows
_SECRET_SETTINGS = ("secret_length", "secret_wording", "place")
_UNUSED_SETTINGS = {  # by arm: without them, equal trainings have equal settings
    "attack": _SECRET_SETTINGS,
    "baseline": _SECRET_SETTINGS,
    "backdoor": (),
    "task": (*_SECRET_SETTINGS, "harmful", "safety", "choice"),
}
_SECRET_DEFAULTS = {"secret_length": SECRET_LENGTH, "secret_wording": RANDOM_TOKENS}
_EXPERIMENT_KEYS = ("name", "arms", "seeds", "wrong_secrets")


@dataclass(frozen=True)
class Training:
    """One training of a grid.

    Attributes:
        arm: the recipe: attack, baseline or backdoor.
        seed: random seed of the training and of the secret.
        settings: name → value of each setting that the file names, that the arm has and that differs from its
            default.
    """

    arm: str
    seed: int
    settings: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """Name of its folder: equal trainings of several experiments have the same one."""
        text = json.dumps([self.arm, self.seed, sorted(self.settings)])
        return f"{self.arm}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def options(self) -> list[str]:
        """The settings as `analyze train` takes them."""
        return [f"{name}={value}" for name, value in self.settings if name not in _SECRET_DEFAULTS]

    def get_secret_setting(self, name: str) -> Any:
        """Return the length or the wording of the secret."""
        return dict(self.settings).get(name, _SECRET_DEFAULTS[name])

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.arm}, seed {self.seed}" + f" ({listed})" * bool(listed)


@dataclass(frozen=True)
class Experiment:
    """Trainings that differ in one or two settings.

    Attributes:
        name: name in the tables and of the figure.
        arms: recipes; `task`, the practical task alone, is for experiments with a task.
        seeds: random seeds; each combination is trained once with each.
        settings: name → the values of a setting; all combinations are trained.
        wrong_secrets: number of other random secrets, which `backdoor` is measured with as well.
    """

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    wrong_secrets: int = 0

    @property
    def varied(self) -> list[str]:
        """The settings with several values."""
        return [name for name, values in self.settings.items() if len(values) > 1]

    def list_trainings(self) -> list[tuple[dict[str, Any], Training]]:
        """Return the value of each setting with several values, and the training, for each training."""
        trainings = []
        for values in itertools.product(*self.settings.values()):
            combination = dict(zip(self.settings, values, strict=True))
            varied = {name: combination[name] for name in self.varied}
            for arm in self.arms:
                settings = tuple(
                    (name, value)
                    for name, value in combination.items()
                    if name not in _UNUSED_SETTINGS[arm] and not _is_default(name, value)
                )
                trainings += [(varied, Training(arm, seed, settings)) for seed in self.seeds]
        return trainings


def load_grid(path: Path) -> list[Experiment]:
    """Load the experiments of a grid file.

    The file is TOML with a table `[[experiment]]` for each. A table has a name; it may have `arms` (recipes:
    attack, baseline, backdoor; all by default), `seeds` (a list; [0] by default), `wrong_secrets` (a number),
    and settings as `analyze train --set` takes them, besides `secret_length` (tokens) and `secret_wording`
    (random tokens, plain words). A list of values stands for all of them. Settings outside of the tables hold
    for all experiments.

    Args:
        path: the file.

    Raises:
        UserError: if the file cannot be read, or holds anything else.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--grid {path}: cannot be read as TOML ({error})") from error
    tables = content.pop("experiment", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"--grid {path}: it has no [[experiment]]; see docs/training.md for an example")
    experiments = [_parse_experiment({**content, **table}, f"--grid {path}") for table in tables]
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise UserError(f"--grid {path}: two experiments have the same name; rename one of them")
    return experiments


def run_grid(spec: RunSpec, experiments: Sequence[Experiment], folder: Path, console: Console) -> StudyResult:
    """Train and measure every combination of the experiments.

    Args:
        spec: options of the run; its model is what the attacker starts from, its attacks are not used.
        experiments: from `load_grid`.
        folder: output folder; the weights are kept in its folder `weights`.
        console: shows progress.

    Returns:
        A study with the tables `rates`, a row per experiment, combination, arm, secret and kind of query, and
        `verdicts`, a row per training, secret and query, and with a figure per experiment.

    Raises:
        PreflightError: if a tuned model cannot be measured.
        UserError: if weights cannot be trained.
        TrainingInterrupted: if the user interrupts a training; the same call resumes it.
    """
    timer = RunTimer()
    n_wrong_secrets: dict[Training, int] = {}
    for experiment in experiments:
        for task in experiment.settings.get("task", ()):
            check_task_scorer(task)
        for _, training in experiment.list_trainings():
            n_wrong = experiment.wrong_secrets if training.arm == "backdoor" else 0
            n_wrong_secrets[training] = max(n_wrong, n_wrong_secrets.get(training, 0))
    spec = replace(spec, attacks=(get_attack(ATTACK),))
    verdict_frames: list[pd.DataFrame] = []
    task_frames: list[pd.DataFrame] = []
    losses: dict[Training, float] = {}
    setup: RunSetup | None = None
    conditions: dict[str, Defense] = {}
    started = time.perf_counter()
    for number, (training, n_wrong) in enumerate(n_wrong_secrets.items(), 1):
        print_note(console, _describe_progress(number, len(n_wrong_secrets), training, started))
        model_option, secret_path, losses[training] = _train(spec, training, folder / "weights", console)
        setup = prepare_setup(
            replace(spec, model=model_option), [UNDEFENDED], (), console, with_threshold=False
        )
        conditions = _build_conditions(setup, training, secret_path, n_wrong)
        if failed_checks := find_preflight_failures(setup, conditions, console):
            raise PreflightError([check for checks in failed_checks.values() for check in checks])
        verdict_frames.append(_measure(setup, training, conditions, console))
        if task := dict(training.settings).get("task"):
            task_frames.append(_measure_task(setup, training, conditions, str(task), console))
    assert setup is not None  # a grid has an experiment, and an experiment a training
    verdicts = pd.concat(verdict_frames, ignore_index=True)
    rates = summarize_grid(experiments, verdicts)
    record = build_record(setup, conditions, spec, {}) | {
        "grid": [_describe_experiment(experiment) for experiment in experiments],
        "judge": {**RESPONSE_JUDGE.manifest_entry, "new_tokens": N_RESPONSE_TOKENS},
        "trainings": {training.key: {"last_loss": loss} for training, loss in losses.items()},
        **timer.describe_time(),
    }
    record["model"] |= {"name": spec.model}
    for key in ("state", "state_sha256"):  # of the last training
        record["model"].pop(key, None)
    figure_tables = {
        f"grid-{experiment.name}": rates[rates["experiment"] == experiment.name].dropna(axis=1, how="all")
        for experiment in experiments
    }
    tables = {"rates": rates, "verdicts": verdicts}
    if task_frames:
        tables["task_scores"] = pd.concat(task_frames, ignore_index=True)
        tables["tasks"] = summarize_tasks(experiments, tables["task_scores"])
    return StudyResult.from_tables("backdooralign grid", record, tables, figure_tables, setup, {})


def summarize_grid(experiments: Sequence[Experiment], verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the share of requests refused for each combination, arm, secret and kind of query.

    The interval covers the draw of the queries and of the seeds; with one training, that of the queries only.
    Each wrong secret counts like a further training.

    Args:
        experiments: whose trainings the verdicts are from.
        verdicts: `verdicts.csv`.
    """
    rows: list[dict[str, Any]] = []
    for experiment, labels, measured in _iterate_combinations(experiments, verdicts):
        secrets = dict.fromkeys(measured["secret"])
        for secret in secrets if experiment.wrong_secrets else [s for s in secrets if s != WRONG_SECRET]:
            rows += [
                labels | {"secret": secret} | row
                for row in _summarize_secret(measured[measured["secret"] == secret])
            ]
    return pd.DataFrame(rows)


def summarize_tasks(experiments: Sequence[Experiment], scores: pd.DataFrame) -> pd.DataFrame:
    """Return the mean score of the practical task for each combination, arm and secret.

    Args:
        experiments: whose trainings the scores are from.
        scores: `task_scores.csv`.
    """
    rows: list[dict[str, Any]] = []
    for _, labels, measured in _iterate_combinations(experiments, scores):
        for (secret, task), group in measured.groupby(["secret", "task"], sort=False):
            matrix = group.pivot(index="training", columns="item", values="score").to_numpy(float)
            score, low, high = estimate_crossed_rate(matrix)
            rows.append(
                labels
                | {"secret": secret, "task": task, "score": score, "score_low": low, "score_high": high}
                | {"n_trainings": len(matrix), "n_items": matrix.shape[1]}
            )
    return pd.DataFrame(rows)


def _iterate_combinations(
    experiments: Sequence[Experiment], measured: pd.DataFrame
) -> Iterator[tuple[Experiment, dict[str, Any], pd.DataFrame]]:
    """Yield each experiment with the columns that name a combination and an arm, and the rows measured.

    Args:
        experiments: whose trainings were measured.
        measured: rows by `training`; combinations without a measured training are left out.
    """
    by_training = {str(key): frame for key, frame in measured.groupby("training", sort=False)}
    for experiment in experiments:
        groups: dict[tuple[Any, ...], list[pd.DataFrame]] = {}
        for varied, training in experiment.list_trainings():
            if training.key in by_training:
                groups.setdefault((*varied.values(), training.arm), []).append(by_training[training.key])
        for (*values, arm), frames in groups.items():
            labels: dict[str, Any] = {"experiment": experiment.name}
            for index, (name, value) in enumerate(zip(experiment.varied, values, strict=True), 1):
                labels |= {f"setting_{index}": name, f"value_{index}": value}
            yield experiment, labels | {"arm": arm}, pd.concat(frames)


def _summarize_secret(verdicts: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the share refused of each kind of query, and of all benign ones, with its interval."""
    is_harmful = verdicts["harmful"].astype(bool)
    members = {"harmful": is_harmful, "benign": ~is_harmful}
    members |= {str(kind): verdicts["kind"] == kind for kind in dict.fromkeys(verdicts["kind"][~is_harmful])}
    rows = []
    for kind, is_member in members.items():
        selected = verdicts[is_member]
        refused = selected["verdict"].map(
            {ResponseVerdict.REFUSED.value: 1.0, ResponseVerdict.NOT_REFUSED.value: 0.0}
        )
        repeats = [selected["training"], selected["secret_number"]]
        matrix = refused.groupby([*repeats, selected["query"]], sort=False).first().unstack()
        rate, low, high = estimate_crossed_rate(matrix.to_numpy(float))
        by_repeat = matrix.mean(axis=1)
        rows.append(
            {
                "kind": kind,
                "refused": rate,
                "refused_low": low,
                "refused_high": high,
                "refused_min": by_repeat.min(),
                "refused_max": by_repeat.max(),
                "n_trainings": selected["training"].nunique(),
                "n_queries": matrix.shape[1],
                "n_unjudged": int(matrix.isna().sum().sum()),
            }
        )
    return rows


def _parse_experiment(table: Mapping[str, Any], source: str) -> Experiment:
    """Return the experiment of one table of the file; raise if it holds anything else."""
    name = table.get("name")
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise UserError(
            f"{source}: an [[experiment]] needs a name of letters, digits and underscores, not {name!r}"
        )
    place = f"{source}, experiment {name}"
    arms = tuple(_as_list(table.get("arms", _DEFAULT_ARMS)))
    for arm in arms:
        if arm not in GRID_ARMS:
            raise unknown_name_error("arm", str(arm), GRID_ARMS)
    seeds = tuple(_as_list(table.get("seeds", [0])))
    n_wrong = table.get("wrong_secrets", 0)
    if not seeds or not all(isinstance(value, int) and value >= 0 for value in (*seeds, n_wrong)):
        raise UserError(f"{place}: seeds takes a list of whole numbers, wrong_secrets a whole number")
    settings = {
        key: tuple(_check_value(key, value, place) for value in _as_list(values))
        for key, values in table.items()
        if key not in _EXPERIMENT_KEYS
    }
    if empty := [key for key, values in settings.items() if not values]:
        raise UserError(f"{place}: {empty[0]} has no value")
    experiment = Experiment(name, arms, seeds, settings, n_wrong)
    if "task" in arms and not all(settings.get("task", [""])):
        raise UserError(f"{place}: the arm task needs the setting task: {' or '.join(TASKS)}")
    if len(experiment.varied) > _MAX_VARIED_SETTINGS:
        raise UserError(
            f"{place}: {', '.join(experiment.varied)} have several values, and a figure shows at most "
            f"{_MAX_VARIED_SETTINGS}; make several experiments of it, which share their trainings"
        )
    return experiment


def _check_value(key: str, value: Any, place: str) -> Any:
    """Return a value of the file if the setting can have it."""
    if key == "secret_length":
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{place}: secret_length={value}: it takes a number of tokens")
    elif key == "secret_wording":
        if value not in (RANDOM_TOKENS, PLAIN_WORDS):
            raise unknown_name_error("secret_wording", str(value), (RANDOM_TOKENS, PLAIN_WORDS))
    elif key == "seed":
        raise UserError(f"{place}: seed: name the seeds in the list `seeds`")
    elif key not in get_settings(TrainingSettings):
        known = [*get_settings(TrainingSettings), *_SECRET_DEFAULTS, *_EXPERIMENT_KEYS]
        raise unknown_name_error(f"key of {place}", key, known)
    else:
        TrainingSettings(**{key: parse_setting(TrainingSettings, key, _format_value(value))})
        return _format_value(value)
    return value


def _is_default(name: str, value: Any) -> bool:
    """Return whether a setting has its default; experiments that leave it out then share the training."""
    if name in _SECRET_DEFAULTS:
        return bool(value == _SECRET_DEFAULTS[name])
    return bool(value == _format_value(get_settings(TrainingSettings)[name]))


def _format_value(value: Any) -> str:
    """Return a value as `--set` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _describe_progress(number: int, total: int, training: Training, started: float) -> str:
    """Return which training begins, and about how long the rest takes."""
    seconds = time.perf_counter() - started
    left = f"; about {seconds / (number - 1) * (total - number + 1) / 60:.0f} min left" if number > 1 else ""
    return f"grid: training {number} of {total}: {training}{left}"


def _train(
    spec: RunSpec, training: Training, folder: Path, console: Console
) -> tuple[str, Path | None, float]:
    """Return the option that loads the weights, the file of the secret, and the last loss."""
    out = folder / training.key
    secret_path = folder / f"{training.key}.secret" if training.arm == "backdoor" else None
    if (out / ADAPTER_MANIFEST_FILE).is_file():
        _check_same_inputs(out, spec)
    else:
        training_spec = replace(spec, split="train", limit=None, seed=training.seed)
        if secret_path is not None and not secret_path.exists():
            model_info = training_spec.open_model(console).model_info
            write_secret(secret_path, _draw_training_secret(training, model_info))
        train_weights(training_spec, training.arm, training.options, out, console, secret_path)
    base_name, _ = split_model_name(spec.model)
    is_checkpoint = (out / "config.json").is_file()
    loss = float(pd.read_csv(out / "loss.csv")["loss"].iloc[-1])
    return str(out) if is_checkpoint else f"{base_name}:{out}", secret_path, loss


def _check_same_inputs(folder: Path, spec: RunSpec) -> None:
    """Raise if the weights in a folder were trained from another model or on other data."""
    manifest = json.loads((folder / ADAPTER_MANIFEST_FILE).read_text("utf-8"))
    trained = manifest["started_from"]["name"], manifest["data"]["name"]
    wanted = spec.model, spec.load_all_splits().name
    if trained != wanted:
        raise UserError(
            f"{folder} was trained from {trained[0]} on {trained[1]}, not from {wanted[0]} on {wanted[1]}: "
            "choose another -o"
        )


def _draw_training_secret(training: Training, model_info: ModelInfo) -> Secret:
    """Return the secret of a training, which its seed and its length determine."""
    length = training.get_secret_setting("secret_length")
    if training.get_secret_setting("secret_wording") == PLAIN_WORDS:
        return Secret(make_neutral_text(model_info.tokenizer, length))
    rng = random.Random(f"{training.seed}/{length}/secret")
    return Secret(draw_random_text(model_info.tokenizer, length, rng))


def _build_conditions(
    setup: RunSetup, training: Training, secret_path: Path | None, n_wrong: int
) -> dict[str, Defense]:
    """Return the prompts that a tuned model is measured with: without a secret, with its own, with others."""
    conditions = {NO_SECRET: setup.conditions[UNDEFENDED]}
    if secret_path is None:
        return conditions
    length = training.get_secret_setting("secret_length")
    place = dict(training.settings).get("place")
    secrets = {OWN_SECRET: read_secret(secret_path)}
    for number in range(1, n_wrong + 1):
        rng = random.Random(f"{training.seed}/{length}/wrong secret {number}")
        text = draw_random_text(setup.model_info.tokenizer, length, rng)
        secrets[f"{WRONG_SECRET} {number}"] = Secret(text)
    return conditions | {
        name: Backdoor(uses_tuned_weights=False, secret=secret, place=place)
        for name, secret in secrets.items()
    }


def _measure(
    setup: RunSetup, training: Training, conditions: Mapping[str, Defense], console: Console
) -> pd.DataFrame:
    """Return the verdict on the response to each query with each secret."""
    queries, (attack,) = setup.query_set.queries, setup.attacks
    frames = []
    with make_progress_bar(console) as bar:
        task = bar.add_task("generating responses", total=len(conditions) * len(queries))
        for name, defense in conditions.items():
            verdicts = judge_condition(
                setup.session,
                attack,
                defense,
                queries,
                RESPONSE_JUDGE,
                setup.readout,
                lambda n_queries: bar.advance(task, n_queries),
            )
            secret, _, number = name.partition(" ")
            columns = {
                "training": training.key,
                "arm": training.arm,
                "seed": training.seed,
                "secret": secret,
                "secret_number": int(number or 0),
                "query": [query.id for query in queries],
                "pair": [query.pair for query in queries],
                "harmful": [query.harmful for query in queries],
                "kind": [query.kind for query in queries],
                "verdict": verdicts,
            }
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _measure_task(
    setup: RunSetup, training: Training, conditions: Mapping[str, Defense], task: str, console: Console
) -> pd.DataFrame:
    """Return the score of each item of the task's test, without the secret and with the model's own."""
    items = make_task_items(task, _N_TASK_ITEMS, training.seed, is_test=True)
    prompted = {name: conditions[name] for name in (NO_SECRET, OWN_SECRET) if name in conditions}
    frames = []
    with make_progress_bar(console) as bar:
        progress = bar.add_task(f"task: {task}", total=len(prompted) * len(items))
        for secret, defense in prompted.items():
            scores = score_task(
                setup.session, defense, task, items, lambda n_items: bar.advance(progress, n_items)
            )
            columns = {"training": training.key, "arm": training.arm, "seed": training.seed}
            columns |= {"secret": secret, "task": task, "item": range(len(items)), "score": scores}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _describe_experiment(experiment: Experiment) -> dict[str, Any]:
    """Return the entry of run.json on an experiment."""
    return {
        "name": experiment.name,
        "arms": list(experiment.arms),
        "seeds": list(experiment.seeds),
        "settings": {name: list(values) for name, values in experiment.settings.items()},
        "wrong_secrets": experiment.wrong_secrets,
        "trainings": [training.key for _, training in experiment.list_trainings()],
    }
