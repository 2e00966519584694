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
from defenses import Message, Residuals
from defenses.adapters import fingerprints

if TYPE_CHECKING:
    from analysis.bench import Bench

_ROWS = 16  # prompts in one pass


def residuals(bench: Bench, queries: Sequence[Query]) -> Residuals:
    """Return the mean residual stream of either class at each layer, computed now or before.

    Args:
        bench: the model, which is asked undefended.
        queries: of the train split, both classes.
    """
    prompts = [bench.renderer.render([Message(role="user", content=one.text)]).ids for one in queries]
    harmful = [query.harmful for query in queries]
    about = {"prompts": prompts, "harmful": harmful}
    whole = {**scoring.about(bench.loaded), **about}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    place = kept.place("residuals", bench.loaded, about)
    if (found := kept.read(place)) is None:
        held = _held(bench, prompts)
        is_harmful = torch.tensor(harmful)
        found = {"harmful": held[is_harmful].mean(0).tolist(), "benign": held[~is_harmful].mean(0).tolist()}
        kept.write(place, found)
    seen = frozenset(fingerprints(query.text for query in queries))
    return Residuals(torch.tensor(found["harmful"]), torch.tensor(found["benign"]), seen, digest)


def _held(bench: Bench, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The residual stream that enters each block, at the last position of each prompt."""
    model, found = bench.loaded.model, []
    for start in range(0, len(prompts), _ROWS):
        rows = [torch.tensor(ids) for ids in prompts[start : start + _ROWS]]
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
