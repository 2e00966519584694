"""Rounding of weights: values worked out by hand, and which weights are rounded."""

from __future__ import annotations

import pytest
import torch
from conftest import fresh_model

from analysis.checkpoints.weight_changes import GROUP_SIZE, round_weights, split_weight_change
from analysis.models.loading import split_model_name
from defenses.errors import UserError


class Decoder(torch.nn.Module):
    """One block that is one linear layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        self.layers = torch.nn.ModuleList([layer])

    def get_decoder(self) -> torch.nn.Module:
        return self


def round_matrix(rows: list[list[float]], change: str) -> torch.Tensor:
    """Return a matrix rounded as the only weight of a model."""
    decoder = Decoder(torch.tensor(rows))
    round_weights(decoder, change)
    return decoder.layers[0].weight.data


def test_weights_are_rounded_to_equally_spaced_values_between_the_extremes() -> None:
    # From -1 to 2 in 15 steps of 0.2: 0.29 → 0.2, 0.31 → 0.4, -0.09 → 0; one-sided weights start at zero.
    rounded = round_matrix([[-1.0, 2.0, 0.29, 0.31, -0.09], [0.0, 3.0, 1.04, 2.96, 0.3]], "int4")
    expected = [[-1.0, 2.0, 0.2, 0.4, 0.0], [0.0, 3.0, 1.0, 3.0, 0.4]]
    torch.testing.assert_close(rounded, torch.tensor(expected))
    assert torch.equal(round_matrix([[0.0, 0.0]], "int4"), torch.zeros(1, 2))


def test_each_group_of_each_output_has_its_own_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, GROUP_SIZE + 40) * torch.tensor([[1.0], [10.0], [0.01]])
    weight[:, GROUP_SIZE:] *= 100
    for change, n_values in (("int4", 16), ("int8", 256)):
        rounded = round_matrix(weight.tolist(), change)
        for row, original in zip(rounded, weight, strict=True):
            for group, values in zip(row.split(GROUP_SIZE), original.split(GROUP_SIZE), strict=True):
                step = (values.max() - values.min()) / (n_values - 1)
                assert len(group.unique()) <= n_values
                assert (group - values).abs().max() <= 1.01 * step


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_are_rounded_and_nothing_else(family: str) -> None:
    model, released = fresh_model(family), fresh_model(family)
    round_weights(model, "int4")
    blocks = "transformer.h." if family == "gpt2" else "model.layers."
    for (name, parameter), before in zip(model.named_parameters(), released.parameters(), strict=True):
        assert torch.equal(parameter, before) != (name.startswith(blocks) and parameter.ndim == 2), name
    if family == "gpt2":  # its matrices are stored transposed: groups lie along the first dimension
        (column,) = model.transformer.h[0].mlp.c_fc.weight.data[:GROUP_SIZE, :1].mT
        assert len(column.unique()) <= 16


def test_fused_experts_are_refused() -> None:
    decoder = Decoder(torch.zeros(2, 2))
    decoder.layers[0].experts = torch.nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(UserError, match=r"experts is no plain matrix.*:int8"):
        round_weights(decoder, "int8")


def test_a_change_of_the_weights_is_the_last_part_of_a_name() -> None:
    assert split_weight_change("m:abliterated") == ("m", "abliterated")
    assert split_weight_change("int4") == ("int4", "")
    for name in ("smollm2:aligned:int8", "smollm2:aligned:int8+ocr", "smollm2:aligned"):
        assert split_model_name(name) == ("smollm2", "aligned")
