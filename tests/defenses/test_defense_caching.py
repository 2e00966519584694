"""Cached scores belong to one version of a defense: its class, its weights and their scaling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import derive_readout, make_adapter, make_toy_session

from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.mechanism.directions import load_mean_activations
from analysis.models.cache import ScoreCache
from analysis.models.session import ModelSession
from analysis.run import score_condition
from analysis.studies.manifest import describe_defense
from defenses.adapter_merge import ADAPTER_CONFIG_FILE
from defenses.adapters import load_adapter
from defenses.catalog import get_defense
from defenses.contract import Defense
from defenses.tuning import SafetyTuning

QUERIES = sample_queries(load_queries("twins").queries, 4)
OWN_DEFENSE = """
from dataclasses import dataclass
from defenses.steering import Steering

@dataclass(frozen=True)
class Mine(Steering):
    '''Adds the direction with a factor.'''
    def make_transform(self, harmful_mean, benign_mean):
        return lambda stream: stream + {factor} * (harmful_mean - benign_mean).to(stream)
"""


@pytest.fixture
def session(tmp_path: Path) -> ModelSession:
    """A toy model with a cache."""
    return ModelSession.from_model(make_toy_session().loaded_model, score_cache=ScoreCache(tmp_path / "s"))


def score_margins(session: ModelSession, defense: Defense) -> list[float]:
    readout = derive_readout(session, QUERIES, get_defense("none"))
    return list(score_condition(session, defense.name, defense, QUERIES, readout)["margin"])


def test_an_edited_user_defined_class_is_computed_again(session: ModelSession, tmp_path: Path) -> None:
    activations = load_mean_activations(
        session, [query.text for query in QUERIES], [query.harmful for query in QUERIES]
    )
    margins, digests = [], []
    for factor in (1, 5):
        (tmp_path / "mine.py").write_text(OWN_DEFENSE.format(factor=factor))
        defense: Any = get_defense(str(tmp_path / "mine.py"))
        assert defense.is_user_defined
        margins.append(score_margins(session, replace(defense, activations=activations)))
        digests.append(describe_defense(defense)["source_sha256"])
    assert margins[0] != margins[1] and digests[0] != digests[1]


def test_scores_of_an_adapter_depend_on_its_scaling(session: ModelSession, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", seed=1)
    margins = score_margins(session, SafetyTuning(adapter=load_adapter(folder)))
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
    assert score_margins(session, SafetyTuning(adapter=load_adapter(folder))) != margins
