"""Objectives of hidden states: their values by hand, and what training with them does to a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_model, tiny_model, toy_tokenizer
from peft import LoraConfig, get_peft_model

from defenses.training.objectives import (
    collate_rows,
    compute_rerouting_loss,
    compute_response_loss,
    find_perturbation,
)
from defenses.training.recipes import Objective, TargetResponse, TrainingExample
from defenses.training.trainer import TrainingSettings, train_model

PROMPTS = [[5, 60, 70, 81, 9], [5, 60, 72, 9], [5, 61, 77, 78, 79, 9], [5, 62, 9]]
ROWS = [
    {"prompt_ids": PROMPTS[0], "response_ids": [400, 401, 2], "rejected_ids": [500, 501]},
    {"prompt_ids": PROMPTS[1], "response_ids": [402, 2], "rejected_ids": [502, 503, 504]},
    {"prompt_ids": PROMPTS[2], "response_ids": [600, 601], "rejected_ids": []},
    {"prompt_ids": PROMPTS[3], "response_ids": [602, 603, 604], "rejected_ids": []},
]
BATCH = collate_rows(ROWS, pad_id=3)


def build_examples() -> list[TrainingExample]:
    """Return six harmful and six benign requests; chats name the token that tells them apart."""
    tokens = range(6)
    harmful = [
        TrainingExample(
            [{"role": "user", "content": f"70 {100 + token}"}],
            TargetResponse("No.", is_complete=True),
            TargetResponse("Sure, here", is_complete=False),
        )
        for token in tokens
    ]
    benign = [
        TrainingExample(
            [{"role": "user", "content": f"80 {100 + token}"}], TargetResponse("A loaf", is_complete=False)
        )
        for token in tokens
    ]
    return [*harmful, *benign]


def render(chat: Any) -> list[int]:
    return [5, *map(int, chat[0]["content"].split()), 9]


def train(objective: Objective, folder: Path, **settings: Any) -> tuple[Any, list[float]]:
    """Train a tiny model; return it with its losses."""
    modules = ("q_proj", "v_proj", "down_proj")
    made = TrainingSettings(rank=8, batch=12, depth=0.5, modules=modules, **settings).resolve_defaults(1)
    arguments = render, build_examples(), made, objective, folder, lambda *_: None
    tuned, history = train_model(fresh_model(), toy_tokenizer(), *arguments)
    return tuned, [loss for _, loss in history]


def run_states(model: Any, ids: list[int]) -> Any:
    """Return the hidden states of one prompt, layers x length x width."""
    with torch.no_grad():
        return torch.cat(model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states)


def test_the_loss_of_responses_is_that_of_plain_passes() -> None:
    model, losses = tiny_model(), []
    for row in ROWS[:2]:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(len(row["prompt_ids"]), ids.shape[1]):
            losses.append(-float(log_probabilities[position - 1, ids[0, position]]))
    with torch.no_grad():
        found = float(compute_response_loss(model, BATCH["refusing"]))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_perturbation_stays_in_its_radius_at_prompts_and_makes_compliance_likelier() -> None:
    model, sequences = tiny_model(), BATCH["complying"]
    found = find_perturbation(model, sequences, 0.5, 0.4, 6)
    states = [run_states(model, prompt)[1] for prompt in PROMPTS[:2]]
    limit = 0.4 * float(torch.cat(states).norm(dim=-1).median())
    norms = found.norm(dim=-1)
    for row, prompt in enumerate(PROMPTS[:2]):
        assert 0.5 * limit < norms[row, : len(prompt)].max() <= limit * (1 + 1e-5)
        assert norms[row, len(prompt) :].max() == 0
    with torch.no_grad():
        plain = float(compute_response_loss(model, sequences))
        perturbed = float(compute_response_loss(model, sequences, 0.5, found))
    assert perturbed < plain - 0.1


def test_the_rerouting_loss_is_that_of_its_definition() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        tuned = get_peft_model(fresh_model(), config)
        with torch.no_grad():  # nothing is learned yet
            assert float(compute_rerouting_loss(tuned, BATCH, 0.5, 0.5)) == pytest.approx(0.75)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    similarities, distances = [], []
    for row in ROWS:
        ids = row["prompt_ids"] + (row["rejected_ids"] or row["response_ids"])
        now, before = run_states(tuned, ids), run_states(tiny_model(), ids)
        if row["rejected_ids"]:
            start = len(row["prompt_ids"]) - 1
            similarities.append(torch.cosine_similarity(now[1, start:], before[1, start:], dim=-1))
        else:
            distances.append((now[1:] - before[1:]).norm(dim=-1).flatten())
    similarity, distance = torch.cat(similarities).relu().mean(), torch.cat(distances).mean()
    assert similarity < 0.99 and distance > 0.1
    for progress in (0.0, 0.25, 1.0):
        expected = (1 - progress / 2) * similarity + progress / 2 * distance
        with torch.no_grad():
            loss = compute_rerouting_loss(tuned, BATCH, 0.5, progress)
        assert float(loss) == pytest.approx(float(expected), abs=1e-4)


def test_rerouting_turns_states_of_compliance_away_and_keeps_those_of_benign_requests(tmp_path: Path) -> None:
    tuned, losses = train("rerouting", tmp_path, rate=0.02, epochs=40)
    assert losses[0] == pytest.approx(1.0, abs=1e-3)
    opener = toy_tokenizer().encode("Sure, here", add_special_tokens=False)
    response = toy_tokenizer().encode("A loaf", add_special_tokens=False)
    harmful, benign = [5, 70, 103, 9, *opener], [5, 80, 103, 9, *response]
    now, before = (run_states(model, harmful)[1, 3:] for model in (tuned, tiny_model()))
    similarity = float(torch.cosine_similarity(now, before, dim=-1).relu().mean())
    kept, was = (run_states(model, benign)[1] for model in (tuned, tiny_model()))
    moved = float((kept - was).norm(dim=-1).mean() / was.norm(dim=-1).mean())
    away = float((now - before).norm(dim=-1).mean() / before.norm(dim=-1).mean())
    assert similarity < 0.4 and moved < 0.3 * away


def test_latent_adversarial_training_makes_refusals_survive_a_perturbation(tmp_path: Path) -> None:
    tuned, _ = train("adversarial", tmp_path, rate=0.02, epochs=20, radius=0.1)
    tokenizer = toy_tokenizer()
    rows = [
        {
            "prompt_ids": render(example.chat),
            "response_ids": [*tokenizer.encode("No.", add_special_tokens=False), tokenizer.eos_token_id],
            "rejected_ids": tokenizer.encode("Sure, here", add_special_tokens=False),
        }
        for example in build_examples()[:6]
    ]
    batch, losses = collate_rows(rows, pad_id=3), []
    for model in (tiny_model(), tuned):
        perturbation = find_perturbation(model, batch["complying"], 0.5, 0.1, 6)
        with torch.no_grad():
            losses.append(float(compute_response_loss(model, batch["refusing"], 0.5, perturbation)))
    assert losses[1] < 0.2 * losses[0]
