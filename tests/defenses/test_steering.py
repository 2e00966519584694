"""Steering: what a planted direction does to a tiny model is what adding or removing it by hand does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, OTHERS, derive_readout, tiny_model, toy_bench

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.mechanism.directions import load_mean_activations
from analysis.run import score_condition
from defenses.catalog import get_defense
from defenses.contract import MeanActivations
from defenses.steering import get_blocks

ASKED = sample_queries(load_queries("twins").queries, 6)
TRAIN = sample_queries(load_queries("contrast").select_split("train").queries, 8)
IDS = torch.tensor([[5, 60, 70, 81, 9]])


def planted(layers: int, width: int = 64, seed: int = 0) -> MeanActivations:
    """Return means of two classes that a generator made up."""
    made = torch.Generator().manual_seed(seed)
    means = [torch.randn(layers, width, generator=made) for _ in range(2)]
    return MeanActivations(*means, frozenset(), "toy")


def entered(model: Any, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Return what enters each block."""
    found: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, named: found.append((*args, *named.values())[0]), with_kwargs=True
        )
        for block in get_blocks(model)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_direction_is_added_where_the_block_at_that_depth_begins(family: str) -> None:
    model = tiny_model(family)
    count = len(get_blocks(model))
    learned = planted(count)
    steering = replace(
        get_defense("refusal_steering", {"depth": "0.5", "strength": "2"}), activations=learned
    )
    plain = entered(model)
    with steering.apply_to(model):
        steered = entered(model)
    place = count // 2
    gap = learned.harmful[place] - learned.benign[place]
    assert all(torch.equal(a, b) for a, b in zip(plain[:place], steered[:place], strict=True))
    assert torch.allclose(steered[place], plain[place] + 2 * gap, atol=1e-5)


def test_a_condition_is_checked_at_each_position_by_itself() -> None:
    model = tiny_model()
    plain = entered(model)[1]
    learned = planted(2)
    # Means between which these positions lie, some on either side.
    unit = torch.randn(64, generator=torch.Generator().manual_seed(1))
    unit /= unit.norm()
    places = plain[0] @ unit
    middle = places.median() + 1e-3
    learned = replace(
        learned, harmful=((middle + 1) * unit).repeat(2, 1), benign=((middle - 1) * unit).repeat(2, 1)
    )
    steering = replace(get_defense("conditional_steering", {"depth": "0.5"}), activations=learned)
    with steering.apply_to(model):
        steered = entered(model)[1]
    moved = (steered - plain)[0] @ unit
    assert 0 < (places > middle).sum() < len(places)
    assert torch.allclose(moved, 2.0 * (places > middle), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ablated_direction_is_gone_wherever_a_block_begins(family: str) -> None:
    model = tiny_model(family)
    learned = planted(len(get_blocks(model)))
    ablation = replace(get_defense("direction_ablation", {"depth": "0.5"}), activations=learned)
    place = len(get_blocks(model)) // 2
    gap = learned.harmful[place] - learned.benign[place]
    assert all((stream @ (gap / gap.norm())).abs().max() > 1e-2 for stream in entered(model)[1:])
    with ablation.apply_to(model):
        assert all((stream @ (gap / gap.norm())).abs().max() < 1e-4 for stream in entered(model))


@pytest.mark.parametrize("name", ["refusal_steering", "conditional_steering", "direction_ablation"])
def test_steered_margins_do_not_depend_on_what_else_is_read(name: str) -> None:
    bench = toy_bench()
    defense = replace(get_defense(name, {"depth": "0.5"}), activations=load_mean_activations(bench, TRAIN))
    readout = derive_readout(bench, ASKED, get_defense("none"))
    together = score_condition(bench, name, defense, ASKED, readout)["margin"]
    alone = [
        float(score_condition(bench, name, defense, [query], readout)["margin"].iloc[0]) for query in ASKED
    ]
    plain = score_condition(bench, "none", get_defense("none"), ASKED, readout)["margin"]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)
    assert (together - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_residuals_are_means_over_plain_passes_and_are_kept(
    family: str, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bench = toy_bench(family)
    found = load_mean_activations(bench, TRAIN)
    held: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for query in TRAIN:
        ids = bench.chat_template.render_prompt([{"role": "user", "content": query.text}]).ids
        held[query.harmful].append(
            torch.stack([one[0, -1] for one in entered(bench.loaded_model.model, torch.tensor([ids]))])
        )
    for side, mean in ((True, found.harmful), (False, found.benign)):
        assert torch.allclose(mean, torch.stack(held[side]).mean(0), atol=1e-4)
    again = load_mean_activations(bench, TRAIN)
    assert torch.equal(again.harmful, found.harmful) and again.sha256 == found.sha256
    assert load_mean_activations(bench, TRAIN[1:]).sha256 != found.sha256


def test_what_a_direction_was_computed_from_may_not_be_asked() -> None:
    from defenses.adapters import fingerprint_queries

    defense = replace(get_defense("refusal_steering"), activations=load_mean_activations(toy_bench(), TRAIN))
    assert defense.trained_on() == frozenset(fingerprint_queries(query.text for query in TRAIN))
    assert "computed" in get_defense("refusal_steering").missing_requirements() and not defense.missing_requirements()
