"""Objectives of training that read or perturb hidden states: rerouting, and latent adversarial training.

Both use harmful requests with a refusal and a complying opener, and benign requests with the model's own
responses. No continuation of an opener is needed, and none is trained.

Sources: Improving Alignment and Robustness with Circuit Breakers (Zou et al., NeurIPS 2024,
https://arxiv.org/abs/2406.04313); Latent Adversarial Training Improves Robustness to Persistent Harmful
Behaviors in LLMs (Sheshadri et al., 2024, https://arxiv.org/abs/2407.15549).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defenses.steering import change_block_input, get_blocks

if TYPE_CHECKING:
    from defenses.training.recipes import Objective
    from defenses.training.trainer import TrainingSettings

# Padded sequences: `ids`, `mask` (1 except in padding) and `is_response`, each rows x length.
SequenceBatch = dict[str, Tensor]


def build_objective_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    settings: TrainingSettings,
    objective: Objective,
    options: Mapping[str, Any],
) -> Any:
    """Return a trainer of transformers that minimizes an objective of hidden states.

    Args:
        model: PEFT model with one adapter.
        tokenizer: transformers tokenizer.
        dataset: rows with `prompt_ids`, `response_ids` and `rejected_ids`, which is empty if benign.
        settings: settings with resolved defaults.
        objective: `rerouting` or `adversarial`.
        options: options of `transformers.TrainingArguments`.
    """
    from transformers import Trainer, TrainingArguments

    class ObjectiveTrainer(Trainer):
        """Trainer for batches of `collate_rows`."""

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            if objective == "rerouting":
                progress = self.state.global_step / max(1, self.state.max_steps)
                return compute_rerouting_loss(model, inputs, settings.depth, progress)
            return compute_adversarial_loss(
                model, inputs, settings.depth, settings.radius, settings.attack_steps
            )

    return ObjectiveTrainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=lambda rows: collate_rows(rows, tokenizer.pad_token_id or 0),
    )


def collate_rows(rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> dict[str, SequenceBatch]:
    """Return the sequences of some rows, padded on the right.

    Args:
        rows: of the dataset of `build_objective_trainer`.
        pad_id: token id in the padding.

    Returns:
        `complying` and `refusing` (harmful requests with each of their responses, in the same order) and
        `retained` (benign requests with theirs); without the classes that the rows do not have.
    """
    harmful = [row for row in rows if row["rejected_ids"]]
    benign = [row for row in rows if not row["rejected_ids"]]
    parts = {
        "complying": [(row["prompt_ids"], row["rejected_ids"]) for row in harmful],
        "refusing": [(row["prompt_ids"], row["response_ids"]) for row in harmful],
        "retained": [(row["prompt_ids"], row["response_ids"]) for row in benign],
    }
    return {name: pad_sequences(pairs, pad_id) for name, pairs in parts.items() if pairs}


def pad_sequences(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> SequenceBatch:
    """Return prompts followed by responses as one batch."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), length), pad_id)
    mask, is_response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        is_response[row, len(prompt) : end] = True
    return {"ids": ids, "mask": mask, "is_response": is_response}


def compute_rerouting_loss(
    model: Any, batch: Mapping[str, SequenceBatch], depth: float, progress: float
) -> Tensor:
    """Return the loss of representation rerouting.

    On harmful requests with a complying opener, it is the cosine similarity of the hidden states with those
    of the model without its adapter, where it is positive, at two layers and at all positions that predict or
    hold a token of the opener. On benign requests, it is the distance from the states without the adapter, at
    all layers and positions. The weight of the first term falls linearly from 1 to 1/2, and that of the
    second rises from 0 to 1/2. The authors train on whole harmful responses, multiply both by a constant,
    which does not matter to Adam, and choose layers 10 and 20 of 32.

    Args:
        model: PEFT model.
        batch: from `collate_rows`.
        depth: the later of the two layers, as a share of the model's depth; the other lies halfway.
        progress: share of the steps that have been taken.
    """
    loss = torch.zeros((), device=model.device)
    if "complying" in batch:
        sequences = batch["complying"]
        tuned, original = _compare_states(model, sequences)
        last = depth * (len(tuned) - 1)
        is_read = sequences["is_response"] | _shift_left(sequences["is_response"])
        similarities = [
            torch.cosine_similarity(tuned[layer][is_read], original[layer][is_read], dim=-1)
            for layer in (max(1, int(last / 2)), max(1, int(last)))
        ]
        loss = loss + (1 - progress / 2) * torch.stack(similarities).relu().mean()
    if "retained" in batch:
        sequences = batch["retained"]
        tuned, original = _compare_states(model, sequences)
        is_token = sequences["mask"].bool()
        distances = [
            (now[is_token] - before[is_token]).norm(dim=-1)
            for now, before in zip(tuned[1:], original[1:], strict=True)
        ]
        loss = loss + progress / 2 * torch.stack(distances).mean()
    return loss


def _compare_states(model: Any, sequences: SequenceBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the hidden states of all layers with the adapter, and without it and without gradients."""
    tuned = _run_model(model, sequences, output_hidden_states=True, logits_to_keep=1).hidden_states
    with torch.no_grad(), model.disable_adapter():
        original = _run_model(model, sequences, output_hidden_states=True, logits_to_keep=1).hidden_states
    return tuned, original


def compute_adversarial_loss(
    model: Any, batch: Mapping[str, SequenceBatch], depth: float, radius: float, n_steps: int
) -> Tensor:
    """Return the loss of latent adversarial training.

    It is the loss of refusals of harmful requests whose hidden states are perturbed toward compliance, plus
    that of the model's own responses to benign requests. The authors perturb several layers, and also lower
    the probability of the harmful response.

    Args:
        model: PEFT model.
        batch: from `collate_rows`.
        depth: layer that is perturbed, as a share of the model's depth.
        radius: as for `find_perturbation`.
        n_steps: as for `find_perturbation`.
    """
    loss = torch.zeros((), device=model.device)
    if "refusing" in batch:
        perturbation = find_perturbation(model, batch["complying"], depth, radius, n_steps)
        loss = loss + compute_response_loss(model, batch["refusing"], depth, perturbation)
    if "retained" in batch:
        loss = loss + compute_response_loss(model, batch["retained"])
    return loss


def find_perturbation(
    model: Any, sequences: SequenceBatch, depth: float, radius: float, n_steps: int
) -> Tensor:
    """Return the perturbation of the hidden states of prompts that makes the responses most likely.

    It is found by projected gradient descent, in steps of 2 / `n_steps` of its largest norm.

    Args:
        model: the model; its weights are not changed.
        sequences: prompts with the responses that become likely.
        depth: layer that is perturbed, as a share of the model's depth.
        radius: largest norm at a position, as a share of the median norm of the hidden states there.
        n_steps: number of steps.

    Returns:
        Rows x length x width; zero outside of prompts.
    """
    is_prompt = (sequences["mask"].bool() & ~sequences["is_response"])[..., None]
    with torch.no_grad():
        states = _run_model(model, sequences, output_hidden_states=True, logits_to_keep=1).hidden_states
    stream = states[int(depth * (len(states) - 1))]
    limit = radius * stream.norm(dim=-1)[is_prompt[..., 0]].median()
    perturbation = torch.zeros_like(stream)
    for _ in range(n_steps):
        perturbation.requires_grad_()
        loss = compute_response_loss(model, sequences, depth, perturbation)
        (gradient,) = torch.autograd.grad(loss, [perturbation])
        norms = gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        moved = perturbation.detach() - 2 / n_steps * limit * gradient / norms
        excess = moved.norm(dim=-1, keepdim=True) / limit
        perturbation = is_prompt * moved / excess.clamp_min(1)
    return perturbation


def compute_response_loss(
    model: Any, sequences: SequenceBatch, depth: float = 0.0, perturbation: Tensor | None = None
) -> Tensor:
    """Return the mean negative log-likelihood (nats) of the tokens of responses.

    Args:
        model: the model.
        sequences: prompts with responses.
        depth: layer that is perturbed, as a share of the model's depth.
        perturbation: added to the hidden states of prompts (rows x any length x width); None for nothing.
    """
    blocks = get_blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)
    context = (
        nullcontext()
        if perturbation is None
        else change_block_input(
            blocks[int(depth * len(blocks))], lambda stream: stream + _fit_length(perturbation, stream)
        )
    )
    with context:
        logits = _run_model(model, sequences).logits
    is_target = sequences["is_response"][:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1][is_target].float(), sequences["ids"][:, 1:][is_target])


def _fit_length(perturbation: Tensor, stream: Tensor) -> Tensor:
    """Return a perturbation, cut or continued by zeros to the length of the stream; prompts begin alike."""
    n_missing = stream.shape[1] - perturbation.shape[1]
    return nn.functional.pad(perturbation, (0, 0, 0, n_missing)).to(stream)


def _shift_left(marks: Tensor) -> Tensor:
    """Return the marks one position earlier."""
    return nn.functional.pad(marks[:, 1:], (0, 1))


def _run_model(model: Any, sequences: SequenceBatch, **options: Any) -> Any:
    """Return the output of the model for padded sequences."""
    return model(input_ids=sequences["ids"], attention_mask=sequences["mask"], use_cache=False, **options)
