"""Activation patching and attribution patching at the response position.

Activations of one run replace those of another at the last position of the prompt. No token comes after it,
so everything before it is computed once; then the last token is read for all sites in one batch, one row per
site. Attribution patching (https://arxiv.org/abs/2310.10348) estimates the effect of every head from one
backward pass through the last token.
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

from analysis.models.hooks import ActivationEdit, HookPoint, edit_activations, record_activations
from analysis.stats.tables import ModelPart
from defenses.contract import Defense
from defenses.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from analysis.mechanism.components import ModelComponents
    from analysis.models.session import ModelSession
    from analysis.readouts.readout import Readout

LAYER_SITES = ("residual", "attention", "mlp")  # sites that every layer has once
PATCHES_PER_PASS = 128  # copies of the last token in one pass
PromptIds = tuple[int, ...]
Activation = Tensor  # at one position, of the width of the residual stream or of a head
SiteActivations = dict[ModelPart, Activation]
ActivationPatch = tuple[ModelPart, Activation]


@dataclass(frozen=True)
class ActivationPatcher:
    """Patches activations from one run into another, prompt by prompt.

    Args:
        session: the model.
        components: components of the model.
        readout: readout that defines the margin.
    """

    session: ModelSession
    components: ModelComponents
    readout: Readout

    def list_sites(self, kinds: Sequence[str], heads: Sequence[ModelPart] = ()) -> list[ModelPart]:
        """Return the sites of the given kinds in every layer, followed by single heads.

        Args:
            kinds: some of `LAYER_SITES`: the output of a block (residual), of its attention, or of its MLP.
            heads: heads that are patched one at a time.
        """
        layers = range(len(self.components.layers))
        return [*(ModelPart(kind, layer) for kind in kinds for layer in layers), *heads]

    def list_heads(self, layer: int) -> list[ModelPart]:
        """Return the heads of a layer."""
        return [ModelPart("head", layer, head) for head in range(self.components.n_heads)]

    def record_site_activations(
        self, defense: Defense, prompts: Sequence[PromptIds], sites: Sequence[ModelPart]
    ) -> list[SiteActivations]:
        """Return the activations of a run at every site, at the last position of each prompt.

        Args:
            defense: defense that is applied to the model.
            prompts: token ids of the prompts under this defense.
            sites: sites to record.
        """
        hook_points = {site: self._get_hook_point(site) for site in sites}
        activations_by_row: dict[int, SiteActivations] = {}
        engine = self.session.engine
        applied = defense.apply_to(self.session.loaded_model.model)
        with torch.inference_mode(), applied, record_activations(engine, hook_points) as recorded:
            for rows, _ in engine.iterate_logits(prompts, [1] * len(prompts)):
                for batch_row, row in enumerate(rows):
                    activations_by_row[row] = {
                        site: self._select_head(site, recorded[site][batch_row]) for site in sites
                    }
        return [activations_by_row[row] for row in range(len(prompts))]

    def compute_patched_margins(
        self,
        defense: Defense,
        prompts: Sequence[PromptIds],
        patches: Iterable[Sequence[ActivationPatch]],
        on_progress: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "prompts patches"]:
        """Return the margin of each prompt under each of its patches, applied one at a time.

        Args:
            defense: defense of the run that is patched.
            prompts: token ids of the prompts in that run.
            patches: patches of each prompt, equally many: the site and the activation that it receives.
            on_progress: called after each prompt.
        """
        margins = []
        pass_size = PATCHES_PER_PASS
        with torch.inference_mode(), defense.apply_to(self.session.loaded_model.model):
            for prompt, prompt_patches in zip(prompts, patches, strict=True):
                with _explain_out_of_memory(prompt):
                    read_logits = self.session.engine.make_last_token_reader(prompt)
                chunks: list[Tensor] = []
                while (start := sum(map(len, chunks))) < len(prompt_patches):
                    chunk = prompt_patches[start : start + pass_size]
                    try:
                        chunks.append(self._margins_in_one_pass(read_logits, chunk))
                    except RuntimeError as error:
                        if not is_out_of_memory(error) or len(chunk) == 1:
                            with _explain_out_of_memory(prompt):
                                raise
                        pass_size = len(chunk) // 2
                margins.append(torch.cat(chunks))
                on_progress()
        return torch.stack(margins)

    def compute_head_gradients(self, prompt: PromptIds) -> SiteActivations:
        """Return the gradient of the margin with respect to each head's output at the last position.

        Args:
            prompt: token ids, read by the model in its current state.
        """
        model, engine = self.session.loaded_model.model, self.session.engine
        n_shared = len(prompt) - 1 if engine.can_extend_prefix(len(prompt) - 1, len(prompt)) else 0
        ids = torch.tensor([prompt], device=model.device)
        positions = engine.locate_tokens([prompt]).to(model.device)
        cache = DynamicCache(config=model.config) if n_shared else None
        head_outputs: dict[int, Tensor] = {}

        def make_recorder(layer: int) -> ActivationEdit:
            return lambda states: head_outputs.update({layer: states})

        with ExitStack() as stack:
            stack.enter_context(_explain_out_of_memory(prompt))
            engine.rotation.reset_modules()
            if cache is not None:
                with torch.no_grad():
                    model(
                        input_ids=ids[:, :n_shared],
                        attention_mask=torch.ones_like(ids[:, :n_shared]),
                        position_ids=positions[..., :n_shared],
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    )
            first_input: HookPoint = (self.components.layers[0].block, "enters")
            stack.enter_context(
                edit_activations(first_input, lambda states: states.detach().requires_grad_())
            )
            for number, layer in enumerate(self.components.layers):
                hook_point: HookPoint = (layer.output_projection, "enters")
                stack.enter_context(edit_activations(hook_point, make_recorder(number)))
            with torch.enable_grad():
                logits = model(
                    input_ids=ids[:, n_shared:],
                    attention_mask=torch.ones_like(ids),
                    position_ids=positions[..., n_shared:],
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).logits[:, -1]
                margin = self.readout.compute_margins(logits.float())[0, 0]
                gradients = torch.autograd.grad(margin, list(head_outputs.values()))
        return {
            head: self._select_head(head, gradient[0, -1])
            for layer, gradient in zip(head_outputs, gradients, strict=True)
            for head in self.list_heads(layer)
        }

    def draw_placebo(
        self, site: ModelPart, base: Activation, source: Activation, seed_key: str
    ) -> Activation:
        """Return `base` moved by the distance to `source`, but in a random direction.

        Args:
            site: site of the activation, which the direction depends on.
            base: activation of the patched run.
            source: activation that the patch would put there.
            seed_key: anything else that the direction depends on, such as seed and query.
        """
        generator = torch.Generator().manual_seed(random.Random(f"{seed_key}/{site}").getrandbits(62))
        step = torch.randn(base.shape, generator=generator).to(base)
        return base + step * ((source - base).norm() / step.norm())

    def _margins_in_one_pass(
        self, read_logits: Callable[[int], Tensor], patches: Sequence[ActivationPatch]
    ) -> Float[Tensor, " patches"]:
        """The margins of one prompt under several patches, one row of the batch per patch."""
        with ExitStack() as stack:
            for hook_point, edit in self._edits_by_hook_point(patches):
                stack.enter_context(edit_activations(hook_point, edit))
            return self.readout.compute_margins(read_logits(len(patches)))[:, 0]

    def _get_hook_point(self, site: ModelPart) -> HookPoint:
        assert site.layer is not None
        layer = self.components.layers[site.layer]
        if site.kind == "head":
            return layer.output_projection, "enters"
        return {"residual": layer.block, "attention": layer.attention, "mlp": layer.mlp}[site.kind], "leaves"

    def _select_head(self, site: ModelPart, activation: Activation) -> Activation:
        """The part of an activation that belongs to the site: one head's, or all of it."""
        if site.head is None:
            return activation
        return activation.unflatten(0, (self.components.n_heads, -1))[site.head]

    def _edits_by_hook_point(
        self, patches: Sequence[ActivationPatch]
    ) -> list[tuple[HookPoint, ActivationEdit]]:
        """The edit at each hook point of a batch that has one row per patch."""
        engine = self.session.engine
        rows_by_hook_point: dict[HookPoint, list[int]] = {}
        for row, (site, _) in enumerate(patches):
            rows_by_hook_point.setdefault(self._get_hook_point(site), []).append(row)

        def make_edit(rows: list[int]) -> Callable[[Tensor], Tensor]:
            def edit(states: Tensor) -> Tensor:
                edited = states.clone()
                assert engine.logit_positions is not None
                batch_rows, columns = (indices.tolist() for indices in engine.logit_positions)
                for row in rows:
                    site, activation = patches[row]
                    self._select_head(site, edited[batch_rows[row], columns[row]]).copy_(activation)
                return edited

            return edit

        return [(hook_point, make_edit(rows)) for hook_point, rows in rows_by_hook_point.items()]


@contextmanager
def _explain_out_of_memory(prompt_ids: PromptIds) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError with advice, within a context."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with a single prompt of {len(prompt_ids)} tokens: use --patched 0 (no "
            "interventions), --device cpu, or a smaller model"
        ) from error
