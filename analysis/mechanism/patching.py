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

from analysis.mechanism.hooks import ActivationEdit, HookPoint, edit_activations, record_activations
from analysis.stats.tables import ModelPart
from defenses.contract import Defense
from defenses.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from analysis.mechanism.components import ModelComponents
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

PATCHES_PER_PASS = 128  # copies of a last token in one pass
PromptIds = tuple[int, ...]
Activation = Tensor  # what is held at one position: the stream's width, or that of a head
SiteActivations = dict[ModelPart, Activation]
ActivationPatch = tuple[ModelPart, Activation]


@dataclass(frozen=True)
class ActivationPatcher:
    """Who puts activations of one run into another, prompt by prompt.

    Args:
        session: the model.
        components: where its parts lie.
        readout: how logits become a margin.
    """

    session: ModelSession
    components: ModelComponents
    readout: Readout

    def list_sites(self, kinds: Sequence[str], heads: Sequence[ModelPart] = ()) -> list[ModelPart]:
        """Return the sites of some kinds in every layer, and some heads.

        Args:
            kinds: of residual (what leaves a block), attention, mlp.
            heads: that are patched by themselves.
        """
        layers = range(len(self.components.layers))
        return [*(ModelPart(kind, number) for kind in kinds for number in layers), *heads]

    def record_site_activations(
        self, defense: Defense, prompts: Sequence[PromptIds], sites: Sequence[ModelPart]
    ) -> list[SiteActivations]:
        """Return what a run holds at every site, at the end of each of its prompts."""
        taps = {site: self._hook_point(site) for site in sites}
        found: dict[int, SiteActivations] = {}
        engine = self.session.engine
        armed = defense.apply_to(self.session.loaded_model.model)
        with torch.inference_mode(), armed, record_activations(engine, taps) as held:
            for rows, _ in engine.iterate_logits(prompts, [1] * len(prompts)):
                for place, row in enumerate(rows):
                    found[row] = {site: self._select_head(site, held[site][place]) for site in sites}
        return [found[row] for row in range(len(prompts))]

    def compute_patched_margins(
        self,
        defense: Defense,
        prompts: Sequence[PromptIds],
        patches: Iterable[Sequence[ActivationPatch]],
        on_progress: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "prompts patches"]:
        """Return the margin of each prompt under each of its patches, each by itself.

        Args:
            defense: of the run that is patched.
            prompts: of that run.
            patches: for each prompt where, and what is held there instead.
            on_progress: told when a prompt is finished.
        """
        found = []
        size = PATCHES_PER_PASS
        with torch.inference_mode(), defense.apply_to(self.session.loaded_model.model):
            for prompt, mine in zip(prompts, patches, strict=True):
                with _explain_out_of_memory(prompt):
                    read = self.session.engine.make_last_token_reader(prompt)
                rows: list[Tensor] = []
                while (start := sum(map(len, rows))) < len(mine):
                    some = mine[start : start + size]
                    try:
                        rows.append(self._margins_in_one_pass(read, some))
                    except RuntimeError as error:
                        if not is_out_of_memory(error) or len(some) == 1:
                            with _explain_out_of_memory(prompt):
                                raise
                        size = len(some) // 2
                found.append(torch.cat(rows))
                on_progress()
        return torch.stack(found)

    def _margins_in_one_pass(
        self, read_logits: Callable[[int], Tensor], patches: Sequence[ActivationPatch]
    ) -> Float[Tensor, " patches"]:
        """The margins of one prompt under some patches, in one pass."""
        with ExitStack() as stack:
            for tap, change in self._edits_by_hook_point(patches):
                stack.enter_context(edit_activations(tap, change))
            return self.readout.compute_margins(read_logits(len(patches)))[:, 0]

    def compute_head_gradients(self, prompt: PromptIds) -> SiteActivations:
        """Return how fast the margin changes with what each head holds at the end of a prompt.

        Args:
            prompt: of the model as it stands.
        """
        model, number = self.session.loaded_model.model, len(prompt) - 1
        ids = torch.tensor([prompt], device=model.device)
        places = torch.arange(len(prompt), device=model.device)[None]
        cache = DynamicCache(config=model.config)
        entered: dict[int, Tensor] = {}

        def keep(layer: int) -> ActivationEdit:
            return lambda states: entered.update({layer: states})

        with ExitStack() as stack:
            stack.enter_context(_explain_out_of_memory(prompt))
            with torch.no_grad():
                model(
                    input_ids=ids[:, :number],
                    attention_mask=torch.ones_like(ids[:, :number]),
                    position_ids=places[:, :number],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            first: HookPoint = (self.components.layers[0].block, "enters")
            stack.enter_context(edit_activations(first, lambda states: states.detach().requires_grad_()))
            for layer, one in enumerate(self.components.layers):
                stack.enter_context(edit_activations((one.output_projection, "enters"), keep(layer)))
            with torch.enable_grad():
                logits = model(
                    input_ids=ids[:, number:],
                    attention_mask=torch.ones_like(ids),
                    position_ids=places[:, number:],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
                margin = self.readout.compute_margins(logits.float())[0, 0]
                slopes = torch.autograd.grad(margin, list(entered.values()))
        return {
            head: self._select_head(head, slope[0, -1])
            for layer, slope in zip(entered, slopes, strict=True)
            for head in self.list_heads(layer)
        }

    def list_heads(self, layer: int) -> list[ModelPart]:
        """Return the heads of a layer."""
        return [ModelPart("head", layer, head) for head in range(self.components.n_heads)]

    def draw_placebo(
        self, site: ModelPart, base: Activation, source: Activation, seed_key: str
    ) -> Activation:
        """Return what `base` would be if it were moved as far as to `source`, in a random direction.

        Args:
            site: where.
            base: what is held there.
            source: what a patch would put there.
            seed_key: what else the direction depends on, such as seed and query.
        """
        made = torch.Generator().manual_seed(random.Random(f"{seed_key}/{site}").getrandbits(62))
        step = torch.randn(base.shape, generator=made).to(base)
        return base + step * ((source - base).norm() / step.norm())

    def _hook_point(self, site: ModelPart) -> HookPoint:
        assert site.layer is not None
        layer = self.components.layers[site.layer]
        if site.kind == "head":
            return layer.output_projection, "enters"
        return {"residual": layer.block, "attention": layer.attention, "mlp": layer.mlp}[site.kind], "leaves"

    def _select_head(self, site: ModelPart, activation: Activation) -> Activation:
        return (
            activation
            if site.head is None
            else activation.unflatten(0, (self.components.n_heads, -1))[site.head]
        )

    def _edits_by_hook_point(
        self, patches: Sequence[ActivationPatch]
    ) -> list[tuple[HookPoint, ActivationEdit]]:
        """What is done at each tap to a batch with a row for each patch."""
        taps: dict[HookPoint, list[int]] = {}
        for row, (site, _) in enumerate(patches):
            taps.setdefault(self._hook_point(site), []).append(row)

        def changed(rows: list[int]) -> Callable[[Tensor], Tensor]:
            def change(states: Tensor) -> Tensor:
                new = states.clone()
                flat = new.view(-1, new.shape[-1])  # a token for each row, in a line or not
                for row in rows:
                    site, held = patches[row]
                    self._select_head(site, flat[row]).copy_(held)
                return new

            return change

        return [(tap, changed(rows)) for tap, rows in taps.items()]


@contextmanager
def _explain_out_of_memory(prompt_ids: PromptIds) -> Iterator[None]:
    """While open, memory that runs out is told in words."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"memory ran out with a prompt of {len(prompt_ids)} tokens by itself: take --patched 0 (no "
            "interventions), --device cpu, or a smaller model"
        ) from error
