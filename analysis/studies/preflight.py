"""Did the defense reach the model? Checked on a few queries before every run, which stops if anything is off.

Each of these has cost a published toolkit a silent wrong result: a system prompt that a template dropped, a
doubled BOS, a prompt that ended inside a thinking block, a batch that gave other numbers than its rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch

from analysis.datasets.queries import Query
from analysis.models.chat_template import (
    THINKING_TAGS,
    Prompt,
    redact_secrets,
    remove_thinking_and_whitespace,
    remove_whitespace,
)
from analysis.models.engine import count_shared_prefix
from analysis.models.session import ModelSession, list_blend_members
from analysis.readouts.readout import LOW_COVERAGE, Readout
from analysis.run import score_prompts
from analysis.stats.tables import format_condition
from defenses.chats import split_prefill
from defenses.contract import Defense
from defenses.errors import describe_error

# How far two ways to the same margin may lie apart, nats: float noise. Measured on SmolLM2-135M: 2.5e-5 and
# 0.18.
MARGIN_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class PreflightCheck:
    """One check of one condition: what was looked at, whether it holds, and what was seen."""

    condition: str
    name: str
    passed: bool
    observed: str


def check_condition(
    session: ModelSession,
    condition_name: str,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    with_margins: bool = True,
) -> list[PreflightCheck]:
    """Return the checks of one defense on a few queries.

    Args:
        session: the model.
        condition_name: the defense's name in the tables.
        defense: prepared for this model.
        queries: a few of each class.
        readout: whose margins are compared.
        with_margins: whether they are, which takes forward passes.
    """
    session = session.with_questions(readout.questions)
    shown = session.render_queries(defense, queries)
    cases = [(query, prompt) for query, prompts in zip(queries, shown, strict=True) for prompt in prompts]
    prompts = [prompt for _, prompt in cases]
    found = [
        _check_text_present(prompts),
        *([] if defense.edits_user_text else [_check_user_text(session, cases)]),
        *([_check_secret(session, defense, prompts)] if defense.secret_texts() else []),
        _check_bos_count(session, prompts),
        _check_system_role(session, prompts),
        _check_not_truncated(session, prompts),
        _check_response_start(session, cases, readout.response_prefix),
        *(_check_margins(session, defense, prompts, readout) if with_margins else []),
    ]
    where, secrets = (
        format_condition({"attack": session.attack.name, "defense": condition_name}),
        defense.secret_texts(),
    )
    return [
        PreflightCheck(where, kind, passed, redact_secrets(seen, secrets)) for kind, passed, seen in found
    ]


def make_failed_check(
    session: ModelSession, condition_name: str, defense: Defense, error: Exception
) -> PreflightCheck:
    """Return the failed check of a defense that raised an error before it could be looked at."""
    return PreflightCheck(
        format_condition({"attack": session.attack.name, "defense": condition_name}),
        "prompts",
        False,
        redact_secrets(describe_error(error), defense.secret_texts()),
    )


CheckOutcome = tuple[str, bool, str]


def _check_text_present(prompts: list[Prompt]) -> CheckOutcome:
    lost = [
        message["content"]
        for prompt in prompts
        for message in prompt.chat
        if _normalize_text(message["content"]) not in _normalize_text(prompt.text)
    ]
    seen = f"{len(lost)} messages are missing from the tokens" if lost else "every message is in the tokens"
    return "text reaches the model", not lost, seen


def _check_user_text(session: ModelSession, cases: list[tuple[Query, Prompt]]) -> CheckOutcome:
    # What the attack made of the user's words: in Base64 they do not survive, and that is meant.
    lost = [
        query.id
        for query, prompt in cases
        if _normalize_text(split_prefill(session.attack.build_chat(query))[0][-1]["content"])
        not in _normalize_text(prompt.text)
    ]
    return "user's words survive", not lost, f"changed in {', '.join(lost)}" if lost else "word for word"


def _check_secret(session: ModelSession, defense: Defense, prompts: list[Prompt]) -> CheckOutcome:
    from defenses.tokens import encode_plain_text

    whole, seen = True, []
    for secret in defense.secret_texts():
        ids = encode_plain_text(session.loaded_model.tokenizer, secret)
        runs = [
            SequenceMatcher(None, ids, prompt.ids, autojunk=False).find_longest_match().size
            for prompt in prompts
        ]
        # The words at the ends may join what stands beside them, and so have other tokens than alone.
        whole &= min(runs) >= len(ids) - 4
        seen.append(f"{min(runs)} of {len(ids)} tokens in one piece")
    return "secret reaches the model", whole, ", ".join(seen)


def _check_bos_count(session: ModelSession, prompts: list[Prompt]) -> CheckOutcome:
    bos = session.loaded_model.tokenizer.bos_token_id
    have = [prompt.ids.count(bos) for prompt in prompts]
    want = [session.chat_template.count_expected_bos(prompt.chat) for prompt in prompts]
    return "BOS tokens", bos is None or have == want, f"{have[0]}, the template writes {want[0]}"


def _check_system_role(session: ModelSession, prompts: list[Prompt]) -> CheckOutcome:
    policy = session.chat_template.system_policy
    left = any(message["role"] == "system" for prompt in prompts for message in prompt.chat)
    return "system role", not (policy == "merged" and left), policy


def _check_not_truncated(session: ModelSession, prompts: list[Prompt]) -> CheckOutcome:
    longest = max(len(prompt.ids) for prompt in prompts)
    return (
        "nothing truncated",
        longest < session.loaded_model.context_length,
        f"{longest} tokens of {session.loaded_model.context_length}",
    )


def _check_response_start(
    session: ModelSession, cases: list[tuple[Query, Prompt]], prefix: tuple[int, ...]
) -> CheckOutcome:
    name, renderer = "answer begins at the end", session.chat_template
    tail, head = renderer.generation_prompt + renderer.thinking_closing, renderer.response_header
    opener = remove_thinking_and_whitespace(session.chat_template.decode_tokens(prefix))
    if opener and any(prompt.prefill for _, prompt in cases):
        return name, False, f"the readout begins answers itself ({opener!r}), and this one is begun already"
    for query, prompt in cases:
        begun = "" if session.questions else split_prefill(session.attack.build_chat(query))[1]
        if not _normalize_text(prompt.prefill).endswith(_normalize_text(begun)):
            return name, False, f"the answer should go on from the attack's {begun!r}, not {prompt.prefill!r}"
        if not _normalize_text(prompt.text).endswith(_normalize_text(tail + prompt.prefill)):
            end = tail + prompt.prefill
            return name, False, f"a prompt does not end in {end!r}, as the template would have it"
    if any(opening in remove_thinking_and_whitespace(tail) for opening in THINKING_TAGS):
        return name, False, f"the prompt ends inside a thinking block: {tail!r}"
    if head is not None and remove_thinking_and_whitespace(head) != remove_thinking_and_whitespace(tail):
        return name, False, f"the prompt ends in {tail!r}, and the template puts answers behind {head!r}"
    return name, True, repr(tail)


def _normalize_text(text: str) -> str:
    """The text less what templates trim and tokenizers may change: white space and the form of letters."""
    # SentencePiece writes a space as "\u2581", and gives one in the text back as a space.
    return remove_whitespace(unicodedata.normalize("NFKC", text).replace("\u2581", " "))


def _check_margins(
    session: ModelSession, defense: Defense, prompts: list[Prompt], readout: Readout
) -> list[CheckOutcome]:
    """The engine's margins against a plain forward pass of one prompt, and against a batch of one."""
    model = session.loaded_model.model
    by_length = sorted((prompt.append_prefix(readout.response_prefix) for prompt in prompts), key=len)
    two = [by_length[0], by_length[-1]]
    many, one = (
        score_prompts(session.loaded_model, session.engine, defense, rows, readout) for rows in (two, two[:1])
    )
    logits = torch.zeros(len(two), 1)
    for weight, member in list_blend_members(defense):
        with member.apply_to(model), torch.inference_mode():
            logits = logits + weight * torch.cat([_plain_forward_logits(model, ids) for ids in two]).cpu()
    plain = readout.compute_margins(logits)
    noise = MARGIN_TOLERANCES.get(model.dtype, 0.5)
    apart = float((many[:, 0] - plain[:, 0]).abs().max())
    alone = float((many[:1, 0] - one[:, 0]).abs().max())
    coverage = float(many[:, 1].mean())
    little = " (low: look at what the model opens with)" if coverage < LOW_COVERAGE else ""
    return [
        ("engine equals plain pass", apart <= noise, f"{apart:.1e} nats apart, {noise:g} allowed"),
        ("one equals many", alone <= noise, f"{alone:.1e} nats apart, {noise:g} allowed"),
        ("shared prefix", True, f"{count_shared_prefix(two)} of {len(two[-1])} tokens"),
        ("coverage", True, f"{coverage:.1%}{little}"),
    ]


def _plain_forward_logits(model: torch.nn.Module, prompt_ids: Sequence[int]) -> torch.Tensor:
    """First-answer logits the slow way: one prompt, no cache, no padding."""
    tokens = torch.tensor([list(prompt_ids)], device=next(model.parameters()).device)
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    out = model(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=places, use_cache=False
    )
    return torch.as_tensor(out.logits[:, -1]).float()
