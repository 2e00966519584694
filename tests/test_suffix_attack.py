"""Suffixes by greedy coordinate gradient on a random model: gradients, losses, the file for `--attack`."""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import FOUR, TOY_READOUT, assert_user_error, make_toy_session, render_query, run_cli

from analysis.attacks import get_attack, make_suffix_attack
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import sample_queries
from analysis.readouts.readout import Readout
from analysis.run import score_condition
from analysis.suffix_attack import OptimizedSuffix, SuffixOptions, SuffixSearch, find_suffix_slots
from defenses.catalog import get_defense
from defenses.chats import edit_last_user
from defenses.contract import Chat, Defense
from defenses.errors import UserError

QUERIES = sample_queries(load_queries("contrast").select_split("train").queries, 4)
NONE, REMINDER = get_defense("none"), get_defense("self_reminder")
OPTIONS = SuffixOptions(n_tokens=5, n_candidates=24)
LOSSES = pytest.mark.parametrize("readout", [None, TOY_READOUT], ids=["target", "margin"])


def read_reference_loss(search: SuffixSearch, session, readout: Readout | None, text: str, defense) -> float:
    """Return the mean loss of a suffix by plain passes of the model over the prompts of the attack."""
    losses = []
    for query in QUERIES:
        (prompt,) = render_query(session, defense, query, make_suffix_attack("x", text))
        target = session.loaded_model.tokenizer.encode("Sure, here is", add_special_tokens=False)
        with torch.no_grad():
            ids = torch.tensor([[*prompt.ids, *target]])
            logits = session.loaded_model.model(input_ids=ids).logits[0].float()
        n_prompt = len(prompt.ids)
        if readout is not None:
            losses.append(float(readout.compute_margins(logits[n_prompt - 1 : n_prompt])[0, 0]))
        else:
            likelihoods = logits[n_prompt - 1 : -1].log_softmax(1)
            losses.append(-float(likelihoods[range(len(target)), target].mean()))
    return sum(losses) / len(losses)


@LOSSES
def test_the_gradient_by_a_one_hot_vector_is_that_of_finite_differences(readout: Readout | None) -> None:
    session = make_toy_session()
    search = SuffixSearch(session, NONE, QUERIES[:2], OPTIONS, readout)
    gradient, loss = search.compute_gradient()
    assert gradient.shape == (len(search.suffix_ids), len(search.embedding_table))
    assert loss == pytest.approx(search.loss, abs=1e-4)
    embeddings = search.embedding_table[list(search.suffix_ids)]
    step = 0.005  # a larger one shows the curvature of the loss

    def read_loss(position: int, token: int, change: float) -> float:
        changed = embeddings.clone()
        changed[position] += change * search.embedding_table[token]
        with torch.no_grad():
            return sum(float(search.compute_plain_loss(slot, changed)) for slot in search.slots) / 2

    strongest = [divmod(int(place), gradient.shape[1]) for place in gradient.abs().flatten().topk(3).indices]
    for position, token in (*strongest, (1, 300), (len(search.suffix_ids) - 1, 40)):
        difference = read_loss(position, token, step) - read_loss(position, token, -step)
        assert float(gradient[position, token]) == pytest.approx(difference / (2 * step), rel=0.01, abs=5e-4)
    assert float(gradient.abs().max()) > 1e-3


@LOSSES
def test_the_loss_falls_and_the_written_suffix_has_the_loss_told(
    readout: Readout | None, tmp_path: Path
) -> None:
    session = make_toy_session()
    search = SuffixSearch(session, REMINDER, QUERIES, OPTIONS, readout, seed=1)
    losses = [search.loss, *search.iterate_steps(5)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) > 3
    found = OptimizedSuffix(search.text, tuple(losses), {"model": "toy", "seed": 1})
    attack = get_attack(str(found.save(tmp_path / "found.csv")))
    assert attack.build_chat(QUERIES[0])[0]["content"] == f"{QUERIES[0].text} {search.text}"
    reference = read_reference_loss(search, session, readout, search.text, REMINDER)
    assert reference == pytest.approx(losses[-1], abs=1e-3)
    if readout is not None:
        scores = score_condition(session, "self_reminder", REMINDER, QUERIES, readout, attack)
        assert scores["margin"].mean() == pytest.approx(losses[-1], abs=1e-3)
    again = SuffixSearch(session, REMINDER, QUERIES, OPTIONS, readout, seed=1)
    assert [*again.iterate_steps(2)] == losses[1:3]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("template", FOUR)
def test_a_suffix_is_found_in_every_prompt_and_survives_as_text(template: str, kind: str) -> None:
    session = make_toy_session("llama", template, kind)
    slots, ids = find_suffix_slots(session, REMINDER, QUERIES, 6)
    assert 0 < len(ids) <= 6
    text = session.loaded_model.tokenizer.decode(ids).strip()
    for slot, query in zip(slots, QUERIES, strict=True):
        (prompt,) = render_query(session, REMINDER, query, make_suffix_attack("x", text))
        assert prompt.ids == slot.insert(ids) and set(text) <= {"x", " "}
        (other,) = render_query(session, REMINDER, query, make_suffix_attack("x", text.replace("x", "y")))
        assert other.ids[: len(slot.before)] == slot.before != other.ids


@dataclass(frozen=True)
class Repeating(Defense):
    """Shows the request twice."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return edit_last_user(chat, lambda text: f"{text}\n\nAgain: {text}")


@dataclass(frozen=True)
class Twofold(Defense):
    """Reads the request twice."""

    def rewrite(self, chat: Chat, rng: random.Random) -> Chat:
        return chat

    def rewrite_copies(self, chat: Chat, rng: random.Random) -> list[Chat]:
        return [chat, chat]


def test_a_defense_without_a_place_for_the_suffix_is_an_error() -> None:
    session = make_toy_session()
    with pytest.raises(UserError, match=r"repeating: the tokens of a suffix are not in one place.*choose an"):
        find_suffix_slots(session, Repeating(), QUERIES, 5)
    with pytest.raises(UserError, match=r"twofold reads several copies.*score it with --attack"):
        find_suffix_slots(session, Twofold(), QUERIES, 5)


def test_the_command_writes_a_file_that_attack_reads(cli_home: Path) -> None:
    options = ["--length", "4", "--steps", "2", "--candidates", "8", "--queries", "2", "--offline"]
    result = run_cli("suffix", "-m", "tiny", "-d", "policy", *options, "-o", "own.csv")
    assert result.code == 0, result.err
    with Path("own.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert f"Suffix: {row['suffix']}" in result.out and "analyze -m tiny --attack own.csv" in result.out
    assert float(row["last_loss"]) <= float(row["first_loss"]) and row["defense"] == "policy"
    assert re.search(r"^2 steps of about \d+ s: about \d+ s$", result.err, re.MULTILINE)
    assert get_attack("own.csv").build_chat(QUERIES[0])[0]["content"].endswith(f" {row['suffix']}")
    assert_user_error(run_cli("suffix", "-m", "tiny", "-o", "persona.csv"), "taken by a shipped attack")
    assert_user_error(run_cli("suffix", "-m", "tiny", "-o", "own.txt"), "name of a .csv file")
    assert_user_error(run_cli("suffix", "-m", "tiny", "--steps", "0"), "--steps 0", "from 1 on")
