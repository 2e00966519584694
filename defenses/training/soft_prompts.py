"""Training of soft prompts: learned embeddings in the system turn of a model whose weights stay as they are.

Sources: prompt tuning (Lester et al., EMNLP 2021, https://arxiv.org/abs/2104.08691), and directed
representation optimization (Zheng et al., ICML 2024, https://arxiv.org/abs/2401.18018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defenses.chats import prepend_system
from defenses.contract import Chat, LearnedTokens
from defenses.detection import fit_probe
from defenses.errors import UserError
from defenses.reminders import SafetyPrompt, SelfReminder, ToneReminder
from defenses.soft_prompts import insert_embeddings, make_learned_tokens
from defenses.tokens import encode_plain_text
from defenses.training.objectives import compute_response_loss, pad_sequences

if TYPE_CHECKING:
    from defenses.training.recipes import TrainingExample
    from defenses.training.trainer import PromptRenderer, TrainingSettings

# Decides, by the model's own responses, which chats it refuses.
RefusalJudge = Callable[[Sequence[Chat]], Sequence[bool]]

N_COMPONENTS = 4  # of the hidden states, in which DRO finds its directions
_HARMFULNESS_WEIGHT, _RESIDUAL_WEIGHT = 1e-2, 1e-3  # of the losses beside that of refusal, as the authors'
# The prompts under which hidden states and responses are compared; the first is the one that is optimized.
_SAFETY_PROMPTS = (SafetyPrompt().text, ToneReminder().get_reminder(), SelfReminder().text)
_BATCH_SIZE = 16  # prompts per pass without gradients
_TRAINING_DIGEST = "0" * 64  # of embeddings that are still trained


class SoftPromptModel(nn.Module):
    """A frozen model with learned embeddings, which are the only parameters.

    Args:
        model: transformers model; it is no submodule, so that checkpoints hold the embeddings only.
        tokens: token ids of the embeddings.
        embeddings: the first values, tokens x width.
    """

    def __init__(self, model: Any, tokens: LearnedTokens, embeddings: Tensor) -> None:
        super().__init__()
        self._frozen = (model.requires_grad_(False).eval(),)
        self.tokens = tokens
        self.embeddings = nn.Parameter(embeddings.detach().float().clone())

    @property
    def frozen_model(self) -> Any:
        """The model that reads the embeddings."""
        return self._frozen[0]

    def insert(self) -> AbstractContextManager[None]:
        """Return a context in which the model reads the embeddings at their token ids."""
        return insert_embeddings(self.frozen_model, self.tokens.ids, self.embeddings)

    def forward(self, **inputs: Any) -> Any:
        """Return the output of the model."""
        with self.insert():
            return self.frozen_model(**inputs)


def build_soft_prompt(
    model: Any, tokenizer: Any, objective: str, settings: TrainingSettings
) -> SoftPromptModel:
    """Return a model with the embeddings from which training starts.

    Args:
        model: transformers model.
        tokenizer: transformers tokenizer.
        objective: `dro` starts from the tokens of the safety prompt, `prompt` from random tokens.
        settings: the number of embeddings of `prompt`, and the seed.
    """
    if objective == "dro":
        ids = encode_plain_text(tokenizer, _SAFETY_PROMPTS[0])
    else:
        generator = torch.Generator().manual_seed(settings.seed)
        special = set(tokenizer.all_special_ids)
        n_rows = model.get_input_embeddings().weight.shape[0]
        plain = [token_id for token_id in range(min(len(tokenizer), n_rows)) if token_id not in special]
        chosen = torch.randint(len(plain), (settings.prompt_tokens,), generator=generator)
        ids = [plain[index] for index in chosen.tolist()]
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return SoftPromptModel(model, make_learned_tokens(tokenizer, _TRAINING_DIGEST, len(ids)), rows)


def render_soft_prompt(render: PromptRenderer, tokens: LearnedTokens, chat: Chat) -> list[int]:
    """Return the token ids of a chat with learned embeddings before the content of its system turn."""
    return list(tokens.insert_ids(render(prepend_system(chat, tokens.text))))


@dataclass(frozen=True)
class Directions:
    """Linear functions of the principal components of hidden states at the end of prompts.

    Attributes:
        mean: mean hidden state (width).
        components: principal components, width x `N_COMPONENTS`.
        refusal: weights of the log-odds that the model refuses.
        harmfulness: weights of the log-odds that the request is harmful.
    """

    mean: Tensor
    components: Tensor
    refusal: Tensor
    harmfulness: Tensor

    def compute_loss(self, states: Tensor, start_states: Tensor, is_harmful: Tensor) -> Tensor:
        """Return the loss of DRO.

        It is the cross-entropy of the class by the change of the log-odds of refusal, plus 1/100 of that by
        the change of the log-odds of harmfulness, plus 1/1000 of the mean squared change of the hidden states
        outside of the components, by coordinate.

        Args:
            states: rows x width, with the learned embeddings.
            start_states: rows x width, with the text from which the embeddings started.
            is_harmful: class of each row.
        """
        change = states.float() - start_states.float()
        inside = change @ self.components
        target = is_harmful.to(inside)
        losses = [
            nn.functional.binary_cross_entropy_with_logits(inside @ weights, target)
            for weights in (self.refusal, self.harmfulness)
        ]
        n_outside = change.shape[1] - self.components.shape[1]
        residual = (change.square().sum(1) - inside.square().sum(1)).mean() / n_outside
        return losses[0] + _HARMFULNESS_WEIGHT * losses[1] + _RESIDUAL_WEIGHT * residual


def fit_directions(states: Tensor, is_refused: Tensor, is_harmful: Tensor) -> Directions:
    """Return the principal components of hidden states, and both directions in them.

    Args:
        states: at the end of prompts (rows x width), of all requests under several prompts.
        is_refused: whether the model refuses each row.
        is_harmful: class of each row.

    Raises:
        UserError: if the model refuses all or none.
    """
    if bool(is_refused.all()) or not bool(is_refused.any()):
        share = "all" if bool(is_refused.all()) else "none"
        raise UserError(
            f"the model refuses {share} of the training requests, with every prompt, so that no direction of "
            "refusal can be fitted: train `soft_prompt` instead"
        )
    device, rows = states.device, states.double().cpu()
    mean = rows.mean(0)
    components = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:N_COMPONENTS].T
    inside = (rows - mean) @ components
    refusal, harmfulness = (
        fit_probe(inside, labels.cpu())[:-1].float().to(device) for labels in (is_refused, is_harmful)
    )
    return Directions(mean.float().to(device), components.float().to(device), refusal, harmfulness)


def read_last_states(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Return the hidden state of the last layer at the end of each prompt: prompts x width."""
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    batch = pad_sequences([(list(prompt), []) for prompt in prompts], pad_id)
    output = model(
        input_ids=batch["ids"].to(model.device),
        attention_mask=batch["mask"].to(model.device),
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    states: Tensor = output.hidden_states[-1]
    return states[torch.arange(len(prompts), device=states.device), ends.to(states.device)]


def read_all_states(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Return what `read_last_states` returns, in batches of similar length and without gradients."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    states: dict[int, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(order), _BATCH_SIZE):
            rows = order[start : start + _BATCH_SIZE]
            batch = read_last_states(model, [prompts[row] for row in rows], pad_id)
            states.update(zip(rows, batch, strict=True))
    return torch.stack([states[row] for row in range(len(prompts))])


def find_directions(
    model: Any,
    render: PromptRenderer,
    examples: Sequence[TrainingExample],
    judge_refusals: RefusalJudge,
    pad_id: int,
) -> tuple[Directions, Tensor]:
    """Return the directions of DRO, and the hidden states from which the embeddings start.

    Args:
        model: transformers model.
        render: function of a chat that returns its token ids.
        examples: one for each training request; it is harmful if it has a rejected response.
        judge_refusals: decides which chats the model refuses.
        pad_id: token id in the padding.

    Returns:
        The directions, and the state of each example under the safety prompt (examples x width).
    """
    chats = [example.chat for example in examples]
    conditions = [[prepend_system(chat, text) for chat in chats] for text in _SAFETY_PROMPTS] + [chats]
    is_refused = torch.tensor(list(judge_refusals([chat for condition in conditions for chat in condition])))
    is_harmful = torch.tensor([example.rejected is not None for example in examples]).repeat(len(conditions))
    states = read_all_states(model, [render(chat) for condition in conditions for chat in condition], pad_id)
    return fit_directions(states, is_refused, is_harmful), states[: len(examples)]


def build_prompt_trainer(
    soft_prompt: SoftPromptModel,
    tokenizer: Any,
    dataset: Any,
    directions: tuple[Directions, Tensor] | None,
    options: Mapping[str, Any],
) -> Any:
    """Return a trainer of transformers that learns the embeddings.

    Args:
        soft_prompt: the model with its embeddings.
        tokenizer: transformers tokenizer.
        dataset: rows with `prompt_ids`, `response_ids`, `rejected_ids` (empty if benign) and `row`.
        directions: of DRO, with the states from which the embeddings start, by `row`; None minimizes the loss
            of the responses.
        options: options of `transformers.TrainingArguments`.
    """
    from transformers import Trainer, TrainingArguments

    pad_id = tokenizer.pad_token_id or 0

    class PromptTrainer(Trainer):
        """Trainer for lists of rows."""

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            rows, frozen = inputs["rows"], soft_prompt.frozen_model
            with soft_prompt.insert():
                if directions is None:
                    pairs = [(row["prompt_ids"], row["response_ids"]) for row in rows]
                    batch = pad_sequences(pairs, pad_id)
                    moved = {name: tensor.to(frozen.device) for name, tensor in batch.items()}
                    return compute_response_loss(frozen, moved)
                states = read_last_states(frozen, [row["prompt_ids"] for row in rows], pad_id)
            found, start_states = directions
            is_harmful = torch.tensor([bool(row["rejected_ids"]) for row in rows], device=states.device)
            return found.compute_loss(states, start_states[[row["row"] for row in rows]], is_harmful)

    return PromptTrainer(
        model=soft_prompt,
        args=TrainingArguments(**options),
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=lambda rows: {"rows": rows},
    )
