"""What a model holds where its answer begins, averaged over harmful and over benign training queries.

From these means come the directions of https://arxiv.org/abs/2406.11717; they are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from analysis import kept, scoring
from analysis.queries import Query
from defenses import Message, MeanActivations
from defenses.adapters import fingerprint_queries

if TYPE_CHECKING:
    from analysis.bench import ModelSession

_PROMPTS_PER_PASS = 16  # prompts in one pass


def load_mean_activations(session: ModelSession, queries: Sequence[Query]) -> MeanActivations:
    """Return the mean residual stream of either class at each layer, computed now or before.

    Args:
        session: the model, which is asked undefended.
        queries: of the train split, both classes.
    """
    prompts = [session.chat_template.render_prompt([Message(role="user", content=one.text)]).ids for one in queries]
    harmful = [query.harmful for query in queries]
    about = {"prompts": prompts, "harmful": harmful}
    whole = {**scoring.describe_computation(session.loaded_model), **about}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    place = kept.make_json_cache_path("residuals", session.loaded_model, about)
    if (found := kept.read_cached_json(place)) is None:
        held = _last_token_states(session, prompts)
        is_harmful = torch.tensor(harmful)
        found = {"harmful": held[is_harmful].mean(0).tolist(), "benign": held[~is_harmful].mean(0).tolist()}
        kept.write_cached_json(place, found)
    seen = frozenset(fingerprint_queries(query.text for query in queries))
    return MeanActivations(torch.tensor(found["harmful"]), torch.tensor(found["benign"]), seen, digest)


def _last_token_states(session: ModelSession, prompt_ids: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The residual stream that enters each block, at the last position of each prompt."""
    model, found = session.loaded_model.model, []
    for start in range(0, len(prompt_ids), _PROMPTS_PER_PASS):
        rows = [torch.tensor(ids) for ids in prompt_ids[start : start + _PROMPTS_PER_PASS]]
        # Padding on the right comes too late for a causal model to see it.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        places = torch.arange(ids.shape[1], device=model.device).expand_as(ids)
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=mask.to(model.device),
                position_ids=places,
                output_hidden_states=True,
                use_cache=False,
                logits_to_keep=1,
            )
        last = [len(row) - 1 for row in rows]
        # The last entry is what leaves the last block, behind the final norm: no block's input.
        layers = [layer[range(len(rows)), last].float().cpu() for layer in out.hidden_states[:-1]]
        found.append(torch.stack(layers, dim=1))
    return torch.cat(found)
