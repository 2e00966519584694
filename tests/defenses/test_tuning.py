"""Full checkpoints as a defense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.errors import UserError

IDS = torch.tensor([[5, 60, 70, 81, 9]])
MODEL_INFO = ModelInfo("toy", None, ())


def test_a_checkpoint_replaces_the_weights_and_restores_them(tmp_path: Path) -> None:
    checkpoint = copy.deepcopy(tiny_model())
    with torch.no_grad():
        for parameter in checkpoint.parameters():
            parameter.mul_(1.1)
        expected = checkpoint(input_ids=IDS).logits
    checkpoint.save_pretrained(str(tmp_path / "m"))
    defense: Any = get_defense("weights", {"path": str(tmp_path / "m")}).prepare(MODEL_INFO)
    model = copy.deepcopy(tiny_model())
    before = model(input_ids=IDS).logits
    with torch.no_grad(), defense.apply_to(model):
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    assert torch.equal(model(input_ids=IDS).logits, before) and len(defense.weights_fingerprint()) == 64
    with (
        pytest.raises(UserError, match="is not a checkpoint of this model"),
        defense.apply_to(tiny_model("gpt2")),
    ):
        pass


def test_a_checkpoint_with_other_values_for_tied_weights_is_rejected(tmp_path: Path) -> None:
    tied_model = copy.deepcopy(tiny_model())
    tied_model.lm_head.weight = tied_model.model.embed_tokens.weight
    tiny_model().save_pretrained(str(tmp_path / "m"))
    defense: Any = get_defense("weights", {"path": str(tmp_path / "m")}).prepare(MODEL_INFO)
    with pytest.raises(UserError, match=r"cannot be applied: .* is also"), defense.apply_to(tied_model):
        pass
