"""Attention in two parts is attention to prefix and row put together, and is used where it may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from analysis.models.engine import Engine
from analysis.models.prefix_attention import (
    PackedRows,
    _compute_split_attention,
    make_split_update,
    use_split_attention,
)

SMALL = st.integers(1, 4)


def parts(rows: int, groups: int, per: int, length: int, shared: int, size: int, width: int) -> list[Tensor]:
    """Queries, keys and values of the rows, keys and values of the prefix; laid out as a model lays them."""
    torch.manual_seed(0)
    shapes = [
        (rows, length, groups * per, size),
        *((rows, length, groups, one) for one in (size, width)),
        *((1, shared, groups, one) for one in (size, width)),
    ]
    return [torch.randn(shape).transpose(1, 2) for shape in shapes]


def together(query: Tensor, keys: Tensor, values: Tensor, *prefix: Tensor, scaling: float) -> Tensor:
    """The same by PyTorch, with the prefix laid under each row and repeated for each head."""
    length, shared = query.shape[2], prefix[0].shape[2]
    per = query.shape[1] // keys.shape[1]
    full = [
        torch.cat([one.expand(len(query), -1, -1, -1), own], 2).repeat_interleave(per, 1)
        for one, own in zip(prefix, (keys, values), strict=True)
    ]
    mask = torch.ones(length, shared + length, dtype=torch.bool).tril(shared)
    seen = torch.nn.functional.scaled_dot_product_attention(query, *full, attn_mask=mask, scale=scaling)
    return seen.transpose(1, 2)


@given(rows=SMALL, groups=SMALL, per=SMALL, length=SMALL, shared=st.integers(1, 9), size=SMALL, width=SMALL)
def test_two_parts_are_the_whole(**sizes: int) -> None:
    given = parts(**sizes)
    later = PackedRows.from_lengths(torch.full((sizes["rows"],), sizes["length"])).future_mask
    seen = _compute_split_attention(*given, later, scaling=0.7)
    assert torch.allclose(seen, together(*given, scaling=0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family, used", [("llama", True), ("qwen3", True), ("gemma3", False)])
def test_it_is_used_for_plain_causal_models_only(
    family: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    right = _compute_split_attention

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return right(*args)

    monkeypatch.setattr("analysis.models.prefix_attention._compute_split_attention", counted)
    model = tiny_model(family)
    Engine(model).read_first_token([[5, 6, 7], [5, 6, 8, 9]], lambda logits: logits)
    assert bool(calls) == used
    assert not used or len(calls) == model.config.num_hidden_layers  # one batch: once a layer


def test_what_it_does_not_know_goes_the_usual_way_over_keys_put_together() -> None:
    query, keys, values, *prefix = parts(2, 2, 2, 3, 5, 4, 4)
    rows = PackedRows.from_lengths(torch.tensor([3, 2]))
    line = [rows.pack_rows(one.transpose(1, 2)).transpose(1, 2) for one in (query, keys, values)]
    _, line[2] = make_split_update(*prefix)(line[1], line[2])
    module = SimpleNamespace(num_key_value_groups=2)
    right = together(query, keys, values, *prefix, scaling=0.7)
    for more in ({}, {"sliding_window": 99}):
        with use_split_attention(rows):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            seen, _ = attend(module, *line, None, scaling=0.7, **more)
        assert torch.allclose(seen, rows.pack_rows(right), atol=1e-5), more


def test_afterwards_attention_is_as_it_was_also_after_an_error() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), use_split_attention(PackedRows.from_lengths(torch.tensor([1]))):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
