"""A margin as an exact sum over parts, and layer by layer (direct logit attribution, logit lens).

Every part's share is what it writes into the residual stream, read along the direction in which the final
norm and the unembedding read it; the scales of norms are frozen at what they are for this prompt. Parts add
up to the margin for every single prompt, or there is an error.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis import scoring
from analysis.mechanism.lens import LEFT
from analysis.mechanism.watching import Held, Tap, watched
from analysis.tables import TOLERANCE, Decomposition, Part
from defenses import Defense
from defenses.errors import UserError

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.mechanism.lens import Anatomy
    from analysis.queries import Query
    from analysis.readout import Readout

_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Split:
    """What one condition comes to, query by query.

    Attributes:
        margins: of each query, nats.
        by_layer: margin read off the stream that enters each block, and at last the final norm.
        parts: what each part adds to the margin; None in half precision, where nothing adds up.
    """

    margins: Float[np.ndarray, " queries"]
    by_layer: Float[np.ndarray, "queries layers"]
    parts: Decomposition | None


@dataclass(frozen=True)
class Splitter:
    """How the margins of one model are split.

    Args:
        anatomy: where its parts lie.
        readout: how logits become a margin; a linear one.
    """

    anatomy: Anatomy
    readout: Readout

    @property
    def exact(self) -> bool:
        """Whether sums come out: half precision rounds what each block hands on."""
        return self.anatomy.model.dtype in _EXACT

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Embedding, heads, MLPs, biases, and what a defense adds between blocks."""
        found = [Part("embedding")]
        for number in range(len(self.anatomy.layers)):
            found.append(Part("added", number))
            found += [Part("head", number, head) for head in range(self.anatomy.heads)]
            found += [Part("bias", number), Part("mlp", number)]
        return (*found, Part("added", len(self.anatomy.layers)), Part("bias"))

    def split(self, bench: Bench, defense: Defense, queries: Sequence[Query]) -> Split:
        """Return the margins of all queries under one defense, split.

        Args:
            bench: the model, and how queries are sent.
            defense: prepared for it.
            queries: what is asked.
        """
        bench = bench.asking(self.readout.questions)
        prompts = bench.every_prompt(defense, queries)
        owner = torch.tensor([row for row, readings in enumerate(prompts) for _ in readings])
        flat = [prompt.followed(self.readout.prefix) for readings in prompts for prompt in readings]
        found: Tensor = sum(
            weight * self._values(bench, one, flat) for weight, one in scoring.members(defense)
        )  # type: ignore[assignment]
        pooled = []
        for row in range(len(queries)):
            # What is asked about a reading has one mean.
            mine = found[owner == row].unflatten(0, (-1, max(1, len(self.readout.questions)))).mean(1)
            pooled.append(mine[mine[:, 0].argmax()] if defense.pool == "max" else mine.mean(0))
        table = torch.stack(pooled).numpy()
        margins, layers, parts = np.split(table, [1, len(self.anatomy.layers) + 2], axis=1)
        total = Decomposition(self.parts, parts, margins[:, 0]) if self.exact else None
        return Split(margins[:, 0], layers, total)

    def _values(self, bench: Bench, defense: Defense, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Of every prompt: margin, margins by layer, parts."""
        engine = bench.engine
        values: dict[int, Tensor] = {}
        first: Tap = (self.anatomy.layers[0].block, "enters")
        # Hooks see what those before them have done: the first is open before the defense has any.
        with (
            watched(engine, {"embedding": first}) as early,
            defense.armed(bench.loaded.model),
            watched(engine, self._taps) as held,
        ):
            for rows, read in engine.batches(prompts, lambda logits: self._read(held | early, logits)):
                values.update(zip(rows, read, strict=True))
        found = torch.stack([values[row] for row in range(len(prompts))])
        if self.exact and defense.arms() == "":
            # Between the blocks of an untouched model nothing is added: else it has parts that nobody knows.
            added = [
                place
                for place, part in enumerate(self.parts, found.shape[1] - len(self.parts))
                if part.kind == "added"
            ]
            _refuse_off(found[:, added].abs(), type(self.anatomy.model).__name__, "what its blocks hand on")
        return found

    @cached_property
    def _taps(self) -> dict[Hashable, Tap]:
        taps: dict[Hashable, Tap] = {}
        for number, layer in enumerate(self.anatomy.layers):
            taps["stream", number] = layer.block, "enters"
            taps["joined", number] = layer.joined, "enters"
            taps["attention", number] = layer.attention, "leaves"
            taps["mlp", number] = layer.mlp, "leaves"
            if layer.behind is not None:
                taps["before", number] = layer.behind.module, "enters"
        taps["stream", len(self.anatomy.layers)] = self.anatomy.final.module, "enters"
        taps["normed"] = self.anatomy.final.module, "leaves"
        return taps

    def _read(self, held: Held, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows values"]:
        margin = self.readout.read(logits)[:, 0]
        layers, final = len(self.anatomy.layers), self.anatomy.final
        streams = [held["stream", number] for number in range(layers + 1)]
        by_layer = [
            self.anatomy.margin(final.apart(stream), self.readout).double().cpu() for stream in streams
        ]
        found = [margin[:, None], torch.stack(by_layer, 1)]
        name = type(self.anatomy.model).__name__
        if self.exact:
            _refuse_off((by_layer[-1] - margin).abs(), name, "the margin read behind its last block")
            shares = self._shares(held, streams).double().cpu()
            _refuse_off((shares.sum(1) - margin).abs(), name, "the sum of its parts")
            found.append(shares)
        return torch.cat(found, 1)

    def _shares(self, held: Held, streams: Sequence[Tensor]) -> Float[Tensor, "rows parts"]:
        """What each part adds to the margin, in the order of `parts`."""
        final = self.anatomy.final
        # Where the layers of a model are spread over devices, what they held is brought to one.
        home = self.anatomy.unembedding.weight.device
        held = {name: states.to(home) for name, states in held.items()}
        streams = [states.to(home) for states in streams]
        read, constant = self.anatomy.direction(held["normed"], self.readout)
        along = final.back(read, final.scale(streams[-1], held["normed"]))

        def share(states: Tensor) -> Tensor:
            return (states.float() * along).sum(1)

        handed_on = held["embedding"]
        found = [share(handed_on)]
        for number, layer in enumerate(self.anatomy.layers):
            found.append(share(streams[number] - handed_on))
            handed_on = streams[number] + held["attention", number] + held["mlp", number]
            inner, bias = along, torch.zeros_like(constant)
            if (norm := layer.behind) is not None:
                bias = bias + share(norm.bias(along).expand_as(along))
                scale = norm.scale(held["before", number], held["attention", number])
                inner = norm.back(inner, scale)
            if layer.joined_bias is not None:
                bias = bias + inner @ layer.joined_bias.to(inner.device)
            each = layer.heads_along(inner) * held["joined", number].float()
            heads = each.unflatten(1, (self.anatomy.heads, -1)).sum(2)
            found += [*heads.unbind(1), bias, share(held["mlp", number])]
        found += [share(streams[-1] - handed_on), constant + read @ final.bias(read)]
        return torch.stack(found, 1)


def _refuse_off(off: Tensor, name: str, what: str) -> None:
    """Raise where what was computed is not the margin."""
    if not (worst := float(off.max())) <= TOLERANCE:
        raise UserError(
            f"{name}: {what} misses the margin by {worst:.2g} nats, where {TOLERANCE} is allowed, so this "
            f"model is not built as it seems, and nothing is said about its parts; {LEFT}"
        )
