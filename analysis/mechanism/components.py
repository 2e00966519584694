"""Where the parts of a model lie, as TransformerLens knows it, and how what they write becomes a margin.

The one module that imports transformer_lens. Its adapters say for a hundred architectures which module is the
attention, the MLP, a norm behind them; the model itself is left as it is, with hooks on its own modules, so
that it runs as fast as ever and under whatever a defense does to it. What norms and unembedding do is
measured, not taken from a table: a part's share of a margin is exact once it is seen to add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.readouts.readout import Readout
from defenses.errors import UserError

_LARGE_INPUT = 1e4  # against which the epsilon of a norm is nothing
OTHER_COMMANDS_HINT = (
    "`analyze -d …`, `validate`, `ensembles` and `recommend` work on it as on any other model"
)
ResidualStream = Float[Tensor, "rows width"]


@dataclass(frozen=True)
class NormModule:
    """What a norm does to a vector, its scale apart: x → scale · gain · (x, or x less its mean) + bias.

    Args:
        module: RMS norm or layer norm, whatever it calls its gain and whether it adds 1 to it.
    """

    module: nn.Module

    def _measure_parameters(self, reference: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Gain, bias, whether the mean is taken out; measured each time, since a defense may change them."""
        weight = next(self.module.parameters(), reference)
        flat = torch.full((reference.shape[-1],), _LARGE_INPUT, dtype=weight.dtype, device=weight.device)
        sign = torch.ones_like(flat)
        sign[1::2] = -1
        bias, turned, same = (
            self.apply_without_hooks(one).float().to(reference.device)
            for one in (torch.zeros_like(flat), flat * sign, flat)
        )
        gain = (turned - bias) * sign.float().to(reference.device)
        return gain, bias, not torch.allclose(same - bias, gain, rtol=1e-3, atol=1e-4)

    def apply_without_hooks(self, stream: Tensor) -> Tensor:
        """Return what leaves the norm, apart from any pass of the model: no hook hears of it."""
        weight = next(self.module.parameters(), stream)
        return self.module.forward(stream.to(weight.device))

    def measure_bias(self, reference: ResidualStream) -> Float[Tensor, " width"]:
        """Return what is added, whatever comes in."""
        return self._measure_parameters(reference)[1]

    def measure_scale(self, inputs: ResidualStream, outputs: ResidualStream) -> Float[Tensor, " rows"]:
        """Return the factor between what entered and what left, which is frozen for an attribution."""
        gain, bias, centered = self._measure_parameters(inputs)
        plain = gain * (_subtract_mean(inputs.float()) if centered else inputs.float())
        return ((outputs.float() - bias) * plain).sum(1) / (plain * plain).sum(1).clamp_min(1e-30)

    def pull_back_direction(self, direction: ResidualStream, scale: Float[Tensor, " rows"]) -> ResidualStream:
        """Return the direction that a vector in front of the norm is read along, by one behind it."""
        gain, _, centered = self._measure_parameters(direction)
        before = gain * direction
        return scale[:, None] * (_subtract_mean(before) if centered else before)


def _subtract_mean(stream: ResidualStream) -> ResidualStream:
    return stream - stream.mean(-1, keepdim=True)


@dataclass(frozen=True)
class LayerModules:
    """The modules of one block.

    Attributes:
        block: what enters it is the residual stream.
        output_projection: the matrix of the attention that its heads go through side by side.
        attention: its output is what the attention adds to the stream.
        mlp: its output is what the MLP adds.
        post_attention_norm: the norm between the joining matrix and the stream, where there is one.
    """

    block: nn.Module
    output_projection: nn.Module
    attention: nn.Module
    mlp: nn.Module
    post_attention_norm: NormModule | None

    def pull_back_to_heads(self, direction: ResidualStream) -> Float[Tensor, "rows joined"]:
        """Return what each number that enters the joining matrix adds along a direction behind it."""
        weight = self.output_projection.get_parameter("weight").float()
        read = direction.to(weight.device) @ (
            weight if isinstance(self.output_projection, nn.Linear) else weight.mT
        )
        return read.to(direction.device)

    @property
    def output_projection_bias(self) -> Tensor | None:
        """What the joining matrix adds by itself."""
        bias = getattr(self.output_projection, "bias", None)
        return bias.float() if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class ModelComponents:
    """A model's parts.

    Attributes:
        model: of transformers, untouched.
        layers: first to last.
        final_norm: the norm in front of the unembedding.
        unembedding: width → vocabulary.
        n_heads: of each attention.
        architecture_adapter: of transformer_lens, which knows what is done to logits behind the unembedding.
    """

    model: Any
    layers: tuple[LayerModules, ...]
    final_norm: NormModule
    unembedding: nn.Linear
    n_heads: int
    architecture_adapter: Any

    @property
    def width(self) -> int:
        """Numbers in the residual stream."""
        return self.unembedding.weight.shape[1]

    def transform_logits(self, raw_logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
        """Return logits as the model shows them: capped, scaled, or as they are."""
        return self.architecture_adapter.apply_output_logits_transform(raw_logits)

    def compute_raw_logits(
        self, normed: ResidualStream, token_ids: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "rows tokens"]:
        """Return the logits of some tokens as the unembedding gives them."""
        weight, bias = self.unembedding.weight[token_ids].float(), self.unembedding.bias
        return normed.float().to(weight.device) @ weight.mT + (
            0.0 if bias is None else bias[token_ids].float()
        )

    def compute_margins(self, normed: ResidualStream, readout: Readout) -> Float[Tensor, " rows"]:
        """Return the margin of what leaves the final norm, nats."""
        ids, weights = self._readout_tensors(readout)
        return self.transform_logits(self.compute_raw_logits(normed, ids)) @ weights

    def linearize_margin(
        self, normed: ResidualStream, readout: Readout
    ) -> tuple[ResidualStream, Float[Tensor, " rows"]]:
        """Return the direction in which what leaves the final norm is read, row by row, and a constant.

        Margin = direction · normed + constant. Where logits are capped, the slope from 0 to each logit is
        frozen, as the norms' scales are.
        """
        ids, weights = self._readout_tensors(readout)
        raw = self.compute_raw_logits(normed, ids)
        slope = (
            torch.where(raw.abs() > 1e-6, self.transform_logits(raw) / raw, torch.ones_like(raw)) * weights
        )
        bias = self.unembedding.bias
        constant = slope.new_zeros(len(slope)) if bias is None else slope @ bias[ids].float()
        return slope @ self.unembedding.weight[ids].float(), constant

    def _readout_tensors(self, readout: Readout) -> tuple[Tensor, Tensor]:
        """Ids and weights of a readout, where the unembedding is."""
        device = self.unembedding.weight.device
        return torch.tensor(readout.ids, device=device), torch.tensor(readout.weights, device=device).float()


def locate_components(model: Any) -> ModelComponents:
    """Return where the parts of a model lie; an error, with what works instead, where nobody knows.

    Args:
        model: of transformers.
    """
    name = type(model).__name__
    adapter = _select_architecture_adapter(model, name)
    components = adapter.get_component_mapping()
    if not {"blocks", "ln_final", "unembed"} <= components.keys():
        raise UserError(f"{name} has no list of blocks between embedding and unembedding: it cannot be split")
    found = []
    count = model.config.get_text_config().num_hidden_layers
    for number in range(count):
        parts = components["blocks"].submodules
        try:
            if not {"attn", "mlp"} <= parts.keys():
                raise AttributeError("it has parts other than attention and MLP")
            block, joined = (adapter.get_component(model, f"blocks.{number}{end}") for end in ("", ".attn.o"))
            attention, mlp = (
                adapter.get_component(model, f"blocks.{number}.{norm if norm in parts else part}")
                for part, norm in (("attn", "ln1_post"), ("mlp", "ln2_post"))
            )
            if not hasattr(joined, "weight"):
                raise AttributeError("its heads are not joined by one matrix")
        except (AttributeError, ValueError, IndexError) as error:
            raise UserError(
                f"layer {number} of {name} is not attention and MLP ({error}): {OTHER_COMMANDS_HINT}"
            ) from error
        found.append(
            LayerModules(
                block, joined, attention, mlp, NormModule(attention) if "ln1_post" in parts else None
            )
        )
    final = NormModule(adapter.get_component(model, "ln_final"))
    unembedding = model.get_output_embeddings()
    if unembedding is None or unembedding.weight.is_meta:
        raise UserError(
            f"the unembedding of this {name} is not in memory: take a larger GPU, or --device cpu"
        )
    heads = int(model.config.get_text_config().num_attention_heads)
    return ModelComponents(model, tuple(found), final, unembedding, heads, adapter)


def _select_architecture_adapter(model: Any, class_name: str) -> Any:
    """What TransformerLens knows about an architecture."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    try:
        known = build_bridge_config_from_hf(model.config, class_name, class_name, model.dtype)
        return ArchitectureAdapterFactory.select_architecture_adapter(known)
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"TransformerLens does not know the architecture {class_name}, so where it acts cannot be said; {OTHER_COMMANDS_HINT}"
        ) from error
