"""What the undefended model says before a request is read: answers that defenses ask for, each made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from analysis import generation
from analysis.engine import Engine
from analysis.rendering import ChatTemplate
from analysis.spoken import strip_thinking
from analysis.store import CacheKey, ScoreCache
from defenses import ModelCall
from defenses.errors import UserError

_CALLS_PER_COMMIT = 64


class DefenseCalls:
    """Answers that a defense asks for.

    Args:
        engine: holds the model, which is not armed while it is asked.
        renderer: of its tokenizer.
        context: the longest prompt, in tokens.
        about: what the answers depend on beside the prompts.
        store: where they are kept for later runs; None keeps them in memory.
    """

    def __init__(
        self,
        engine: Engine,
        chat_template: ChatTemplate,
        context_length: int,
        shared_settings: Mapping[str, Any],
        score_cache: ScoreCache | None = None,
    ) -> None:
        self._engine, self._chat_template, self._context_length, self._score_cache = engine, chat_template, context_length, score_cache
        self._shared_settings = shared_settings
        self._responses_by_key: dict[bytes, str] = {}
        # Told how many of how many are made.
        self.on_progress: Callable[[int, int], None] = lambda made, wanted: None
        self.n_calls = self.n_tokens = 0  # made in all, and how many tokens they and their prompts had
        self.transcript: list[tuple[tuple[int, ...], str]] = []  # what was asked and what was said, in order

    def complete_calls(self, model_calls: Sequence[ModelCall]) -> list[str]:
        """Return what the model says to each, greedily; empty where it says nothing, or only thinks."""
        if not model_calls:
            return []
        prompts = [self._chat_template.render_prompt(ask.chat).ids for ask in model_calls]
        longest = max(len(ids) + ask.max_new_tokens for ids, ask in zip(prompts, model_calls, strict=True))
        if longest > self._context_length:
            raise UserError(
                f"a defense asks the model about a request, in {longest} tokens, and the model reads "
                f"{self._context_length}: shorten the request"
            )
        names = [
            CacheKey({**self._shared_settings, "tokens": ask.max_new_tokens, "line": ask.stops_at_newline}).make_key(ids)
            for ids, ask in zip(prompts, model_calls, strict=True)
        ]
        if self._score_cache is not None:
            self._responses_by_key |= self._score_cache.read_drafts([name for name in names if name not in self._responses_by_key])
        new = {name: at for at, name in enumerate(names) if name not in self._responses_by_key}
        made = 0

        def done(count: int) -> None:
            nonlocal made
            made += count
            self.on_progress(made, len(new))

        for tokens, line in dict.fromkeys((model_calls[at].max_new_tokens, model_calls[at].stops_at_newline) for at in new.values()):
            rows = [at for at in new.values() if (model_calls[at].max_new_tokens, model_calls[at].stops_at_newline) == (tokens, line)]
            rows.sort(key=lambda at: len(prompts[at]))
            # Some at a time: what is made is kept, should the run be ended.
            for start in range(0, len(rows), _CALLS_PER_COMMIT):
                some = rows[start : start + _CALLS_PER_COMMIT]
                self._generate_missing([prompts[at] for at in some], [names[at] for at in some], tokens, line, done)
        said = [self._responses_by_key[name] for name in names]
        self.transcript += zip(prompts, said, strict=True)
        return said

    def copy_uncached(self) -> DefenseCalls:
        """Return the same with nothing known, so that what drafts cost can be seen."""
        return DefenseCalls(self._engine, self._chat_template, self._context_length, self._shared_settings)

    def _generate_missing(
        self,
        prompts: Sequence[tuple[int, ...]],
        keys: Sequence[bytes],
        max_new_tokens: int,
        stops_at_newline: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        tokenizer = self._chat_template.tokenizer

        def text(ids: Sequence[int]) -> str:
            return strip_thinking(str(tokenizer.decode(list(ids), skip_special_tokens=True))).lstrip()

        def over(ids: list[int]) -> bool:
            return stops_at_newline and "\n" in text(ids)

        said = generation.generate_token_ids(self._engine, prompts, max_new_tokens, tokenizer.eos_token_id, over, on_progress)
        texts = [(text(ids).splitlines() or [""])[0].strip() if stops_at_newline else text(ids).rstrip() for ids in said]
        self.n_calls += len(prompts)
        self.n_tokens += sum(map(len, prompts)) + sum(map(len, said))
        rows = list(zip(keys, texts, strict=True))
        self._responses_by_key |= dict(rows)
        if self._score_cache is not None and stops_at_newline:  # answers to requests are never kept
            self._score_cache.write_drafts(rows)
