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

from analysis import scoring
from analysis.batching import shared_prefix
from analysis.bench import Bench
from analysis.queries import Query
from analysis.readout import LOW_COVERAGE, Readout
from analysis.rendering import THINKING, Prompt, redact, squeeze, without_thoughts
from analysis.tables import condition
from defenses import Defense
from defenses.chats import parted
from defenses.errors import told

# How far two ways to the same margin may lie apart, nats: float noise. Measured on SmolLM2-135M: 2.5e-5 and
# 0.18.
NOISE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Check:
    """One check of one condition: what was looked at, whether it holds, and what was seen."""

    condition: str
    name: str
    passed: bool
    seen: str


def check(
    bench: Bench,
    name: str,
    defense: Defense,
    queries: Sequence[Query],
    readout: Readout,
    margins: bool = True,
) -> list[Check]:
    """Return the checks of one defense on a few queries.

    Args:
        bench: the model.
        name: the defense's name in the tables.
        defense: prepared for this model.
        queries: a few of each class.
        readout: whose margins are compared.
        margins: whether they are, which takes forward passes.
    """
    bench = bench.asking(readout.questions)
    shown = bench.every_prompt(defense, queries)
    cases = [(query, prompt) for query, prompts in zip(queries, shown, strict=True) for prompt in prompts]
    prompts = [prompt for _, prompt in cases]
    found = [
        _text_arrives(prompts),
        *([] if defense.rewords else [_words_survive(bench, cases)]),
        *([_secret_arrives(bench, defense, prompts)] if defense.secrets() else []),
        _bos(bench, prompts),
        _system_role(bench, prompts),
        _whole(bench, prompts),
        _answer_begins(bench, cases, readout.prefix),
        *(_margins(bench, defense, prompts, readout) if margins else []),
    ]
    where, secrets = condition({"attack": bench.attack.name, "defense": name}), defense.secrets()
    return [Check(where, kind, passed, redact(seen, secrets)) for kind, passed, seen in found]


def broken(bench: Bench, name: str, defense: Defense, error: Exception) -> Check:
    """Return the failed check of a defense that raised an error before it could be looked at."""
    return Check(
        condition({"attack": bench.attack.name, "defense": name}),
        "prompts",
        False,
        redact(told(error), defense.secrets()),
    )


Found = tuple[str, bool, str]


def _text_arrives(prompts: list[Prompt]) -> Found:
    lost = [
        message["content"]
        for prompt in prompts
        for message in prompt.chat
        if _gist(message["content"]) not in _gist(prompt.text)
    ]
    seen = f"{len(lost)} messages are missing from the tokens" if lost else "every message is in the tokens"
    return "text reaches the model", not lost, seen


def _words_survive(bench: Bench, cases: list[tuple[Query, Prompt]]) -> Found:
    # What the attack made of the user's words: in Base64 they do not survive, and that is meant.
    lost = [
        query.id
        for query, prompt in cases
        if _gist(parted(bench.attack.chat(query))[0][-1]["content"]) not in _gist(prompt.text)
    ]
    return "user's words survive", not lost, f"changed in {', '.join(lost)}" if lost else "word for word"


def _secret_arrives(bench: Bench, defense: Defense, prompts: list[Prompt]) -> Found:
    from defenses.tokens import ids_of

    whole, seen = True, []
    for secret in defense.secrets():
        ids = ids_of(bench.loaded.tokenizer, secret)
        runs = [
            SequenceMatcher(None, ids, prompt.ids, autojunk=False).find_longest_match().size
            for prompt in prompts
        ]
        # The words at the ends may join what stands beside them, and so have other tokens than alone.
        whole &= min(runs) >= len(ids) - 4
        seen.append(f"{min(runs)} of {len(ids)} tokens in one piece")
    return "secret reaches the model", whole, ", ".join(seen)


def _bos(bench: Bench, prompts: list[Prompt]) -> Found:
    bos = bench.loaded.tokenizer.bos_token_id
    have = [prompt.ids.count(bos) for prompt in prompts]
    want = [bench.renderer.bos_expected(prompt.chat) for prompt in prompts]
    return "BOS tokens", bos is None or have == want, f"{have[0]}, the template writes {want[0]}"


def _system_role(bench: Bench, prompts: list[Prompt]) -> Found:
    policy = bench.renderer.system_policy
    left = any(message["role"] == "system" for prompt in prompts for message in prompt.chat)
    return "system role", not (policy == "merged" and left), policy


def _whole(bench: Bench, prompts: list[Prompt]) -> Found:
    longest = max(len(prompt.ids) for prompt in prompts)
    return "nothing truncated", longest < bench.loaded.context, f"{longest} tokens of {bench.loaded.context}"


def _answer_begins(bench: Bench, cases: list[tuple[Query, Prompt]], prefix: tuple[int, ...]) -> Found:
    name, renderer = "answer begins at the end", bench.renderer
    tail, head = renderer.tail + renderer.closing, renderer.answer_head
    opener = without_thoughts(bench.renderer.decode(prefix))
    if opener and any(prompt.begun for _, prompt in cases):
        return name, False, f"the readout begins answers itself ({opener!r}), and this one is begun already"
    for query, prompt in cases:
        begun = "" if bench.questions else parted(bench.attack.chat(query))[1]
        if not _gist(prompt.begun).endswith(_gist(begun)):
            return name, False, f"the answer should go on from the attack's {begun!r}, not {prompt.begun!r}"
        if not _gist(prompt.text).endswith(_gist(tail + prompt.begun)):
            end = tail + prompt.begun
            return name, False, f"a prompt does not end in {end!r}, as the template would have it"
    if any(opening in without_thoughts(tail) for opening in THINKING):
        return name, False, f"the prompt ends inside a thinking block: {tail!r}"
    if head is not None and without_thoughts(head) != without_thoughts(tail):
        return name, False, f"the prompt ends in {tail!r}, and the template puts answers behind {head!r}"
    return name, True, repr(tail)


def _gist(text: str) -> str:
    """The text less what templates trim and tokenizers may change: white space and the form of letters."""
    # SentencePiece writes a space as "\u2581", and gives one in the text back as a space.
    return squeeze(unicodedata.normalize("NFKC", text).replace("\u2581", " "))


def _margins(bench: Bench, defense: Defense, prompts: list[Prompt], readout: Readout) -> list[Found]:
    """The engine's margins against a plain forward pass of one prompt, and against a batch of one."""
    model = bench.loaded.model
    by_length = sorted((prompt.followed(readout.prefix) for prompt in prompts), key=len)
    two = [by_length[0], by_length[-1]]
    many, one = (scoring.read(bench.loaded, bench.engine, defense, rows, readout) for rows in (two, two[:1]))
    logits = torch.zeros(len(two), 1)
    for weight, member in scoring.members(defense):
        with member.armed(model), torch.inference_mode():
            logits = logits + weight * torch.cat([_plain_logits(model, ids) for ids in two]).cpu()
    plain = readout.read(logits)
    noise = NOISE.get(model.dtype, 0.5)
    apart = float((many[:, 0] - plain[:, 0]).abs().max())
    alone = float((many[:1, 0] - one[:, 0]).abs().max())
    coverage = float(many[:, 1].mean())
    little = " (low: look at what the model opens with)" if coverage < LOW_COVERAGE else ""
    return [
        ("engine equals plain pass", apart <= noise, f"{apart:.1e} nats apart, {noise:g} allowed"),
        ("one equals many", alone <= noise, f"{alone:.1e} nats apart, {noise:g} allowed"),
        ("shared prefix", True, f"{shared_prefix(two)} of {len(two[-1])} tokens"),
        ("coverage", True, f"{coverage:.1%}{little}"),
    ]


def _plain_logits(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """First-answer logits the slow way: one prompt, no cache, no padding."""
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    out = model(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=places, use_cache=False
    )
    return torch.as_tensor(out.logits[:, -1]).float()
