"""Steering: a planted direction changes a tiny model exactly as adding or removing it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import FAMILIES, OTHERS, derive_readout, make_toy_session, tiny_model
from sklearn.metrics import f1_score
from torch import Tensor

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query, sample_queries
from analysis.mechanism.directions import load_mean_activations
from analysis.models.requests import ModelRequestReader, load_training_requests
from analysis.models.session import ModelSession
from analysis.run import score_condition
from analysis.studies.setup import _steering_notices
from defenses.adapters import fingerprint_queries
from defenses.catalog import get_defense
from defenses.contract import Chat, MeanActivations, ModelInfo, QueryChat, TrainingRequests
from defenses.detection import fit_probe
from defenses.errors import UserError
from defenses.steering import SteeringFit, find_best_threshold, get_blocks

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


def make_model_info(session: ModelSession) -> ModelInfo:
    """Return what a defense needs to prepare itself, with real means and requests."""
    texts, is_harmful = zip(*((query.text, query.harmful) for query in TRAIN_QUERIES), strict=True)
    return ModelInfo(
        "toy",
        session.loaded_model.tokenizer,
        (),
        compute_mean_activations=lambda: load_means(session, TRAIN_QUERIES),
        load_training_requests=lambda: load_training_requests(
            session, texts, is_harmful, [query.pair for query in TRAIN_QUERIES]
        ),
    )


class PlantedReader(ModelRequestReader):
    """Reads planted streams (harmful or benign requests x width) instead of those of a model."""

    def __init__(self, streams: Tensor) -> None:
        self.streams, self.tokenizer, self.n_blocks = streams, None, 2

    def select_rows(self, chats: Sequence[Chat]) -> Tensor:
        return self.streams[[int(chat[0]["content"]) for chat in chats]]

    def read_streams(
        self,
        chats: Sequence[Chat],
        layers: Sequence[int],
        reduce_stream: Callable[[int, Tensor], Tensor],
        *_: Any,
    ) -> Tensor:
        return torch.stack([reduce_stream(layer, self.select_rows(chats)) for layer in layers], 1)

    def read_second_moments(self, chats: Sequence[Chat], layer: int, groups: Sequence[int]) -> Tensor:
        rows, numbers = self.select_rows(chats), torch.tensor(groups)
        return torch.stack([rows[numbers == n].T @ rows[numbers == n] for n in range(max(groups) + 1)])


def plant_requests(streams: Tensor, is_harmful: Sequence[bool]) -> ModelInfo:
    """Return a model's properties with planted streams of training requests in every layer."""
    chats = [QueryChat(str(row), [{"role": "user", "content": str(row)}]) for row in range(len(streams))]
    marks = torch.tensor(is_harmful)
    means = [streams[marks == harmful].mean(0).repeat(2, 1) for harmful in (True, False)]
    requests = TrainingRequests(
        PlantedReader(streams),
        tuple(chats),
        tuple(is_harmful),
        tuple(map(str, range(len(streams)))),
        frozenset(),
        "planted",
        lambda settings, compute: compute(),
    )
    return ModelInfo(
        "toy",
        None,
        (),
        compute_mean_activations=lambda: MeanActivations(*means, frozenset(), "planted"),
        load_training_requests=lambda: requests,
    )


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


def test_with_all_layers_each_block_gets_the_direction_of_its_own_layer() -> None:
    model, activations = tiny_model(), plant_activations(2)
    directions = activations.harmful - activations.benign
    settings = {"depth": "0", "strength": "0.3"}
    one, both = (
        replace(get_defense("refusal_steering", {**settings, "layers": layers}), activations=activations)
        for layers in ("one", "all")
    )
    with one.apply_to(model):
        first = record_block_inputs(model)
    with both.apply_to(model):
        steered = record_block_inputs(model)
    assert torch.equal(steered[0], first[0])
    assert torch.allclose(steered[1], first[1] + 0.3 * directions[1], atol=1e-5)


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
    readout = derive_readout(session, QUERIES, undefended)
    plain = score_condition(session, "none", undefended, QUERIES, readout)["margin"]
    model_info = make_model_info(session)
    for name in (
        *("refusal_steering", "conditional_steering", "direction_ablation"),
        *("alpha_steer", "safe_switch"),
    ):
        defense = get_defense(name, {"depth": "0.5"}).prepare(model_info)
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


# --- what is learned from single training queries ---------------------------------------------------------


def test_alpha_steer_leaves_benign_states_where_they_are_and_moves_harmful_ones_by_the_direction() -> None:
    """Benign states span 20 of 64 directions; harmful ones have three times a further direction."""
    made = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=made)).Q.T
    benign, mixed = (torch.randn(n, 20, generator=made) @ basis[:20] for n in (40, 10))
    streams = torch.cat([mixed + 3 * basis[40], benign])
    is_harmful = [True] * 10 + [False] * 40
    info = plant_requests(streams, is_harmful)
    settings = {"null_share": str(44 / 64), "ridge": "2", "strength": "0.5"}
    defense: Any = get_defense("alpha_steer", settings).prepare(info)
    means = defense.activations
    direction = means.harmful[1] - means.benign[1]
    # All harmful states have 3 in one of the 44 directions of the null space, whose mean penalty is 2 / 44.
    gain = 1 / (1 + 2 / 44)
    change = defense.make_transform(means.harmful[1], means.benign[1])(streams) - streams
    torch.testing.assert_close(change[:10], (0.5 * gain * direction).expand(10, 64), atol=1e-4, rtol=0)
    assert change[10:].abs().max() < 1e-5
    assert defense.describe_fit() == {
        "harmful_gain": pytest.approx(gain, abs=1e-5),
        "benign_gain": pytest.approx(0, abs=1e-5),
        "n_harmful": 10,
        "n_benign": 40,
    }
    # With weights of all directions, benign states move as well: the mean of the classes shares them.
    free: Any = get_defense("alpha_steer", {**settings, "null_share": "1"}).prepare(info)
    moved = free.make_transform(means.harmful[1], means.benign[1])(streams) - streams
    assert moved[10:].abs().max() > 1e-2


def test_second_moments_are_those_of_plain_passes_over_whole_prompts() -> None:
    session = make_toy_session()
    chats = [[{"role": "user", "content": query.text}] for query in TRAIN_QUERIES[:4]]
    found = session.request_reader.read_second_moments(chats, 1, [0, 2, 0, 2])
    expected = torch.zeros(3, 64, 64)
    for chat, group in zip(chats, [0, 2, 0, 2], strict=True):
        ids = session.chat_template.render_prompt(chat).ids
        stream = record_block_inputs(session.loaded_model.model, torch.tensor([ids]))[1][0]
        expected[group] += stream.T @ stream
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-4)


def test_the_fitted_threshold_has_the_highest_f1() -> None:
    made = torch.Generator().manual_seed(0)
    for n in (5, 30):
        scores = torch.randn(n, generator=made).mul(2).round()  # with ties
        is_harmful = torch.rand(n, generator=made) < 0.4
        is_harmful[0] = True
        found = find_best_threshold(scores.double(), is_harmful)
        levels = sorted({*scores.tolist(), -99.0, 99.0})
        best = max(f1_score(is_harmful, scores > (a + b) / 2, zero_division=0) for a, b in pairwise(levels))
        assert f1_score(is_harmful, scores > found) == pytest.approx(best)
    assert find_best_threshold(torch.tensor([1.0, 2.0, 6.0, 8.0]), torch.tensor([0, 0, 1, 1]).bool()) == 4.0


def test_the_share_of_training_queries_at_which_a_condition_holds_is_noted() -> None:
    """Along one axis, harmful states lie at 4, benign ones at 0 and a quarter of them at 2.5."""
    streams = torch.tensor([4.0] * 10 + [2.5] * 5 + [0.0] * 15)[:, None] * torch.eye(64)[0]
    info = plant_requests(streams, [True] * 10 + [False] * 20)
    defense: Any = get_defense("conditional_steering").prepare(info)
    # The mean of benign states is 0.625, so the midpoint is 2.3125, and the classes are 3.375 apart.
    assert (defense.fit.harmful_gain, defense.fit.benign_gain) == pytest.approx((1.0, 0.25))
    assert _steering_notices([defense]) == [
        "conditional_steering: adds 100% of its direction to 10 harmful and 25% to 20 benign training "
        "queries (mean in cross-validation)"
    ]
    fitted: Any = get_defense("conditional_steering", {"condition": "fitted"}).prepare(info)
    assert (fitted.fit.harmful_gain, fitted.fit.benign_gain) == pytest.approx((1.0, 0.0))
    assert fitted.fit.parameters[-1] == pytest.approx((3.25 - 2.3125) / 3.375)  # halfway from 2.5 to 4
    planted = torch.zeros(1, 2, 64)
    planted[0, :, 0] = torch.tensor([3.2, 3.3])
    for defended, expected in ((defense, [3.375, 3.375]), (fitted, [0.0, 3.375])):
        means = defended.activations
        change = defended.make_transform(means.harmful[1], means.benign[1])(planted) - planted
        assert change[0, :, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_safe_switch_steers_the_last_block_where_its_probe_expects_harm() -> None:
    model, activations = tiny_model(), plant_activations(2)
    embedded = record_block_inputs(model)[0][0]
    weights = torch.randn(64, generator=torch.Generator().manual_seed(1))
    scores = embedded @ weights
    fit = SteeringFit((*weights.tolist(), float(scores.median()), 1e-4), 1.0, 0.0, 1, 1, "planted")
    settings = {"depth": "0", "strength": "2"}
    defense = replace(get_defense("safe_switch", settings), activations=activations, fit=fit)
    plain = record_block_inputs(model)
    with defense.apply_to(model):
        steered = record_block_inputs(model)
    assert torch.equal(steered[0], plain[0])
    fires = scores > scores.median() + 1e-4
    assert fires.sum() == 2  # of five positions
    change = (steered[1] - plain[1])[0]
    expected = 2 * (activations.harmful[1] - activations.benign[1])
    torch.testing.assert_close(change, fires[:, None] * expected, atol=1e-5, rtol=0)


def test_the_probe_of_safe_switch_is_fitted_to_the_training_queries() -> None:
    made = torch.Generator().manual_seed(0)
    streams = torch.randn(60, 64, generator=made)
    streams[:20, :16] += 8
    defense: Any = get_defense("safe_switch").prepare(plant_requests(streams, [True] * 20 + [False] * 40))
    assert (defense.fit.harmful_gain, defense.fit.benign_gain) == (1.0, 0.0)
    probe = fit_probe(streams.double(), torch.tensor([True] * 20 + [False] * 40))
    assert defense.fit.parameters[:65] == pytest.approx([*probe[:-1].tolist(), -float(probe[-1])])
