"""Steering: a planted direction changes a tiny model exactly as adding or removing it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, OTHERS, derive_readout, make_toy_session, tiny_model

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.mechanism.directions import load_mean_activations
from analysis.models.session import ModelSession
from analysis.run import score_condition
from defenses.adapters import fingerprint_queries
from defenses.catalog import get_defense
from defenses.contract import MeanActivations, ModelInfo
from defenses.errors import UserError
from defenses.steering import get_blocks

QUERIES = sample_queries(load_queries("twins").queries, 4)
TRAIN_QUERIES = sample_queries(load_queries("contrast").select_split("train").queries, 8)
IDS = torch.tensor([[5, 60, 70, 81, 9]])


def plant_activations(n_layers: int, width: int = 64, seed: int = 0) -> MeanActivations:
    """Return random class means."""
    generator = torch.Generator().manual_seed(seed)
    means = [torch.randn(n_layers, width, generator=generator) for _ in range(2)]
    return MeanActivations(*means, frozenset(), "toy")


def load_means(session: ModelSession, queries: Sequence[Query]) -> MeanActivations:
    """Return the class means over training queries."""
    texts, is_harmful = zip(*((query.text, query.harmful) for query in queries), strict=True)
    return load_mean_activations(session, texts, is_harmful)


def record_block_inputs(model: Any, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Return the input of each block."""
    inputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
        for block in get_blocks(model)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_direction_is_added_to_the_input_of_the_block_at_that_depth(family: str) -> None:
    model = tiny_model(family)
    n_layers = len(get_blocks(model))
    activations = plant_activations(n_layers)
    settings = {"depth": "0.5", "strength": "2"}
    defense = replace(get_defense("refusal_steering", settings), activations=activations)
    plain = record_block_inputs(model)
    with defense.apply_to(model):
        steered = record_block_inputs(model)
    layer = n_layers // 2
    direction = activations.harmful[layer] - activations.benign[layer]
    assert all(torch.equal(a, b) for a, b in zip(plain[:layer], steered[:layer], strict=True))
    assert torch.allclose(steered[layer], plain[layer] + 2 * direction, atol=1e-5)


def test_the_condition_is_checked_at_each_position_separately() -> None:
    model = tiny_model()
    plain = record_block_inputs(model)[1]
    # Class means whose midpoint lies between the positions of this prompt.
    unit = torch.randn(64, generator=torch.Generator().manual_seed(1))
    unit /= unit.norm()
    projections = plain[0] @ unit
    midpoint = projections.median() + 1e-3
    activations = replace(
        plant_activations(2),
        harmful=((midpoint + 1) * unit).repeat(2, 1),
        benign=((midpoint - 1) * unit).repeat(2, 1),
    )
    defense = replace(get_defense("conditional_steering", {"depth": "0.5"}), activations=activations)
    with defense.apply_to(model):
        steered = record_block_inputs(model)[1]
    change = (steered - plain)[0] @ unit
    assert 0 < (projections > midpoint).sum() < len(projections)
    assert torch.allclose(change, 2.0 * (projections > midpoint), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ablated_direction_is_absent_from_the_input_of_every_block(family: str) -> None:
    model = tiny_model(family)
    n_layers = len(get_blocks(model))
    activations = plant_activations(n_layers)
    defense = replace(get_defense("direction_ablation", {"depth": "0.5"}), activations=activations)
    direction = activations.harmful[n_layers // 2] - activations.benign[n_layers // 2]
    unit = direction / direction.norm()
    assert all((stream @ unit).abs().max() > 1e-2 for stream in record_block_inputs(model)[1:])
    with defense.apply_to(model):
        assert all((stream @ unit).abs().max() < 1e-4 for stream in record_block_inputs(model))


def test_steered_margins_do_not_depend_on_the_batch() -> None:
    session, undefended = make_toy_session(), get_defense("none")
    activations = load_means(session, TRAIN_QUERIES)
    readout = derive_readout(session, QUERIES, undefended)
    plain = score_condition(session, "none", undefended, QUERIES, readout)["margin"]
    for name in ("refusal_steering", "conditional_steering", "direction_ablation"):
        defense = replace(get_defense(name, {"depth": "0.5"}), activations=activations)
        batch = score_condition(session, name, defense, QUERIES, readout)["margin"]
        single = [
            float(score_condition(session, name, defense, [query], readout)["margin"].iloc[0])
            for query in QUERIES
        ]
        assert batch.tolist() == pytest.approx(single, abs=1e-4), name
        assert (batch - plain).abs().max() > 1e-3, name


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_mean_activations_are_means_over_plain_passes_and_are_cached(
    family: str, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    session = make_toy_session(family)
    activations = load_means(session, TRAIN_QUERIES)
    streams: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for query in TRAIN_QUERIES:
        ids = session.chat_template.render_prompt([{"role": "user", "content": query.text}]).ids
        inputs = record_block_inputs(session.loaded_model.model, torch.tensor([ids]))
        streams[query.harmful].append(torch.stack([stream[0, -1] for stream in inputs]))
    for harmful, mean in ((True, activations.harmful), (False, activations.benign)):
        assert torch.allclose(mean, torch.stack(streams[harmful]).mean(0), atol=1e-4)
    again = load_means(session, TRAIN_QUERIES)
    assert torch.equal(again.harmful, activations.harmful) and again.sha256 == activations.sha256
    assert load_means(session, TRAIN_QUERIES[1:]).sha256 != activations.sha256


def test_a_depth_without_a_direction_is_rejected() -> None:
    activations = load_means(make_toy_session(), TRAIN_QUERIES)
    model_info = ModelInfo("toy", None, (), compute_mean_activations=lambda: activations)
    with pytest.raises(UserError, match=r"depth=0\.0 the mean activations .* are equal"):
        get_defense("refusal_steering", {"depth": "0"}).prepare(model_info)
    assert not get_defense("refusal_steering", {"depth": "0.5"}).prepare(model_info).missing_requirements()


def test_the_queries_of_a_direction_may_not_be_scored() -> None:
    activations = load_means(make_toy_session(), TRAIN_QUERIES)
    defense = replace(get_defense("refusal_steering"), activations=activations)
    assert defense.trained_on() == frozenset(fingerprint_queries(query.text for query in TRAIN_QUERIES))
    assert "computed" in get_defense("refusal_steering").missing_requirements()
    assert not defense.missing_requirements()
