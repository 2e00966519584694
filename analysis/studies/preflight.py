"""Preflight before every run: check on a few queries that the defense reached the model.

Each of these mistakes has cost a published toolkit a silent wrong result: a system prompt that a template
dropped, a doubled BOS, a prompt that ended inside a thinking block, a batch whose results differed from those
of its rows alone.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.attacks import DIRECT_ATTACK, Attack
from analysis.datasets.queries import Query
from analysis.models.batches import BatchForm, count_shared_prefix
from analysis.models.chat_template import Prompt, redact_secrets, remove_whitespace
from analysis.models.loading import describe_device
from analysis.models.plain_passes import (
    FORM_PHRASES,
    HALF_PRECISION,
    compute_plain_logits,
    run_in_float32,
)
from analysis.models.session import ModelSession, list_blend_members
from analysis.models.thinking_blocks import RESPONSE_TAGS, find_open_tag, remove_thinking
from analysis.readouts.bounds import UnboundedMarginError
from analysis.readouts.prompt_scores import score_prompts
from analysis.readouts.readout import LOW_COVERAGE, Readout
from analysis.served.served_engine import ServedEngine
from analysis.stats.tables import format_condition
from analysis.studies.manifest import identify_defense
from defenses.activated_lora import find_last_occurrence
from defenses.chats import split_prefill
from defenses.contract import Defense, QueryChat
from defenses.errors import UserError, describe_error
from defenses.images import get_last_image
from defenses.stack import list_members
from defenses.tuned import TunedDefense

# Largest difference between two computations of the same margin that rounding explains, nats; a readout that
# sharpens the logits multiplies it. Measured on SmolLM2-135M: 2.5e-5 in float32.
MARGIN_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
# In half precision, rounding is larger (0.18 nats in bfloat16), and faults can be smaller. A difference
# beyond this share of the spread (standard deviation) of margins is measured again in float32.
_SPREAD_SHARE = 0.05


@dataclass(frozen=True)
class PreflightCheck:
    """One check of one condition.

    Attributes:
        condition: attack and defense as in the tables.
        name: what is checked.
        passed: whether the check passed.
        observed: what was observed; secrets are redacted.
    """

    condition: str
    name: str
    passed: bool
    observed: str


CheckOutcome = tuple[str, bool, str]  # name, passed, observed


def check_condition(
    session: ModelSession,
    condition_name: str,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    attack: Attack = DIRECT_ATTACK,
    with_margins: bool = True,
) -> list[PreflightCheck]:
    """Run the checks of one defense on a few queries.

    Args:
        session: the model.
        condition_name: the defense's name in the tables.
        defense: prepared for this model.
        queries: a few of each class.
        readout: the readout whose margins are compared.
        attack: the attack through which the queries are sent.
        with_margins: whether to compare margins, which takes forward passes.
    """
    session = session.with_questions(readout.questions)
    query_chats = attack.build_query_chats(queries)
    prompts_by_query = session.render_prompts(defense, query_chats)
    cases = [
        (query_chat, prompt)
        for query_chat, prompts in zip(query_chats, prompts_by_query, strict=True)
        for prompt in prompts
    ]
    prompts = [prompt for _, prompt in cases]
    outcomes = [
        _check_text_present(prompts),
        *_check_invocation(
            session, defense, [prompt.append_prefix(readout.response_prefix) for prompt in prompts]
        ),
        *_check_learned_tokens(defense, prompts),
        *([] if defense.edits_user_text else [_check_user_text(cases)]),
        *([_check_secret(session, defense, prompts)] if defense.secret_texts() else []),
        _check_bos_count(session, prompts),
        _check_system_role(session, prompts),
        _check_not_truncated(session, prompts),
        *([_describe_images(prompts)] if any(prompt.images for prompt in prompts) else []),
        _check_response_start(session, cases, readout.response_prefix),
        *(_check_margins(session, defense, prompts, readout) if with_margins else []),
    ]
    condition = format_condition({"attack": attack.name, "defense": condition_name})
    secrets = defense.secret_texts()
    return [
        PreflightCheck(condition, name, passed, redact_secrets(observed, secrets))
        for name, passed, observed in outcomes
    ]


def describe_check(
    session: ModelSession,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    attack: Attack,
    with_margins: bool,
) -> dict[str, Any] | None:
    """Return all that `check_condition` depends on, beside model and code; None if something is unknown.

    Prompts with images are always checked: which form of batches suits them is found when they are read.

    Args:
        session: the model.
        defense: prepared for this model.
        queries: as for `check_condition`, as the other arguments.
        readout: the readout whose margins are compared.
        attack: the attack through which the queries are sent.
        with_margins: whether margins are compared.
    """
    session = session.with_questions(readout.questions)
    query_chats = attack.build_query_chats(queries)
    members = [defense, *(member for _, member in list_blend_members(defense))]
    changes = [member.cacheable_fingerprint() for member in members]
    identity = identify_defense(defense, session.seed)
    if identity is None or None in changes or any(get_last_image(chat) for _, chat in query_chats):
        return None
    prompts = [prompt for prompts in session.render_prompts(defense, query_chats) for prompt in prompts]
    if any(prompt.images for prompt in prompts):
        return None
    return {
        "defense": identity,
        "changes": changes,
        "weights": [weight for weight, _ in list_blend_members(defense)],
        "attack": [attack.name, query_chats],
        "prompts": [asdict(prompt) for prompt in prompts],
        "readout": asdict(readout),
        "template": session.chat_template.identity,
        "vocabulary": session.chat_template.vocabulary_sha256,
        "device": describe_device(session.loaded_model.device),
        "batch_size": str(session.batch_size),
        "with_margins": with_margins,
    }


def make_failed_check(
    attack: Attack, condition_name: str, defense: Defense, error: Exception
) -> PreflightCheck:
    """Return the failed check of a defense that raised an error before it could be checked.

    Args:
        attack: the attack of the condition.
        condition_name: the defense's name in the tables.
        defense: prepared for this model.
        error: the error.
    """
    return PreflightCheck(
        format_condition({"attack": attack.name, "defense": condition_name}),
        "prompts",
        False,
        redact_secrets(describe_error(error), defense.secret_texts()),
    )


def _check_text_present(prompts: list[Prompt]) -> CheckOutcome:
    missing = [
        message["content"]
        for prompt in prompts
        for message in prompt.chat
        if _normalize_text(message["content"]) not in _normalize_text(prompt.text)
    ]
    observed = (
        f"{len(missing)} messages are missing from the tokens"
        if missing
        else "every message is in the tokens"
    )
    return "text reaches the model", not missing, observed


def _check_invocation(
    session: ModelSession, defense: Defense, prompts: Sequence[Sequence[int]]
) -> list[CheckOutcome]:
    """Check that prompts invoke the adapter that is activated by tokens, if there is one."""
    members = [member for member in list_members(defense) if member.cost == "weights"]
    adapters = [member.adapter for member in members if isinstance(member, TunedDefense)]
    outcomes = []
    for adapter in adapters if members else [session.loaded_model.adapter]:
        if adapter is not None and adapter.invocation:
            n_found = sum(find_last_occurrence(ids, adapter.invocation) is not None for ids in prompts)
            observed = f"the invocation {list(adapter.invocation)} is in {n_found} of {len(prompts)} prompts"
            outcomes.append(("adapter is activated", n_found > 0, observed))
    return outcomes


def _check_learned_tokens(defense: Defense, prompts: Sequence[Prompt]) -> list[CheckOutcome]:
    """Check that every prompt has all learned embeddings once, if the defense has some."""
    outcomes = []
    for tokens in defense.learned_tokens():
        wanted = list(tokens.ids)
        n_whole = sum([token for token in prompt.ids if token in tokens.ids] == wanted for prompt in prompts)
        observed = f"all {len(wanted)}, in {n_whole} of {len(prompts)} prompts"
        outcomes.append(("learned embeddings", n_whole == len(prompts), observed))
    return outcomes


def _check_user_text(cases: list[tuple[QueryChat, Prompt]]) -> CheckOutcome:
    # Compared with the attacked text: Base64, for instance, changes the user's words on purpose.
    changed = [
        query_id
        for (query_id, chat), prompt in cases
        if _normalize_text(split_prefill(chat)[0][-1]["content"]) not in _normalize_text(prompt.text)
    ]
    observed = f"changed in {', '.join(changed)}" if changed else "word for word"
    return "user's words survive", not changed, observed


def _check_secret(session: ModelSession, defense: Defense, prompts: list[Prompt]) -> CheckOutcome:
    from defenses.tokens import encode_plain_text

    passed, observed = True, []
    for secret in defense.secret_texts():
        ids = encode_plain_text(session.loaded_model.tokenizer, secret)
        longest_runs = [
            SequenceMatcher(None, ids, prompt.ids, autojunk=False).find_longest_match().size
            for prompt in prompts
        ]
        # The first and last words may merge with their neighbors and so have other tokens than alone.
        passed &= min(longest_runs) >= len(ids) - 4
        observed.append(f"{min(longest_runs)} of {len(ids)} tokens in one piece")
    return "secret reaches the model", passed, ", ".join(observed)


def _check_bos_count(session: ModelSession, prompts: list[Prompt]) -> CheckOutcome:
    bos = session.loaded_model.tokenizer.bos_token_id
    counts = [prompt.ids.count(bos) for prompt in prompts]
    expected = [session.chat_template.count_expected_bos(prompt.chat) for prompt in prompts]
    return "BOS tokens", bos is None or counts == expected, f"{counts[0]}, the template writes {expected[0]}"


def _check_system_role(session: ModelSession, prompts: list[Prompt]) -> CheckOutcome:
    policy = session.chat_template.system_policy
    has_system_turn = any(message["role"] == "system" for prompt in prompts for message in prompt.chat)
    return "system role", not (policy == "merged" and has_system_turn), policy


def _check_not_truncated(session: ModelSession, prompts: list[Prompt]) -> CheckOutcome:
    longest = max(len(prompt.ids) for prompt in prompts)
    limit = session.loaded_model.context_length
    return "nothing truncated", longest < limit, f"{longest} tokens of {limit}"


def _check_response_start(
    session: ModelSession, cases: list[tuple[QueryChat, Prompt]], prefix: tuple[int, ...]
) -> CheckOutcome:
    """Check that each prompt ends where a response begins, or continues the prefill of the attack."""
    name, template = "response starts at the end", session.chat_template
    start, tags = template.response_start, template.thinking_tags
    tail = template.generation_prompt + start.opening
    opener = remove_thinking(template.decode_tokens(prefix), tags)
    for tag in RESPONSE_TAGS:
        opener = opener.replace(tag, "")
    opener = remove_whitespace(opener)
    if opener and any(prompt.prefill for _, prompt in cases):
        return name, False, f"the readout prefills the response ({opener!r}), which is already prefilled"
    for (_, chat), prompt in cases:
        prefill = "" if session.questions else split_prefill(chat)[1]
        if not _normalize_text(prompt.prefill).endswith(_normalize_text(prefill)):
            return (
                name,
                False,
                f"the response should continue the attack's prefill {prefill!r}, not {prompt.prefill!r}",
            )
        if not _normalize_text(prompt.text).endswith(_normalize_text(tail + prompt.prefill)):
            end = tail + prompt.prefill
            return name, False, f"a prompt does not end in {end!r}, as the template requires"
    if start.problem:
        return name, False, start.problem
    if template.answer_prefix is None and find_open_tag(tail, tags):
        return name, False, f"the prompt ends inside a thinking block: {tail!r}"
    return name, True, repr(tail)


def _normalize_text(text: str) -> str:
    """Remove what templates trim and tokenizers may change: white space and the composition of letters."""
    # SentencePiece writes a space as "\u2581", and decodes one that is in the text as a space.
    return remove_whitespace(unicodedata.normalize("NFKC", text).replace("\u2581", " "))


def _describe_images(prompts: Sequence[Prompt]) -> CheckOutcome:
    """Tell how the image of which the model sees least is prepared; encoding has counted its tokens."""
    images = [image for prompt in prompts for image in prompt.images]
    least = min(images, key=lambda image: 1.0 if image.seen_share is None else image.seen_share)
    return "images", True, least.describe()


@dataclass(frozen=True)
class _MarginComparison:
    """Differences between computations of the same margins, in nats.

    Attributes:
        plain_gap: between the engine and plain forward passes.
        single_gap: between a batch and one of its prompts alone.
        coverage: mean probability of the readout's tokens.
        tolerance: largest difference that rounding explains.
        remark: how the tolerance came about.
    """

    plain_gap: float
    single_gap: float
    coverage: float
    tolerance: float = 0.0
    remark: str = ""

    @property
    def largest_gap(self) -> float:
        """The larger difference; infinite if one is not a number."""
        return max(gap if gap == gap else math.inf for gap in (self.plain_gap, self.single_gap))

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences."""
        return self.largest_gap <= self.tolerance


def _check_margins(
    session: ModelSession, defense: Defense, prompts: list[Prompt], readout: Readout
) -> list[CheckOutcome]:
    """Compare the engine's margins with plain forward passes of one prompt, and with a batch of one.

    If they differ, slower forms of batches are tried, and the engine keeps the first that agrees.
    """
    prefix = readout.response_prefix
    by_length = sorted(prompts, key=lambda prompt: len(prompt.append_prefix(prefix)))
    if isinstance(session.engine, ServedEngine):
        return _check_served_margins(session, defense, by_length, readout)
    model = session.loaded_model.model
    rows = [by_length[0], by_length[-1]]
    row_ids = [prompt.append_prefix(prefix) for prompt in rows]
    engine, _ = session.engine.split_rows(row_ids)[0]
    spread = 0.0
    if model.dtype in HALF_PRECISION:
        margins = _score_rows(session, defense, by_length, readout)[:, 0]
        spread = float(margins.std(correction=0))
    first_form, comparisons = engine.batch_form, list[_MarginComparison]()
    for form in list(BatchForm)[list(BatchForm).index(first_form) :]:
        engine.batch_form = form
        try:
            comparisons.append(_compare_margins(session, defense, rows, readout, spread))
        except Exception as error:
            if isinstance(error, UserError) or form is BatchForm.EQUAL:
                engine.batch_form = first_form
                raise
            comparisons.append(_MarginComparison(math.inf, math.inf, 0.0))
        if comparisons[-1].agrees:
            break
    comparison = comparisons[-1]
    if not comparison.agrees:
        engine.batch_form, comparison = first_form, comparisons[0]
        # Whole prompts of equal length share nothing and are not padded, so they differ by rounding only.
        if model.dtype in HALF_PRECISION and comparison.largest_gap <= 3 * comparisons[-1].largest_gap:
            comparison = replace(
                comparison, tolerance=spread or math.inf, remark="by rounding, as without a shared prefix; "
            )
    elif len(comparisons) > 1:
        engine.cache_uses.clear()  # is compared again
        engine.notices.append(
            f"{type(model).__name__} is run with {FORM_PHRASES[engine.batch_form]}, which takes longer: "
            f"{FORM_PHRASES[first_form]} change its margins by {comparisons[0].largest_gap:.1e} nats"
        )
    allowed = f"nats apart, {comparison.remark}{comparison.tolerance:.2g} allowed"
    gaps = {"engine equals plain pass": comparison.plain_gap, "single equals batch": comparison.single_gap}
    return [
        *((name, gap <= comparison.tolerance, f"{gap:.1e} {allowed}") for name, gap in gaps.items()),
        ("shared prefix", True, f"{count_shared_prefix(row_ids)} of {len(row_ids[-1])} tokens"),
        ("coverage", True, _describe_coverage(comparison.coverage)),
    ]


def _check_served_margins(
    session: ModelSession, defense: Defense, prompts: list[Prompt], readout: Readout
) -> list[CheckOutcome]:
    """Compare the margins of a server with those that it gives the same prompts again, one at a time.

    Servers compute in batches of all that they are asked, mostly in half precision, so margins differ by
    rounding.
    """
    try:
        together = _score_rows(session, defense, prompts, readout)
    except UnboundedMarginError:  # of a linear readout, in whose place another one may still be fitted
        return [("server repeats itself", True, "not compared: these margins have no bounds")]
    single = torch.cat([_score_rows(session, defense, [row], readout) for row in (prompts[0], prompts[-1])])
    gap = float((together[[0, -1], 0] - single[:, 0]).abs().max())
    tolerance = max(
        MARGIN_TOLERANCES[torch.float32] * readout.sharpness, float(together[:, 0].std(correction=0))
    )
    outcomes = [
        ("server repeats itself", gap <= tolerance, f"{gap:.1e} nats apart, {tolerance:.2g} allowed"),
        ("coverage", True, _describe_coverage(float(together[:, 1].mean()))),
    ]
    if together.shape[1] > 2:
        width = float((together[:, 3] - together[:, 2]).max())
        observed = "exact" if width == 0 else f"known within {width / 2:.2g} nats or less"
        outcomes.append(("margins by the listed tokens", True, observed))
    return outcomes


def _describe_coverage(coverage: float) -> str:
    """Return the coverage, and what to do if it is low."""
    warning = " (low: check which tokens the model's responses begin with)" if coverage < LOW_COVERAGE else ""
    return f"{coverage:.1%}{warning}"


def _compare_margins(
    session: ModelSession, defense: Defense, rows: list[Prompt], readout: Readout, spread: float
) -> _MarginComparison:
    """Compare margins in the engine's form of batches, in half precision relative to their spread.

    Args:
        session: the model.
        defense: applied to the model.
        rows: prompts; the first is compared with a batch of it alone.
        readout: the readout whose margins are compared.
        spread: standard deviation of margins, nats.
    """
    model, factor = session.loaded_model.model, readout.sharpness
    comparison = _measure_margin_gaps(session, defense, rows, readout)
    if model.dtype not in HALF_PRECISION:
        return replace(comparison, tolerance=MARGIN_TOLERANCES[model.dtype] * factor)
    comparison = replace(
        comparison, tolerance=_SPREAD_SHARE * spread, remark=f"where margins spread by {spread:.2g}: "
    )
    if comparison.agrees:
        return comparison
    try:
        with run_in_float32(model):
            wide_gap = _measure_margin_gaps(session, defense, rows, readout).largest_gap
    except Exception:  # some models mix weights and inputs of modules, which then differ in precision
        return comparison
    if wide_gap > MARGIN_TOLERANCES[torch.float32] * factor:
        return replace(comparison, remark=f"{wide_gap:.1e} in float32; {comparison.remark}")
    return replace(
        comparison, tolerance=spread or math.inf, remark=f"by rounding ({wide_gap:.1e} in float32); "
    )


def _measure_margin_gaps(
    session: ModelSession, defense: Defense, rows: list[Prompt], readout: Readout
) -> _MarginComparison:
    """Measure the differences in the engine's form of batches and the model's current precision."""
    model = session.loaded_model.model
    # A row as long as the first, so that every form of batch has one with several rows.
    companion = _replace_last_token(rows[0])
    batched, single = (
        _score_rows(session, defense, part, readout)[: len(rows)] for part in ([*rows, companion], rows[:1])
    )
    logits = torch.zeros(len(rows) * len(readout.continuations), 1)
    for number, (weight, member) in enumerate(list_blend_members(defense)):
        sequences = [
            (*(row.members[number] if row.members else row).append_prefix(readout.response_prefix), *tokens)
            for row in rows
            for tokens in readout.continuations
        ]
        with member.apply_to(model):
            last_logits = torch.stack(
                [compute_plain_logits(model, ids, last_only=True)[-1] for ids in sequences]
            )
        logits = logits + weight * last_logits.cpu()
    plain = readout.combine_terms(readout.compute_terms(logits).unflatten(0, (len(rows), -1)))
    return _MarginComparison(
        float((batched[:, 0] - plain[:, 0]).abs().max()),
        float((batched[:1, 0] - single[:, 0]).abs().max()),
        float(batched[:, 1].mean()),
    )


def _score_rows(
    session: ModelSession, defense: Defense, rows: Sequence[Prompt], readout: Readout
) -> Float[Tensor, "rows values"]:
    """Return the uncached margins and coverages of prompts, and bounds of the margins if they have any."""
    prefix = readout.response_prefix
    return score_prompts(
        session.loaded_model,
        session.engine,
        defense,
        [row.append_prefix(prefix) for row in rows],
        readout,
        member_prompts=[row.list_member_ids(prefix) for row in rows],
    )


def _replace_last_token(prompt: Prompt) -> Prompt:
    """Return the prompt, and those of the members of a blend, with the first token in place of the last."""
    return replace(
        prompt,
        ids=(*prompt.ids[:-1], prompt.ids[0]),
        members=tuple(_replace_last_token(member) for member in prompt.members),
    )
