"""Locations of a model's components, and the linear map from a component's output to the margin.

This is the only module that imports transformer_lens. Its architecture adapters say, for about a hundred
architectures, which modules are the attention, the MLP and the norms after them. The model itself is not
converted: hooks are registered on its own modules, so it runs at its usual speed and under any defense. The
effects of norms and unembedding are measured, not looked up; an attribution is accepted only if it adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from analysis.readouts.readout import Readout
from defenses.errors import UserError, describe_library_error

_LARGE_INPUT = 1e4  # large enough to make the epsilon of a norm negligible
OTHER_COMMANDS_HINT = (
    "`analyze -d …`, `validate`, `ensembles` and `recommend` work with this model as with any other"
)


class UnknownArchitectureError(UserError):
    """TransformerLens cannot say which modules of a model are its components."""


ResidualStream = Float[Tensor, "rows width"]
TokenSelection = Int[Tensor, " tokens"] | slice
ALL_TOKENS = slice(None)


@dataclass(frozen=True)
class NormModule:
    """A norm as a map with a frozen scale: x → scale · gain · (x, or x minus its mean) + bias.

    Args:
        module: RMS norm or layer norm, whatever its gain is called and whether or not it adds 1 to the gain.
    """

    module: nn.Module

    def _measure_parameters(self, reference: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Measure the gain, the bias, and whether the mean is subtracted.

        They are measured on every call because a defense may change them.
        """
        weight = next(self.module.parameters(), reference)
        constant = torch.full((reference.shape[-1],), _LARGE_INPUT, dtype=weight.dtype, device=weight.device)
        sign = torch.ones_like(constant)
        sign[1::2] = -1
        bias, output_alternating, output_constant = (
            self.apply_without_hooks(inputs).float().to(reference.device)
            for inputs in (torch.zeros_like(constant), constant * sign, constant)
        )
        gain = (output_alternating - bias) * sign.float().to(reference.device)
        return gain, bias, not torch.allclose(output_constant - bias, gain, rtol=1e-3, atol=1e-4)

    def apply_without_hooks(self, stream: Tensor) -> Tensor:
        """Apply the norm outside a forward pass, so that no hook fires."""
        weight = next(self.module.parameters(), stream)
        return self.module.forward(stream.to(weight.device))

    def measure_bias(self, reference: ResidualStream) -> Float[Tensor, " width"]:
        """Return the bias that the norm adds to any input."""
        return self._measure_parameters(reference)[1]

    def measure_scale(self, inputs: ResidualStream, outputs: ResidualStream) -> Float[Tensor, " rows"]:
        """Return the scale of each row, from its input and output; an attribution holds it fixed."""
        gain, bias, subtracts_mean = self._measure_parameters(inputs)
        unscaled = gain * (_subtract_mean(inputs.float()) if subtracts_mean else inputs.float())
        return ((outputs.float() - bias) * unscaled).sum(1) / (unscaled * unscaled).sum(1).clamp_min(1e-30)

    def pull_back_direction(self, direction: ResidualStream, scale: Float[Tensor, " rows"]) -> ResidualStream:
        """Map a direction after the norm to the direction before it that gives the same projection."""
        gain, _, subtracts_mean = self._measure_parameters(direction)
        before = gain * direction
        return scale[:, None] * (_subtract_mean(before) if subtracts_mean else before)


@dataclass(frozen=True)
class LayerModules:
    """The modules of one block.

    Attributes:
        block: module whose input is the residual stream.
        output_projection: matrix of the attention that maps the concatenated head outputs to the residual
            width.
        attention: module whose output the attention adds to the residual stream.
        mlp: module whose output the MLP adds to the residual stream.
        post_attention_norm: norm between the output projection and the residual stream, if the block has one.
    """

    block: nn.Module
    output_projection: nn.Module
    attention: nn.Module
    mlp: nn.Module
    post_attention_norm: NormModule | None

    def pull_back_to_heads(self, direction: ResidualStream) -> Float[Tensor, "rows joined"]:
        """Map a direction after the output projection to the direction over the concatenated head outputs."""
        weight = self.output_projection.get_parameter("weight").float()
        pulled_back = direction.to(weight.device) @ (
            weight if isinstance(self.output_projection, nn.Linear) else weight.mT
        )
        return pulled_back.to(direction.device)

    @property
    def output_projection_bias(self) -> Tensor | None:
        """Bias of the output projection."""
        bias = getattr(self.output_projection, "bias", None)
        return bias.float() if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class ModelComponents:
    """The components of a model.

    Attributes:
        model: transformers model, unchanged.
        layers: modules of each block, first to last.
        final_norm: norm before the unembedding.
        unembedding: linear map from the residual width to the vocabulary.
        n_heads: number of attention heads per layer.
        architecture_adapter: adapter of transformer_lens, which knows how logits are transformed after the
            unembedding.
    """

    model: Any
    layers: tuple[LayerModules, ...]
    final_norm: NormModule
    unembedding: nn.Linear
    n_heads: int
    architecture_adapter: Any

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.unembedding.weight.shape[1]

    def transform_logits(self, raw_logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
        """Return the logits as the model returns them: capped, scaled or unchanged."""
        return self.architecture_adapter.apply_output_logits_transform(raw_logits)

    def compute_raw_logits(
        self, normed: ResidualStream, token_ids: TokenSelection = ALL_TOKENS
    ) -> Float[Tensor, "rows tokens"]:
        """Return the logits of selected tokens as the unembedding computes them."""
        weight, bias = self.unembedding.weight[token_ids], self.unembedding.bias
        if isinstance(token_ids, Tensor):
            weight = weight.float()  # of the whole vocabulary, a float32 copy would be large
        raw_logits = (normed.to(weight) @ weight.mT).float()
        return raw_logits + (0.0 if bias is None else bias[token_ids].float())

    def compute_margins(self, normed: ResidualStream, readout: Readout) -> Float[Tensor, " rows"]:
        """Return the margins, in nats, of outputs of the final norm."""
        if readout.is_linear:
            token_ids, token_weights = self.make_readout_tensors(readout)
            return self.transform_logits(self.compute_raw_logits(normed, token_ids)) @ token_weights
        return readout.compute_margins(self.transform_logits(self.compute_raw_logits(normed)))[:, 0]

    def linearize_weighted_logits(
        self,
        normed: ResidualStream,
        logit_weights: Float[Tensor, "#rows tokens"],
        token_ids: TokenSelection = ALL_TOKENS,
    ) -> tuple[ResidualStream, Float[Tensor, " rows"]]:
        """Write each row's weighted sum of logits as a linear function of the output of the final norm.

        Weighted sum = direction · normed + constant. If logits are capped, the slope from 0 to each logit is
        held fixed, as the scales of norms are.

        Args:
            normed: output of the final norm.
            logit_weights: weight of each logit; one row stands for all rows.
            token_ids: tokens whose logits have weights; by default all.

        Returns:
            The direction and the constant (nats) of each row.
        """
        raw_logits = self.compute_raw_logits(normed, token_ids)
        slope = (
            torch.where(
                raw_logits.abs() > 1e-6,
                self.transform_logits(raw_logits) / raw_logits,
                torch.ones_like(raw_logits),
            )
            * logit_weights
        )
        bias = self.unembedding.bias
        constant = slope.new_zeros(len(slope)) if bias is None else slope @ bias[token_ids].float()
        return slope @ self.unembedding.weight[token_ids].float(), constant

    def make_readout_tensors(self, readout: Readout) -> tuple[Tensor, Tensor]:
        """Return token ids and weights of a readout on the device of the unembedding."""
        device = self.unembedding.weight.device
        return torch.tensor(readout.ids, device=device), torch.tensor(readout.weights, device=device).float()


def locate_components(model: Any) -> ModelComponents:
    """Return the components of a model.

    Args:
        model: transformers model.

    Raises:
        UnknownArchitectureError: If the architecture is unknown, or needs a library that is missing.
        UserError: If the architecture has layers other than attention and MLP, or keeps its
            unembedding out of memory.
    """
    class_name = type(model).__name__
    adapter = _select_architecture_adapter(model, class_name)
    mapping = adapter.get_component_mapping()
    if not {"blocks", "ln_final", "unembed"} <= mapping.keys():
        raise UserError(
            f"{class_name} has no list of blocks between embedding and unembedding, so its margins cannot be "
            f"attributed to components; {OTHER_COMMANDS_HINT}"
        )
    config = model.config.get_text_config()
    layers = tuple(
        _locate_layer(model, adapter, mapping["blocks"].submodules, number, class_name)
        for number in range(config.num_hidden_layers)
    )
    final_norm = NormModule(adapter.get_component(model, "ln_final"))
    unembedding = model.get_output_embeddings()
    if unembedding is None or unembedding.weight.is_meta:
        raise UserError(
            f"the unembedding of {class_name} is not in memory: use a larger GPU, or --device cpu"
        )
    return ModelComponents(model, layers, final_norm, unembedding, int(config.num_attention_heads), adapter)


def _locate_layer(model: Any, adapter: Any, submodules: Any, number: int, class_name: str) -> LayerModules:
    """The modules of one block; a UserError if it is not attention and MLP."""
    try:
        if not {"attn", "mlp"} <= submodules.keys():
            raise AttributeError("it has components other than attention and MLP")
        block, output_projection = (
            adapter.get_component(model, f"blocks.{number}{suffix}") for suffix in ("", ".attn.o")
        )
        attention, mlp = (
            adapter.get_component(model, f"blocks.{number}.{norm if norm in submodules else part}")
            for part, norm in (("attn", "ln1_post"), ("mlp", "ln2_post"))
        )
        if not hasattr(output_projection, "weight"):
            raise AttributeError("its heads share no output projection")
    except (AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"layer {number} of {class_name} is not attention and MLP ({error}); {OTHER_COMMANDS_HINT}"
        ) from error
    post_attention_norm = NormModule(attention) if "ln1_post" in submodules else None
    return LayerModules(block, output_projection, attention, mlp, post_attention_norm)


def _select_architecture_adapter(model: Any, class_name: str) -> Any:
    """The architecture adapter of TransformerLens for a model."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    try:
        bridge_config = build_bridge_config_from_hf(model.config, class_name, class_name, model.dtype)
        return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    except ImportError as error:
        raise UnknownArchitectureError(
            f"TransformerLens cannot locate the components of {class_name} here "
            f"({describe_library_error(error)}); {OTHER_COMMANDS_HINT}"
        ) from error
    except (ValueError, AttributeError, KeyError) as error:
        raise UnknownArchitectureError(
            f"TransformerLens does not know the architecture {class_name}, so its components cannot be "
            f"located; {OTHER_COMMANDS_HINT}"
        ) from error


def _subtract_mean(stream: ResidualStream) -> ResidualStream:
    return stream - stream.mean(-1, keepdim=True)
