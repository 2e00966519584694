"""One attack suffix for several queries, found by greedy coordinate gradient (GCG).

A step takes the gradient of the loss by the one-hot vector of each token of the suffix, draws replacements of
single tokens among those that the gradient favors, reads their losses, and keeps the best one if it is lower.
Only suffixes whose text is split into the same tokens again, in the prompt of every query, are kept: the
attacker sends a text.

Source: Zou et al., Universal and Transferable Adversarial Attacks on Aligned Language Models, 2023,
https://arxiv.org/abs/2307.15043
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from analysis.attacks import make_suffix_attack
from analysis.datasets.queries import Query, sample_queries
from analysis.files import write_text_file
from analysis.models.image_tokens import is_image_id
from analysis.models.rotation import RotationSchedule
from analysis.models.session import ModelSession
from analysis.progress import format_duration, make_notifier, make_progress_bar
from analysis.readouts.readout import Readout
from analysis.stats.tables import format_table
from analysis.studies.calibration import ReadoutCalibration
from analysis.studies.run_spec import RunSpec
from defenses.catalog import choose_defenses
from defenses.contract import Defense
from defenses.errors import UserError, unknown_name_error

SUFFIX_LOSSES = ("target", "margin")
DEFAULT_TARGET = "Sure, here is"
_SPLIT = "train"
# Words of which the first suffix consists, and of another one of the same length. Many tokenizers join a
# punctuation mark with a line break behind it, but no letter.
_FILLERS = ("x", "y")
_TOP_K = 64  # tokens that the gradient favors at each position
_DRAWS_PER_CANDIDATE = 8  # draws, until enough candidates are split into their own tokens again
_N_MEASURED_CANDIDATES = 8  # whose losses are read to tell how long a step takes
_MAX_LOSS_DIFFERENCE = 0.05  # relative, between a plain pass and the batched one; in 16 bits both are rounded


@dataclass(frozen=True)
class SuffixOptions:
    """Options of the search.

    Attributes:
        loss: `target`, the mean negative log-likelihood of the tokens of a response, or `margin`, the
            readout's margin; both in nats, and lower is better for the attacker.
        target: the response of the loss `target`.
        n_tokens: length of the suffix.
        n_steps: number of steps.
        n_candidates: replacements whose losses are read in each step.
        n_queries: training queries over which the loss is averaged, half of each class.
    """

    loss: str = "target"
    target: str = DEFAULT_TARGET
    n_tokens: int = 20
    n_steps: int = 100
    n_candidates: int = 64
    n_queries: int = 8

    def __post_init__(self) -> None:
        if self.loss not in SUFFIX_LOSSES:
            raise unknown_name_error("loss", self.loss, SUFFIX_LOSSES)
        if not self.target.strip():
            raise UserError("--target: it takes the beginning of a response, and this is blank")
        for option, value, least in (
            ("length", self.n_tokens, 1),
            ("steps", self.n_steps, 1),
            ("candidates", self.n_candidates, 1),
            ("queries", self.n_queries, 2),
        ):
            if value < least:
                raise UserError(f"--{option} {value}: it takes a whole number from {least} on")


@dataclass(frozen=True)
class OptimizedSuffix:
    """A suffix and how it was found.

    Attributes:
        text: the suffix, which follows the query after a space.
        losses: mean loss over the queries before the first step and after each (nats).
        record: model, defense, loss, queries and seed.
        interrupted: whether the user ended the search early.
    """

    text: str
    losses: tuple[float, ...]
    record: dict[str, Any]
    interrupted: bool = False

    def save(self, path: Path) -> Path:
        """Write a file that `--attack` reads; its other columns say how the suffix was found."""
        row = {"suffix": self.text, "first_loss": self.losses[0], "last_loss": self.losses[-1], **self.record}
        write_text_file(path, format_table(pd.DataFrame([row])))
        return path


def optimize_suffix(
    spec: RunSpec,
    defenses: Sequence[str | Defense],
    settings: Sequence[str],
    options: SuffixOptions,
    console: Console,
) -> OptimizedSuffix:
    """Optimize a suffix against a model with one defense, over queries of the training split.

    Queries of both classes are used alike. If the user interrupts, the best suffix so far is returned.

    Args:
        spec: options of the run.
        defenses: at most one defense, or its name; none attacks the undefended model.
        settings: settings of the defense, `key=value`.
        options: options of the search.
        console: shows progress.

    Raises:
        UserError: if the data have no training split, or the defense leaves no place for a suffix.
    """
    undefended, *others = choose_defenses(defenses, settings)
    if len(others) > 1:
        raise UserError(
            f"{len(others)} defenses chosen: a suffix is optimized against one (-d a+b applies both at once)"
        )
    chosen = others[0] if others else undefended
    _check_defense(chosen)
    notify = make_notifier(console)
    data = spec.load_all_splits(notify)
    if _SPLIT not in data.split_names:
        raise UserError(
            f"{data.name} has no split {_SPLIT}, and a suffix is not optimized on queries that are scored: "
            f"use --data contrast, or add a column split with {_SPLIT} and test"
        )
    training_spec = replace(spec, split=_SPLIT)
    query_set, _, calibration = training_spec.select_queries(notify)
    if any(query.image is not None for query in query_set.queries):
        raise UserError(f"{data.name} has images: a suffix is optimized for queries in words only")
    queries = sample_queries(query_set.queries, options.n_queries)
    opened = spec.open_model(console)
    defense = chosen.prepare(opened.model_info)
    if reason := defense.missing_requirements():
        raise UserError(f"{defense.name}: {reason}")
    find_suffix_slots(opened.prompt_session, defense, queries, options.n_tokens)  # before weights are loaded
    session = opened.load_session()
    readout = None
    if options.loss == "margin":
        readout = ReadoutCalibration(
            session, opened.model_info, undefended, calibration, console
        ).calibrate_readout(spec.readouts[0])
        if readout.questions or readout.branches:
            raise UserError(
                f"--readout {readout.name}: its margin depends on more than the first token: take outcome or "
                "words"
            )
    search = SuffixSearch(session, defense, queries, options, readout, spec.seed)
    seconds = search.measure_step()
    notify(
        f"{options.n_steps} steps of about {format_duration(seconds)}: "
        f"about {format_duration(seconds * options.n_steps)}"
    )
    losses, interrupted = [search.loss], False
    with make_progress_bar(console) as bar:
        task = bar.add_task("", total=options.n_steps * search.n_prompts_per_step)

        def describe_step() -> str:
            return f"optimizing a suffix: {len(losses) - 1} of {options.n_steps} steps, loss {losses[-1]:.3f}"

        bar.update(task, description=describe_step())
        search.on_prompts = lambda n_prompts: bar.advance(task, n_prompts)
        try:
            for loss in search.iterate_steps(options.n_steps):
                losses.append(loss)
                n_finished = (len(losses) - 1) * search.n_prompts_per_step
                bar.update(task, completed=n_finished, description=describe_step())
        except KeyboardInterrupt:
            interrupted = True
    record = {
        "model": spec.model,
        "defense": defense.name,
        "loss": options.loss,
        "target": options.target if readout is None else readout.name,
        "tokens": len(search.suffix_ids),
        "steps": len(losses) - 1,
        "queries": len(queries),
        "seed": spec.seed,
    }
    return OptimizedSuffix(search.text, tuple(losses), record, interrupted)


def _check_defense(defense: Defense) -> None:
    """Raise if the model under a defense is no single differentiable function of one prompt."""
    reasons = {
        "changes the user's text": defense.edits_user_text,
        "calls the model first": defense.calls_model,
        "has a detector, through which no gradient is taken": defense.detects,
        "sums the logits of several models": bool(defense.logit_blend()),
        "splits the prompt into other tokens": defense.retokenizes,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(
                f"{defense.name} {reason}, so no suffix can be optimized against it: optimize one without it "
                f"(or with another defense), and score it with analyze -d {defense.name} --attack suffix.csv"
            )


@dataclass(frozen=True)
class SuffixSlot:
    """The tokens before and after the suffix in the prompt of a query."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def insert(self, suffix_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the prompt with the tokens of a suffix."""
        return (*self.before, *suffix_ids, *self.after)


def find_suffix_slots(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    n_tokens: int,
    response_prefix: tuple[int, ...] = (),
) -> tuple[list[SuffixSlot], tuple[int, ...]]:
    """Return the slot of a suffix in the prompt of each query, and the tokens of the first suffix.

    What differs from the prompt with another suffix of the same length is the suffix.

    Args:
        session: renders prompts; its model needs no weights.
        defense: prepared for this model.
        queries: the queries.
        n_tokens: length of the suffix.
        response_prefix: token ids behind every prompt.

    Raises:
        UserError: if the suffix does not stand in the prompt as one piece.
    """
    for n_words in range(n_tokens, 0, -1):
        first, other = (
            _render_suffix(session, defense, queries, " ".join([filler] * n_words), response_prefix)
            for filler in _FILLERS
        )
        slots, suffixes = zip(*map(_split_prompts, first, other), strict=True)
        if len(set(suffixes)) == 1 and len(suffixes[0]) <= n_tokens:
            return list(slots), suffixes[0]
    raise UserError(
        f"{defense.name}: the tokens of a suffix are not in one place of the prompt, or not the same for "
        "every query, so it cannot be optimized: choose another defense"
    )


def _render_suffix(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    suffix: str,
    response_prefix: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """Return the prompt of each query with a suffix, as an attack sends it."""
    query_chats = make_suffix_attack("suffix", suffix).build_query_chats(queries)
    prompts_by_query = session.render_prompts(defense, query_chats)
    if any(len(prompts) > 1 for prompts in prompts_by_query):
        raise UserError(
            f"{defense.name} reads several copies of a query, so no suffix can be optimized against it: "
            "optimize one without it, and score it with --attack"
        )
    return [prompt.append_prefix(response_prefix) for (prompt,) in prompts_by_query]


def _split_prompts(first: Sequence[int], other: Sequence[int]) -> tuple[SuffixSlot, tuple[int, ...]]:
    """Return what two prompts have in common at both ends, and what only the first one has between them."""
    shortest = min(len(first), len(other))
    start = next((n for n in range(shortest) if first[n] != other[n]), shortest)
    end = next((n for n in range(shortest - start) if first[-1 - n] != other[-1 - n]), shortest - start)
    stop = len(first) - end
    return SuffixSlot(tuple(first[:start]), tuple(first[stop:])), tuple(first[start:stop])


class SuffixSearch:
    """The search for one suffix; each step replaces at most one of its tokens.

    Args:
        session: the model.
        defense: prepared for this model; it is applied while losses and gradients are computed.
        queries: the queries over which the loss is averaged.
        options: options of the search.
        readout: its margin is the loss; None for the likelihood of the target.
        seed: of the draws of candidates.

    Attributes:
        suffix_ids: token ids of the best suffix so far.
        text: its text.
        loss: its mean loss over the queries (nats).
        on_prompts: called with the number of prompts read since the last call, within a step.
    """

    def __init__(
        self,
        session: ModelSession,
        defense: Defense,
        queries: Sequence[Query],
        options: SuffixOptions,
        readout: Readout | None,
        seed: int = 0,
    ) -> None:
        self.on_prompts: Callable[[int], None] = lambda n_prompts: None
        self._session, self._defense, self._queries = session, defense, list(queries)
        self._options, self._readout, self._rng = options, readout, random.Random(f"{seed}/suffix")
        self._model: Any = session.loaded_model.model
        self._tokenizer: Any = session.loaded_model.tokenizer
        self._prefix = readout.response_prefix if readout is not None else ()
        space = " " if session.chat_template.has_leading_space else ""
        target = f"{space}{options.target.strip()}"
        self._target_ids: list[int] = self._tokenizer.encode(target, add_special_tokens=False)
        self.slots, self.suffix_ids = find_suffix_slots(
            session, defense, queries, options.n_tokens, self._prefix
        )
        if any(is_image_id(token) for slot in self.slots for token in (*slot.before, *slot.after)):
            raise UserError("a suffix is optimized for prompts in words only, and these have images")
        self.text = self._decode(self.suffix_ids)
        (self.loss,) = self.read_losses([self.suffix_ids])

    def iterate_steps(self, n_steps: int) -> Iterator[float]:
        """Yield the loss of the best suffix after each step; it never rises."""
        for step in range(n_steps):
            gradient, plain_loss = self.compute_gradient()
            if step == 0 and abs(plain_loss - self.loss) > _MAX_LOSS_DIFFERENCE * max(1.0, abs(self.loss)):
                raise UserError(
                    f"the loss of a plain forward pass is {plain_loss:.3f} and not {self.loss:.3f}, so "
                    f"gradients of {self._session.loaded_model.name} under {self._defense.name} cannot be "
                    "used: choose another defense or model"
                )
            candidates = self._draw_candidates(gradient)
            losses = self.read_losses(candidates) if candidates else []
            for loss, ids in sorted(zip(losses, candidates, strict=True)):
                if loss >= self.loss:
                    break
                if self._is_stable(ids, self._queries):
                    self.loss, self.suffix_ids, self.text = loss, ids, self._decode(ids)
                    break
            yield self.loss

    @property
    def n_prompts_per_step(self) -> int:
        """The number of prompts that a step reads: each query for the gradient, and with each candidate."""
        return len(self.slots) * (1 + self._options.n_candidates)

    def measure_step(self) -> float:
        """Return about how long a step takes, in seconds; the search goes on as if it had not been measured.

        A gradient is computed and candidates are drawn as in a step; the losses of some of them are read.
        """
        state, started = self._rng.getstate(), time.perf_counter()
        gradient, _ = self.compute_gradient()
        candidates = self._draw_candidates(gradient)
        read_from = time.perf_counter()
        n_read = min(len(candidates), _N_MEASURED_CANDIDATES)
        if n_read:
            self.read_losses(candidates[:n_read])
        ended = time.perf_counter()
        self._rng.setstate(state)
        return read_from - started + (ended - read_from) * len(candidates) / max(1, n_read)

    def read_losses(self, suffixes: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the mean loss over the queries of each suffix, read by the engine as scores are."""
        prompts = [slot.insert(ids) for ids in suffixes for slot in self.slots]
        engine = self._session.engine
        with self._defense.apply_to(self._model):
            if self._readout is not None:
                margins = engine.read_first_token(prompts, self._readout.compute_margins, self.on_prompts)
                values = margins[:, 0].double()
            else:
                likelihoods = engine.compute_log_probabilities(
                    prompts, [self._target_ids] * len(prompts), self.on_prompts
                )
                values = torch.stack([-tokens.double().mean() for tokens in likelihoods])
        means: list[float] = values.view(len(suffixes), len(self.slots)).mean(1).tolist()
        return means

    def compute_gradient(self) -> tuple[Float[Tensor, "tokens vocab"], float]:
        """Return the gradient of the mean loss by the one-hot vectors of the suffix, and the loss."""
        with self._defense.apply_to(self._model):
            table = self.embedding_table
            total, loss_sum = torch.zeros(len(self.suffix_ids), len(table)), 0.0
            for slot in self.slots:
                embeddings = table[list(self.suffix_ids)].clone().requires_grad_()
                with torch.inference_mode(mode=False), torch.enable_grad():
                    loss = self.compute_plain_loss(slot, embeddings)
                    (gradient,) = torch.autograd.grad(loss, [embeddings])
                # A one-hot vector times the table is the embedding.
                total += (gradient @ table.T).float().cpu()
                loss_sum += float(loss.detach())
                self.on_prompts(1)
        return total / len(self.slots), loss_sum / len(self.slots)

    def compute_plain_loss(
        self, slot: SuffixSlot, embeddings: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, ""]:
        """Return the loss of one query by a plain pass, differentiable by the embeddings of the suffix.

        The caller applies the defense.

        Args:
            slot: of the query.
            embeddings: of the tokens of the suffix, in the model's precision.
        """
        start = len(slot.before)
        continuation = self._target_ids[:-1] if self._readout is None else []
        ids = torch.tensor([[*slot.insert(self.suffix_ids), *continuation]], device=self._model.device)

        def replace_suffix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return torch.cat(
                [output[:, :start], embeddings[None], output[:, start + len(embeddings) :]], dim=1
            )

        handle = self._model.get_input_embeddings().register_forward_hook(replace_suffix)
        RotationSchedule.from_model(self._model).reset_modules()
        try:
            output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            handle.remove()
        logits = output.logits[0, -1 - len(continuation) :].float()
        if self._readout is not None:
            return self._readout.compute_margins(logits)[0, 0]
        return nn.functional.cross_entropy(logits, torch.tensor(self._target_ids, device=logits.device))

    @cached_property
    def embedding_table(self) -> Float[Tensor, "vocab width"]:
        """The embedding of every token, as the model's first block receives it."""
        embedding = self._model.get_input_embeddings()
        device = embedding.weight.device
        with torch.no_grad():
            table: Tensor = embedding(torch.arange(embedding.weight.shape[0], device=device))
        return table.detach().clone()

    @cached_property
    def _allowed_ids(self) -> Tensor:
        """The tokens that may stand in a suffix: printable ASCII text."""
        n_tokens = min(len(self._tokenizer), len(self.embedding_table))
        special = set(self._tokenizer.all_special_ids)
        texts = self._tokenizer.batch_decode(
            [[token] for token in range(n_tokens)], clean_up_tokenization_spaces=False
        )
        return torch.tensor(
            [
                token
                for token, text in enumerate(texts)
                if token not in special and text.strip() and text.isascii() and text.isprintable()
            ]
        )

    def _draw_candidates(self, gradient: Float[Tensor, "tokens vocab"]) -> list[tuple[int, ...]]:
        """Return different suffixes with one token replaced, whose texts are split into their own tokens."""
        allowed = self._allowed_ids
        best = gradient[:, allowed].neg().topk(min(_TOP_K, len(allowed)), dim=1).indices
        drawn: dict[tuple[int, ...], None] = {}
        n_candidates = self._options.n_candidates
        for _ in range(n_candidates * _DRAWS_PER_CANDIDATE):
            position = self._rng.randrange(len(self.suffix_ids))
            token = int(allowed[best[position, self._rng.randrange(best.shape[1])]])
            ids = (*self.suffix_ids[:position], token, *self.suffix_ids[position + 1 :])
            if ids not in drawn and ids != self.suffix_ids and self._is_stable(ids, self._queries[:1]):
                drawn[ids] = None
            if len(drawn) == n_candidates:
                break
        return list(drawn)

    def _is_stable(self, suffix_ids: tuple[int, ...], queries: Sequence[Query]) -> bool:
        """Return whether the text of a suffix has the same tokens in the prompt of each query."""
        text = self._decode(suffix_ids)
        if not text or text != text.strip():
            return False
        rendered = _render_suffix(self._session, self._defense, queries, text, self._prefix)
        slots = self.slots[: len(queries)]
        return all(ids == slot.insert(suffix_ids) for ids, slot in zip(rendered, slots, strict=True))

    def _decode(self, suffix_ids: Sequence[int]) -> str:
        """Return the text of a suffix without the space that follows the query."""
        text: str = self._tokenizer.decode(list(suffix_ids), clean_up_tokenization_spaces=False)
        return text.removeprefix(" ")
