"""Options of a run, checked before anything heavy is imported, for the command line and the Python API."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.checkpoints.configuration import get_quantization_config
from analysis.checkpoints.weight_changes import ABLITERATED
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, QuerySet, choose_default_split
from analysis.files import lock_folder
from analysis.models.loading import limit_threads, silence_libraries
from analysis.progress import make_notifier, print_note
from analysis.served.address import ModelAddress, is_address
from defenses.adapters import fingerprint_queries
from defenses.errors import UserError, unknown_name_error

if TYPE_CHECKING:
    import pandas as pd

    from analysis.files import Notifier
    from analysis.models.loading import LoadedModel, ModelCheckpoint
    from analysis.models.session import ModelSession
    from defenses.contract import MeanActivations, ModelInfo, TrainingRequests

READOUT_DESCRIPTIONS = {
    "words": "refusing against complying first words, equal weights",
    "calibrated": "weights on first tokens, fitted to this model's own responses on the calibration split",
    "question": "Yes against No to the question whether to refuse the request, averaged over both orders",
    "outcome": "expected refusal of the first token, by what this model's responses with it say; not linear",
    "outcome-3": "the same, three tokens deep after openings that begin refusals and other responses alike",
    "log-odds": "log-odds of I and As against all other tokens (refusal direction paper); not linear",
    "prefilled-K": "the words readout after the first K tokens of a complying opener",
    "auto": "the readout that `analyze validate` found best for this model and these conditions",
}
_UNFITTED_READOUT = "words"  # of commands that choose none; it needs no responses of the model
_FORCED_PREFIX = "prefilled-"  # readouts that force how responses begin
PATCH_SITES = ("residual", "attention", "mlp", "heads")  # activation sites of `analyze mechanism`
BOTH_SPLITS = "calibration and test"  # split name of runs that select on one split and report on the other


def build_run_spec(
    model: str | Sequence[str],
    data: str | Sequence[str] | pd.DataFrame,
    split: str | None = None,
    limit: int | None = None,
    batch_size: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    offline: bool = False,
    attack: str | Sequence[str] | None = None,
    readout: str | Sequence[str] = _UNFITTED_READOUT,
    responses: str | int = "none",
    share_prefix: bool = True,
    template: str | None = None,
    answer_prefix: str | None = None,
    allows_served: bool = False,
    tokenizer: str | None = None,
) -> RunSpec:
    """Build a RunSpec, checking every option that can be checked before the model is loaded.

    >>> spec = build_run_spec("smollm2", "twins", batch_size="8", readout=["words", "prefilled-5", "words"])
    >>> spec.readouts, spec.batch_size
    (('words', 'prefilled-5'), 8)
    >>> build_run_spec("smollm2", "twins", batch_size="auto").batch_size is None
    True

    Args:
        model: short name, Hugging Face id, folder, or file, or the address of a served model, if allowed; a
            list holds exactly one.
        data: as `--data`, or a frame of queries; several names are joined.
        split: part of the data; None chooses the test split if there is one.
        limit: maximum number of queries.
        batch_size: prompts per forward pass, a number or its text; `auto` or None uses what fits.
        device: as `--device`.
        dtype: as `--dtype`.
        seed: random seed.
        offline: whether the network may not be used.
        attack: one attack or several; None sends queries unchanged.
        readout: the readout of a run, or the readouts to compare.
        responses: number of queries that are answered in each condition, `all`, `none`, or `auto`: all,
            except where the readout forces how responses begin.
        share_prefix: whether prompts may share the computation of their prefix.
        template: the chat template to use, as `--template`; None uses the only one or the default.
        answer_prefix: text between the prompt and the response, as `--answer-prefix`; None finds it.
        allows_served: whether the command does without weights.
        tokenizer: of a served model, as `--tokenizer`; None asks the server.

    Raises:
        UserError: if an option has no valid value.
    """
    from analysis.attacks import choose_attacks

    model_name, credentials = split_credentials(get_single_model(model))
    if is_address(model_name) and not allows_served:
        raise UserError(
            f"--model {model_name}: this needs the model's weights; a served model can be used with "
            "`analyze -d`, `analyze check`, `analyze validate` and `analyze depth`"
        )
    attacks = choose_attacks([attack] if isinstance(attack, str) else attack or ["direct"])
    if isinstance(readout, str):
        _check_single_readout(readout)
    names = (readout,) if isinstance(readout, str) else tuple(dict.fromkeys(readout))
    readouts = ("all",) if "all" in names else names
    size = _parse_batch_size(batch_size)
    queries: str | QuerySet
    if isinstance(data, Sequence):
        queries = data if isinstance(data, str) else "+".join(data)
    else:
        queries = QuerySet.from_frame(data)
    forces_opening = any(name.startswith(_FORCED_PREFIX) for name in readouts)
    max_responses = _parse_responses(responses, forces_opening)
    return RunSpec(
        model_name,
        queries,
        split,
        limit,
        size,
        device,
        dtype,
        seed,
        offline,
        attacks,
        readouts,
        max_responses,
        share_prefix,
        template,
        answer_prefix,
        tokenizer,
        credentials,
    )


def split_credentials(model: str) -> tuple[str, tuple[str, str] | None]:
    """Return a model's name without credentials, and those in the address of a served model.

    >>> split_credentials("http://me:secret@gpu/v1#m"), split_credentials("smollm2")
    (('http://gpu/v1#m', ('me', 'secret')), ('smollm2', None))
    """
    if not is_address(model):
        return model, None
    address = ModelAddress.parse(model, "--model")
    return str(address), address.credentials


def get_single_model(models: str | Sequence[str]) -> str:
    """Return the model of a command that takes one.

    >>> get_single_model("smollm2"), get_single_model(["smollm2"])
    ('smollm2', 'smollm2')

    Raises:
        UserError: if there are several, or none.
    """
    if isinstance(models, str):
        return models
    if len(models) != 1:
        raise UserError(
            f"-m {', '.join(models) or '(none)'}: this command takes one model; only `analyze` itself takes "
            "several"
        )
    return models[0]


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights are loaded when they are first needed.

    Attributes:
        checkpoint: its files; None for a served model.
        model_info: what defenses may know about it.
        prompt_session: renders prompts; its model holds no weights.
        load_session: returns the session with the weights, loaded by the first call.
    """

    checkpoint: ModelCheckpoint | None
    model_info: ModelInfo
    prompt_session: ModelSession
    load_session: Callable[[], ModelSession]

    @property
    def trained_on(self) -> frozenset[str]:
        """Fingerprints of the queries that the weights depend on, as far as they are known."""
        if self.checkpoint is None:
            return frozenset()
        if self.checkpoint.weight_change != ABLITERATED:
            return self.checkpoint.trained_on
        texts = [query.text for query in load_training_queries()]
        return self.checkpoint.trained_on | frozenset(fingerprint_queries(texts))


@dataclass(frozen=True)
class RunSpec:
    """Everything that the user chose for a run, except the defenses; the options are checked when it is made.

    Attributes:
        model: short name, Hugging Face id, folder, or file; or the address of a served model.
        data: name of the data, or the queries themselves.
        split: part of the data; None chooses the test split if there is one.
        limit: maximum number of queries.
        batch_size: prompts per forward pass; None uses what fits in memory.
        device: as `--device`.
        dtype: as `--dtype`.
        seed: random seed.
        offline: whether the network may not be used.
        attacks: attacks under which every defense is scored.
        readouts: names of the readouts.
        max_responses: maximum number of queries whose responses are generated and judged in each condition;
            None for all.
        share_prefix: whether prompts may share the computation of their prefix.
        template: name or file of the chat template; None uses the only one or the default.
        answer_prefix: text between the prompt and the response; None finds it.
        tokenizer: of a served model, as `--tokenizer`; None asks the server.
        credentials: of a served model's address, which are stored nowhere.
    """

    model: str
    data: str | QuerySet
    split: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    offline: bool = False
    attacks: tuple[Attack, ...] = (DIRECT_ATTACK,)
    readouts: tuple[str, ...] = (_UNFITTED_READOUT,)
    max_responses: int | None = 0
    share_prefix: bool = True
    template: str | None = None
    answer_prefix: str | None = None
    tokenizer: str | None = None
    credentials: tuple[str, str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in self.readouts:
            _check_readout_name(name)
        if self.tokenizer is not None and not is_address(self.model):
            raise UserError(f"--tokenizer {self.tokenizer}: only a served model takes one")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: it takes auto or a whole number from 1 on")
        if self.max_responses is not None and self.max_responses < 0:
            raise UserError(f"--responses {self.max_responses}: it takes auto, all, none or a whole number")
        forced = [name for name in self.readouts if name.startswith(_FORCED_PREFIX)]
        if forced and self.max_responses != 0:
            raise UserError(
                f"--responses with --readout {forced[0]}: this readout forces how responses begin, so their "
                "refusal rate would not be the model's; use another readout"
            )

    def select_model(self, model: str) -> RunSpec:
        """Return the same options for another model; a tokenizer is named for a served one only."""
        name, credentials = split_credentials(model)
        tokenizer = self.tokenizer if is_address(name) else None
        return replace(self, model=name, credentials=credentials, tokenizer=tokenizer)

    def load_all_splits(self, notify: Notifier = lambda text: None) -> QuerySet:
        """Return the whole data set, all splits included.

        Args:
            notify: prints a line before anything is downloaded.
        """
        return load_queries(self.data, self.offline, notify) if isinstance(self.data, str) else self.data

    def select_queries(self, notify: Notifier = lambda text: None) -> tuple[QuerySet, str, QuerySet]:
        """Return the queries to score, the name of their split, and the calibration queries of the readout.

        A readout belongs to a model, so it is made from the same queries whatever is scored: the shipped
        calibration split, unless the user's data have a calibration split of their own.

        Args:
            notify: prints a line before anything is downloaded.
        """
        data = self.load_all_splits(notify)
        calibration = (
            data.select_calibration() or load_queries("contrast").select_split("calibration")
        ).check_both_classes()
        if self.split == BOTH_SPLITS:
            halves = data.split_calibration_test(self.seed)
            selected = [
                query
                for name in ("calibration", "test")
                for query in halves.select_split(name).limit_queries(self.limit).check_both_classes().queries
            ]
            return replace(halves, queries=tuple(selected)), BOTH_SPLITS, calibration
        split = self.split or choose_default_split(data)
        return data.select_split(split).limit_queries(self.limit).check_both_classes(), split, calibration

    def open_model(self, console: Console) -> OpenedModel:
        """Find the model's files and load its tokenizer; the weights are loaded when they are needed.

        Args:
            console: shows progress.
        """
        if is_address(self.model):
            return self._open_served_model(console)
        from analysis.judges.guard_models import open_guard
        from analysis.mechanism.abliteration import remove_refusal_direction
        from analysis.mechanism.directions import load_mean_activations
        from analysis.models.cache import (
            DeferredModel,
            ScoreCache,
            describe_loaded_model,
            get_score_cache_path,
            read_cached_json,
            write_cached_json,
        )
        from analysis.models.chat_template import ChatTemplate
        from analysis.models.loading import build_model_info, open_checkpoint
        from analysis.models.numerics import check_short_prompt
        from analysis.models.session import ModelSession

        silence_libraries(self.offline)
        notify = make_notifier(console)
        with console.status(f"opening {self.model}"):
            checkpoint = open_checkpoint(
                self.model,
                self.device,
                self.dtype,
                self.offline,
                notify,
                self.template,
                lambda tokenizer: ChatTemplate(tokenizer, self.answer_prefix).check_usable(),
            )
            prompt_session = ModelSession.from_model(
                checkpoint.build_without_weights(), seed=self.seed, answer_prefix=self.answer_prefix
            )
            check_short_prompt(prompt_session)
        model_info = build_model_info(
            self.model, checkpoint.tokenizer, self.seed, checkpoint.origin["sha256"]
        )

        def record_activations(session: ModelSession) -> MeanActivations:
            queries = load_training_queries()
            return load_mean_activations(
                session, [query.text for query in queries], [query.harmful for query in queries]
            )

        def abliterate(loaded: LoadedModel) -> str:
            session = ModelSession.from_model(
                loaded, self.batch_size, self.seed, answer_prefix=self.answer_prefix
            )
            activations = record_activations(session)
            remove_refusal_direction(session, activations)
            return activations.sha256[:16]

        outline = prompt_session.loaded_model

        @cache
        def load_session() -> ModelSession:
            limit_threads()  # the number of threads is part of the keys of costs
            score_cache = ScoreCache(get_score_cache_path())
            record_path = self._locate_model_record(checkpoint, outline)
            record = read_cached_json(record_path, dict)
            with console.status(f"loading {self.model}"):
                loaded = (
                    replace(checkpoint.load_weights(abliterate), share_prefix=self.share_prefix)
                    if record is None
                    else DeferredModel(outline, record, self.share_prefix, load_deferred_weights)
                )
                session = ModelSession.from_model(
                    loaded, self.batch_size, self.seed, score_cache, self.answer_prefix
                )
                if record is None:
                    check_short_prompt(session)
                    write_cached_json(record_path, describe_loaded_model(loaded, session.engine.notices))
            if problem := score_cache.describe_problem():
                print_note(
                    console,
                    f"{problem}: nothing that this run computes is kept for later runs; `analyze cache "
                    "--clear` removes a damaged cache",
                )
            return session

        def load_deferred_weights() -> Any:
            with console.status(f"loading {self.model}"):
                loaded = checkpoint.load_weights()
                check_short_prompt(replace(prompt_session, loaded_model=loaded))
            return loaded.model

        def compute_mean_activations() -> MeanActivations:
            session = load_session()
            with console.status("recording activations on the training queries"):
                return record_activations(session)

        model_info = replace(
            model_info,
            offline=self.offline,
            notify=notify,
            compute_mean_activations=cache(compute_mean_activations),
            load_training_requests=cache(partial(_load_training_requests, load_session)),
            open_guard=cache(partial(open_guard, self.device, self.dtype, self.offline, notify)),
        )
        return OpenedModel(checkpoint, model_info, prompt_session, load_session)

    def _open_served_model(self, console: Console) -> OpenedModel:
        """Find a served model and its tokenizer, and what its server tells of the first token."""
        from analysis.judges.guard_models import open_guard
        from analysis.models.cache import ScoreCache, get_score_cache_path
        from analysis.models.chat_template import ChatTemplate
        from analysis.models.loading import build_model_info
        from analysis.models.session import ModelSession
        from analysis.served.served_model import open_served_model

        silence_libraries(self.offline)
        notify = make_notifier(console)
        address = replace(ModelAddress.parse(self.model, "--model"), credentials=self.credentials)
        with console.status(f"asking {address.host}"):
            model, engine = open_served_model(
                address,
                self.tokenizer,
                self.offline,
                notify,
                self.template,
                lambda tokenizer: ChatTemplate(tokenizer, self.answer_prefix).check_usable(),
                self.answer_prefix,
            )
        session = ModelSession.from_model(
            model,
            seed=self.seed,
            score_cache=ScoreCache(get_score_cache_path()),
            answer_prefix=self.answer_prefix,
            engine=engine,
        )
        model_info = replace(
            # A colon in the name is no state of the weights.
            build_model_info(address.model.replace(":", "-"), model.tokenizer, self.seed),
            adapter_folders=(),
            offline=self.offline,
            notify=notify,
            load_training_requests=cache(partial(_load_training_requests, lambda: session)),
            open_guard=cache(partial(open_guard, self.device, self.dtype, self.offline, notify)),
        )
        return OpenedModel(None, model_info, session, lambda: session)

    def _locate_model_record(self, checkpoint: ModelCheckpoint, outline: LoadedModel) -> Path | None:
        """Return the cache file of what loading this model told; None if it must be loaded in every run.

        Args:
            checkpoint: the model's files.
            outline: the model without weights.
        """
        from analysis.models.cache import make_json_cache_path

        # What they compute with, or how images are read, is known only once the weights are loaded.
        if checkpoint.weight_change or checkpoint.processor or get_quantization_config(checkpoint.config):
            return None
        key = {
            **checkpoint.describe_loading(),
            "name": self.model,
            "batch_size": str(self.batch_size),
            "share_prefix": self.share_prefix,
        }
        return make_json_cache_path("models", outline, key)


@cache
def load_training_queries() -> tuple[Query, ...]:
    """Return the shipped queries to which directions and detectors are fitted, whatever is scored."""
    return load_queries("contrast").select_split("train").queries


def _load_training_requests(load_session: Callable[[], ModelSession]) -> TrainingRequests:
    """Return the training queries as detectors read them with the model of a session."""
    from analysis.models.requests import load_training_requests

    queries = load_training_queries()
    return load_training_requests(
        load_session(),
        [query.text for query in queries],
        [query.harmful for query in queries],
        [query.pair for query in queries],
    )


def parse_sites(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of activation sites and return them."""
    for name in names:
        if name not in PATCH_SITES:
            raise unknown_name_error("site", name, PATCH_SITES)
    return tuple(names)


def parse_share(share: str | float) -> float:
    """Return a share, given as a percentage or as a number from 0 to 1.

    >>> parse_share("5%"), parse_share("0.05"), parse_share(0.05)
    (0.05, 0.05, 0.05)

    Raises:
        UserError: if it is no share.
    """
    if isinstance(share, str):
        number = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", share.strip())
        value = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    else:
        value = share
    if not 0 <= value <= 1:
        raise UserError(f"--max-over-refusal {share}: it takes a share, such as 5% or 0.05")
    return value


def check_max_cost(max_cost: float | None) -> None:
    """Raise if no defense can have a cost this small."""
    if max_cost is not None and not max_cost >= 1:
        raise UserError(f"--max-cost {max_cost:g}: the undefended model costs 1, so it takes 1 or more")


def check_control_draws(n_draws: int) -> None:
    """Raise if an interval cannot be computed from this number of draws."""
    from analysis.stats.matched_controls import MIN_CONTROL_DRAWS

    if n_draws != 0 and n_draws < MIN_CONTROL_DRAWS:
        raise UserError(f"--controls {n_draws}: it takes 0 (none) or {MIN_CONTROL_DRAWS} and more")


def check_worker_count(n_workers: int) -> None:
    """Raise if no model could be analyzed by this number of workers."""
    if n_workers < 1:
        raise UserError(f"--workers {n_workers}: it takes 1 or more")


def check_mechanism_options(top: int, patched: int) -> None:
    """Raise if the number of components or of patched queries is not usable."""
    if top < 1:
        raise UserError(f"--top {top}: it takes 1 or more")
    if patched < 0 or patched == 1:
        raise UserError(f"--patched {patched}: it takes 0 (none) or 2 and more, a harmful and a benign query")


def check_ensemble_options(size: int, stacks: int) -> None:
    """Raise if the size of ensembles or the number of stacks is not usable."""
    if size not in (2, 3):
        raise UserError(f"--size {size}: an ensemble has 2 or 3 members at most")
    if stacks < 0:
        raise UserError(f"--stacks {stacks}: it takes 0 (none) or more")


def check_response_tokens(max_new_tokens: int) -> None:
    """Raise if responses would have no token to judge."""
    if max_new_tokens < 1:
        raise UserError(f"--tokens {max_new_tokens}: a response that is judged has at least 1")


def check_training_overlap(query_set: QuerySet, trained_on: frozenset[str], weights_name: str) -> None:
    """Raise if weights would be evaluated on queries that they were trained on.

    Args:
        query_set: the queries to score.
        trained_on: fingerprints of the training queries.
        weights_name: name of the weights in the error.
    """
    from defenses.adapters import fingerprint_queries

    seen = [query for query in query_set.queries if fingerprint_queries([query.text])[0] in trained_on]
    if seen:
        raise UserError(
            f"{weights_name} was trained on {len(seen)} of these queries ({seen[0].id}, …), so its results "
            "would mean nothing: use --split test, or other data"
        )


def choose_run_folder(model: str, labels: Sequence[str], started: datetime) -> Path:
    """Return the default output folder of a run: time, model and labels, and a number if another run has it.

    Args:
        model: name, id, folder, or file of the model.
        labels: the command and its defenses; the first three enter the name.
        started: start of the run.
    """
    label = "-".join(Path(name).stem for name in labels[:3])
    name = ModelAddress.parse(model, "--model").model if is_address(model) else model
    parts = [f"{started:%Y%m%d-%H%M%S}", Path(name).name.removesuffix(".gguf").replace(":", "-"), label]
    folder, number = Path("runs") / "-".join(parts), 2
    while folder.exists() or not lock_folder(folder):
        folder, number = folder.with_name(f"{'-'.join(parts)}-{number}"), number + 1
    return folder


def _check_readout_name(name: str) -> None:
    """Raise if no readout has this name."""
    fixed_names = {*READOUT_DESCRIPTIONS, "all"} - {"prefilled-K"}
    n_tokens = name.removeprefix("prefilled-")
    if name not in fixed_names and (n_tokens == name or not re.fullmatch("[1-9][0-9]*", n_tokens)):
        raise unknown_name_error(
            "readout", name, READOUT_DESCRIPTIONS, " (K is a number of tokens, as in prefilled-5)"
        )


def _check_single_readout(name: str) -> None:
    """Raise if a run that uses exactly one readout cannot use this one."""
    if name == "all":
        raise UserError("--readout all: a run uses one; `analyze validate --readout all` compares them")


def _parse_responses(responses: str | int, forces_opening: bool) -> int | None:
    """Return the number of responses per condition; None for all."""
    if responses == "auto":
        return 0 if forces_opening else None
    if responses == "all":
        return None
    if responses == "none":
        return 0
    if not str(responses).isdecimal():
        raise UserError(f"--responses {responses}: it takes auto, all, none or a whole number")
    return int(str(responses))


def _parse_batch_size(batch_size: str | int | None) -> int | None:
    """Return the batch size as a number; None uses what fits in memory."""
    if batch_size in ("auto", None):
        return None
    if not str(batch_size).isdecimal():
        raise UserError(f"--batch-size {batch_size}: it takes auto or a whole number from 1 on")
    return int(str(batch_size))
