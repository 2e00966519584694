"""Components are located, or the model is named as unsupported; norms are measured, not looked up."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from analysis.mechanism.components import NormModule, locate_components
from defenses.errors import UserError


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_an_error_names_an_architecture_with_other_components_and_the_commands_that_work(family):
    with pytest.raises(UserError, match=f"(?i){family}.*`recommend` work with this model"):
        locate_components(tiny_model(family))


def test_an_error_names_an_unknown_architecture():
    class OwnForCausalLM(nn.Module):
        config = tiny_model().config
        dtype = torch.float32

    with pytest.raises(UserError, match="does not know the architecture OwnForCausalLM"):
        locate_components(OwnForCausalLM())


def test_the_parameters_of_any_norm_are_measured():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    torch.manual_seed(0)
    layer_norm, gemma_norm = nn.LayerNorm(8), Gemma2RMSNorm(8)
    for parameter in (*layer_norm.parameters(), *gemma_norm.parameters()):
        nn.init.normal_(parameter)
    inputs, direction = torch.randn(5, 8), torch.randn(5, 8)
    for module in (layer_norm, gemma_norm):
        norm = NormModule(module)
        outputs = module(inputs)
        pulled_back = norm.pull_back_direction(direction, norm.measure_scale(inputs, outputs))
        expected = (outputs * direction).sum(1)
        actual = (inputs * pulled_back).sum(1) + direction @ norm.measure_bias(inputs)
        assert torch.allclose(actual, expected, atol=1e-4)
