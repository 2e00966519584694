"""Directions are read at the right positions, and a planted direction is found in its layer."""

import pytest
import torch
from conftest import fresh_model, render_query, toy_tokenizer

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.mechanism.components import locate_components
from analysis.mechanism.directions import ConceptDirections, compute_projections, record_residual_states
from analysis.models.loading import LoadedModel
from analysis.models.session import ModelSession
from defenses.catalog import get_defense

QUERIES = load_queries("contrast").select_split("test").limit_queries(4).queries
REMINDER = get_defense("self_reminder")


def test_states_are_recorded_at_the_end_of_the_prompt_and_of_the_users_text():
    # A separate model: transformers leaves hooks on a model that has returned hidden states.
    session = ModelSession.from_model(LoadedModel("toy", fresh_model(), toy_tokenizer(), {"id": "toy"}))
    model = session.loaded_model.model
    components = locate_components(model)
    states_by_query = record_residual_states(
        session, components, REMINDER, DIRECT_ATTACK.build_query_chats(QUERIES)
    )
    for query, states in zip(QUERIES, states_by_query, strict=True):
        (prompt,) = render_query(session, REMINDER, query)
        stop = prompt.text.index(query.text) + len(query.text)
        lengths = [
            len(session.chat_template.decode_tokens(prompt.ids[:count]))
            for count in range(len(prompt.ids) + 1)
        ]
        last_user_token = next(count for count, length in enumerate(lengths) if length >= stop) - 1
        with torch.no_grad():
            hidden_states = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        for layer in range(2):
            assert torch.allclose(states[0, layer], hidden_states[layer][0, -1], atol=1e-4)
            assert torch.allclose(states[1, layer], hidden_states[layer][0, last_user_token], atol=1e-4)
    axes, midpoints = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(0))
    directions = ConceptDirections(axes, midpoints, (0, 0))
    projections = compute_projections(
        session, components, REMINDER, DIRECT_ATTACK.build_query_chats(QUERIES), directions
    )
    assert torch.allclose(projections, directions.project_states(states_by_query), atol=1e-4)


def test_a_planted_direction_is_found_in_its_layer():
    generator = torch.Generator().manual_seed(0)
    is_harmful = torch.arange(60) % 2 == 0
    states = torch.randn(60, 2, 3, 16, generator=generator)
    states[is_harmful, 0, 1, 5] += 8.0
    states[is_harmful, 1, 2, 3] += 8.0
    pairs = [f"p{number // 2}" for number in range(60)]
    directions = ConceptDirections.from_states(states, is_harmful, pairs)
    assert directions.best_layers == (1, 2)
    projections = directions.project_states(states)
    assert projections[is_harmful, 0, 1].mean() == pytest.approx(0.5, abs=1e-4)
    assert projections[~is_harmful, 0, 1].mean() == pytest.approx(-0.5, abs=1e-4)
    assert directions.axes[0, 1].abs().argmax() == 5
