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

from analysis.readout import Readout
from defenses.errors import UserError

_LARGE = 1e4  # against which the epsilon of a norm is nothing
LEFT = "`analyze -d …`, `validate`, `ensembles` and `recommend` work on it as on any other model"
Stream = Float[Tensor, "rows width"]


@dataclass(frozen=True)
class Norm:
    """What a norm does to a vector, its scale apart: x → scale · gain · (x, or x less its mean) + bias.

    Args:
        module: RMS norm or layer norm, whatever it calls its gain and whether it adds 1 to it.
    """

    module: nn.Module

    def _measured(self, like: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Gain, bias, whether the mean is taken out; measured each time, since a defense may change them."""
        weight = next(self.module.parameters(), like)
        flat = torch.full((like.shape[-1],), _LARGE, dtype=weight.dtype, device=weight.device)
        sign = torch.ones_like(flat)
        sign[1::2] = -1
        bias, turned, same = (
            self.apart(one).float().to(like.device) for one in (torch.zeros_like(flat), flat * sign, flat)
        )
        gain = (turned - bias) * sign.float().to(like.device)
        return gain, bias, not torch.allclose(same - bias, gain, rtol=1e-3, atol=1e-4)

    def apart(self, stream: Tensor) -> Tensor:
        """Return what leaves the norm, apart from any pass of the model: no hook hears of it."""
        weight = next(self.module.parameters(), stream)
        return self.module.forward(stream.to(weight.device))

    def bias(self, like: Stream) -> Float[Tensor, " width"]:
        """Return what is added, whatever comes in."""
        return self._measured(like)[1]

    def scale(self, entered: Stream, left: Stream) -> Float[Tensor, " rows"]:
        """Return the factor between what entered and what left, which is frozen for an attribution."""
        gain, bias, centered = self._measured(entered)
        plain = gain * (_centered(entered.float()) if centered else entered.float())
        return ((left.float() - bias) * plain).sum(1) / (plain * plain).sum(1).clamp_min(1e-30)

    def back(self, direction: Stream, scale: Float[Tensor, " rows"]) -> Stream:
        """Return the direction that a vector in front of the norm is read along, by one behind it."""
        gain, _, centered = self._measured(direction)
        before = gain * direction
        return scale[:, None] * (_centered(before) if centered else before)


def _centered(x: Stream) -> Stream:
    return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Layer:
    """The modules of one block.

    Attributes:
        block: what enters it is the residual stream.
        joined: the matrix of the attention that its heads go through side by side.
        attention: its output is what the attention adds to the stream.
        mlp: its output is what the MLP adds.
        behind: the norm between the joining matrix and the stream, where there is one.
    """

    block: nn.Module
    joined: nn.Module
    attention: nn.Module
    mlp: nn.Module
    behind: Norm | None

    def heads_along(self, direction: Stream) -> Float[Tensor, "rows joined"]:
        """Return what each number that enters the joining matrix adds along a direction behind it."""
        weight = self.joined.get_parameter("weight").float()
        read = direction.to(weight.device) @ (weight if isinstance(self.joined, nn.Linear) else weight.mT)
        return read.to(direction.device)

    @property
    def joined_bias(self) -> Tensor | None:
        """What the joining matrix adds by itself."""
        bias = getattr(self.joined, "bias", None)
        return bias.float() if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class Anatomy:
    """A model's parts.

    Attributes:
        model: of transformers, untouched.
        layers: first to last.
        final: the norm in front of the unembedding.
        unembedding: width → vocabulary.
        heads: of each attention.
        adapter: of transformer_lens, which knows what is done to logits behind the unembedding.
    """

    model: Any
    layers: tuple[Layer, ...]
    final: Norm
    unembedding: nn.Linear
    heads: int
    adapter: Any

    @property
    def width(self) -> int:
        """Numbers in the residual stream."""
        return self.unembedding.weight.shape[1]

    def shown(self, raw: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
        """Return logits as the model shows them: capped, scaled, or as they are."""
        return self.adapter.apply_output_logits_transform(raw)

    def raw(self, normed: Stream, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "rows tokens"]:
        """Return the logits of some tokens as the unembedding gives them."""
        weight, bias = self.unembedding.weight[ids].float(), self.unembedding.bias
        return normed.float().to(weight.device) @ weight.mT + (0.0 if bias is None else bias[ids].float())

    def margin(self, normed: Stream, readout: Readout) -> Float[Tensor, " rows"]:
        """Return the margin of what leaves the final norm, nats."""
        ids, weights = self._read(readout)
        return self.shown(self.raw(normed, ids)) @ weights

    def direction(self, normed: Stream, readout: Readout) -> tuple[Stream, Float[Tensor, " rows"]]:
        """Return the direction in which what leaves the final norm is read, row by row, and a constant.

        Margin = direction · normed + constant. Where logits are capped, the slope from 0 to each logit is
        frozen, as the norms' scales are.
        """
        ids, weights = self._read(readout)
        raw = self.raw(normed, ids)
        slope = torch.where(raw.abs() > 1e-6, self.shown(raw) / raw, torch.ones_like(raw)) * weights
        bias = self.unembedding.bias
        constant = slope.new_zeros(len(slope)) if bias is None else slope @ bias[ids].float()
        return slope @ self.unembedding.weight[ids].float(), constant

    def _read(self, readout: Readout) -> tuple[Tensor, Tensor]:
        """Ids and weights of a readout, where the unembedding is."""
        device = self.unembedding.weight.device
        return torch.tensor(readout.ids, device=device), torch.tensor(readout.weights, device=device).float()


def anatomy(model: Any) -> Anatomy:
    """Return where the parts of a model lie; an error, with what works instead, where nobody knows.

    Args:
        model: of transformers.
    """
    name = type(model).__name__
    adapter = _adapter(model, name)
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
            raise UserError(f"layer {number} of {name} is not attention and MLP ({error}): {LEFT}") from error
        found.append(Layer(block, joined, attention, mlp, Norm(attention) if "ln1_post" in parts else None))
    final = Norm(adapter.get_component(model, "ln_final"))
    unembedding = model.get_output_embeddings()
    if unembedding is None or unembedding.weight.is_meta:
        raise UserError(
            f"the unembedding of this {name} is not in memory: take a larger GPU, or --device cpu"
        )
    heads = int(model.config.get_text_config().num_attention_heads)
    return Anatomy(model, tuple(found), final, unembedding, heads, adapter)


def _adapter(model: Any, name: str) -> Any:
    """What TransformerLens knows about an architecture."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    try:
        known = build_bridge_config_from_hf(model.config, name, name, model.dtype)
        return ArchitectureAdapterFactory.select_architecture_adapter(known)
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"TransformerLens does not know the architecture {name}, so where it acts cannot be said; {LEFT}"
        ) from error
