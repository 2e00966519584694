"""Causes: what one run holds where its answer begins is put into the other run (activation patching).

Only the last position is patched, and nothing after it exists, so all that stands before it is computed once;
then the last token is read for all sites at once, a row of the batch for each. Attribution patching
(https://arxiv.org/abs/2310.10348) guesses the effect of every head from one backward pass through that token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from analysis.mechanism.watching import Change, Tap, at, watched
from analysis.tables import Part
from defenses import Defense
from defenses.errors import UserError, out_of_memory

if TYPE_CHECKING:
    from analysis.bench import Bench
    from analysis.mechanism.lens import Anatomy
    from analysis.readout import Readout

ROWS = 128  # copies of a last token in one pass
Ids = tuple[int, ...]
Vector = Tensor  # what is held at one position: the stream's width, or that of a head
States = dict[Part, Vector]
Patch = tuple[Part, Vector]


@dataclass(frozen=True)
class Patcher:
    """Who puts activations of one run into another, prompt by prompt.

    Args:
        bench: the model.
        anatomy: where its parts lie.
        readout: how logits become a margin.
    """

    bench: Bench
    anatomy: Anatomy
    readout: Readout

    def sites(self, kinds: Sequence[str], heads: Sequence[Part] = ()) -> list[Part]:
        """Return the sites of some kinds in every layer, and some heads.

        Args:
            kinds: of residual (what leaves a block), attention, mlp.
            heads: that are patched by themselves.
        """
        layers = range(len(self.anatomy.layers))
        return [*(Part(kind, number) for kind in kinds for number in layers), *heads]

    def states(self, defense: Defense, prompts: Sequence[Ids], sites: Sequence[Part]) -> list[States]:
        """Return what a run holds at every site, at the end of each of its prompts."""
        taps = {site: self._tap(site) for site in sites}
        found: dict[int, States] = {}
        engine = self.bench.engine
        armed = defense.armed(self.bench.loaded.model)
        with torch.inference_mode(), armed, watched(engine, taps) as held:
            for rows, _ in engine.sweep(prompts, [1] * len(prompts)):
                for place, row in enumerate(rows):
                    found[row] = {site: self._of_head(site, held[site][place]) for site in sites}
        return [found[row] for row in range(len(prompts))]

    def margins(
        self,
        defense: Defense,
        prompts: Sequence[Ids],
        patches: Iterable[Sequence[Patch]],
        done: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "prompts patches"]:
        """Return the margin of each prompt under each of its patches, each by itself.

        Args:
            defense: of the run that is patched.
            prompts: of that run.
            patches: for each prompt where, and what is held there instead.
            done: told when a prompt is finished.
        """
        found = []
        size = ROWS
        with torch.inference_mode(), defense.armed(self.bench.loaded.model):
            for prompt, mine in zip(prompts, patches, strict=True):
                with _enough_memory(prompt):
                    read = self.bench.engine.repeating(prompt)
                rows: list[Tensor] = []
                while (start := sum(map(len, rows))) < len(mine):
                    some = mine[start : start + size]
                    try:
                        rows.append(self._margins(read, some))
                    except RuntimeError as error:
                        if not out_of_memory(error) or len(some) == 1:
                            with _enough_memory(prompt):
                                raise
                        size = len(some) // 2
                found.append(torch.cat(rows))
                done()
        return torch.stack(found)

    def _margins(self, read: Callable[[int], Tensor], patches: Sequence[Patch]) -> Float[Tensor, " patches"]:
        """The margins of one prompt under some patches, in one pass."""
        with ExitStack() as stack:
            for tap, change in self._changes(patches):
                stack.enter_context(at(tap, change))
            return self.readout.read(read(len(patches)))[:, 0]

    def slopes(self, prompt: Ids) -> States:
        """Return how fast the margin changes with what each head holds at the end of a prompt.

        Args:
            prompt: of the model as it stands.
        """
        model, number = self.bench.loaded.model, len(prompt) - 1
        ids = torch.tensor([prompt], device=model.device)
        places = torch.arange(len(prompt), device=model.device)[None]
        cache = DynamicCache(config=model.config)
        entered: dict[int, Tensor] = {}

        def keep(layer: int) -> Change:
            return lambda states: entered.update({layer: states})

        with ExitStack() as stack:
            stack.enter_context(_enough_memory(prompt))
            with torch.no_grad():
                model(
                    input_ids=ids[:, :number],
                    attention_mask=torch.ones_like(ids[:, :number]),
                    position_ids=places[:, :number],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            first: Tap = (self.anatomy.layers[0].block, "enters")
            stack.enter_context(at(first, lambda states: states.detach().requires_grad_()))
            for layer, one in enumerate(self.anatomy.layers):
                stack.enter_context(at((one.joined, "enters"), keep(layer)))
            with torch.enable_grad():
                logits = model(
                    input_ids=ids[:, number:],
                    attention_mask=torch.ones_like(ids),
                    position_ids=places[:, number:],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
                margin = self.readout.read(logits.float())[0, 0]
                slopes = torch.autograd.grad(margin, list(entered.values()))
        return {
            head: self._of_head(head, slope[0, -1])
            for layer, slope in zip(entered, slopes, strict=True)
            for head in self.heads(layer)
        }

    def heads(self, layer: int) -> list[Part]:
        """Return the heads of a layer."""
        return [Part("head", layer, head) for head in range(self.anatomy.heads)]

    def placebo(self, site: Part, base: Vector, source: Vector, key: str) -> Vector:
        """Return what `base` would be if it were moved as far as to `source`, in a random direction.

        Args:
            site: where.
            base: what is held there.
            source: what a patch would put there.
            key: what else the direction depends on, such as seed and query.
        """
        made = torch.Generator().manual_seed(random.Random(f"{key}/{site}").getrandbits(62))
        step = torch.randn(base.shape, generator=made).to(base)
        return base + step * ((source - base).norm() / step.norm())

    def _tap(self, site: Part) -> Tap:
        assert site.layer is not None
        layer = self.anatomy.layers[site.layer]
        if site.kind == "head":
            return layer.joined, "enters"
        return {"residual": layer.block, "attention": layer.attention, "mlp": layer.mlp}[site.kind], "leaves"

    def _of_head(self, site: Part, held: Vector) -> Vector:
        return held if site.head is None else held.unflatten(0, (self.anatomy.heads, -1))[site.head]

    def _changes(self, patches: Sequence[Patch]) -> list[tuple[Tap, Change]]:
        """What is done at each tap to a batch with a row for each patch."""
        taps: dict[Tap, list[int]] = {}
        for row, (site, _) in enumerate(patches):
            taps.setdefault(self._tap(site), []).append(row)

        def changed(rows: list[int]) -> Callable[[Tensor], Tensor]:
            def change(states: Tensor) -> Tensor:
                new = states.clone()
                flat = new.view(-1, new.shape[-1])  # a token for each row, in a line or not
                for row in rows:
                    site, held = patches[row]
                    self._of_head(site, flat[row]).copy_(held)
                return new

            return change

        return [(tap, changed(rows)) for tap, rows in taps.items()]


@contextmanager
def _enough_memory(prompt: Ids) -> Iterator[None]:
    """While open, memory that runs out is told in words."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out with a prompt of {len(prompt)} tokens by itself: take --patched 0 (no "
            "interventions), --device cpu, or a smaller model"
        ) from error
