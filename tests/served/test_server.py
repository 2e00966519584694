"""The embedded model at a real server, such as vLLM; see docs/served-models.md.

Run by hand: SERVED_SMOLLM2=http://localhost:8000/v1#smollm2 python -m pytest -m server tests/served
"""

from __future__ import annotations

import os

import pytest
import torch
from test_served_model import ALL, NONE, open_model

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.models.generation import generate_token_ids
from analysis.models.loading import locate_model_files
from analysis.models.session import ModelSession
from analysis.readouts.bounds import UnboundedMarginError
from analysis.readouts.prompt_scores import score_prompts
from defenses.catalog import get_defense

TOLERANCE = 0.05  # nats; between two programs that compute in float32


@pytest.mark.server
@pytest.mark.embedded
def test_margins_and_responses_of_a_real_server_are_those_of_the_model_on_this_machine(smollm2):
    address = os.environ.get("SERVED_SMOLLM2")
    if not address:
        pytest.skip("SERVED_SMOLLM2 is not set")
    folder, _ = locate_model_files("smollm2", offline=True, notify=lambda text: None)
    model, engine = open_model(address, folder)
    local = ModelSession.from_model(smollm2)
    queries = load_queries("contrast").select_split("test").limit_queries(8).queries
    rendered = local.render_prompts(get_defense("policy"), DIRECT_ATTACK.build_query_chats(queries))
    prompts = [first.ids for first, *_ in rendered]
    n_compared = 0
    for readout in ALL:
        true = score_prompts(smollm2, local.engine, NONE, prompts, readout)
        try:
            scores = score_prompts(model, engine, NONE, prompts, readout)
        except UnboundedMarginError:
            continue
        low, high = (scores[:, 0], scores[:, 0]) if scores.shape[1] == 2 else scores[:, 2:].T
        assert ((low <= true[:, 0] + TOLERANCE) & (true[:, 0] <= high + TOLERANCE)).all(), readout
        n_compared += 1
    assert n_compared
    responses = generate_token_ids(engine, prompts, 12, model.end_token_ids)
    expected = generate_token_ids(local.engine, prompts, 12, smollm2.end_token_ids)
    # Where two tokens are nearly equally likely, rounding decides.
    assert sum(map(lambda one, other: one == other, responses, expected)) >= len(prompts) - 2
    assert torch.isfinite(true).all()
