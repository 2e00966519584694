"""What the undefended model says before a request is read: answers that defenses ask for, each made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from analysis import generation
from analysis.engine import Engine
from analysis.rendering import Renderer
from analysis.spoken import aloud
from analysis.store import Namer, Store
from defenses import Ask
from defenses.errors import UserError

_AT_ONCE = 64


class Drafts:
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
        renderer: Renderer,
        context: int,
        about: Mapping[str, Any],
        store: Store | None = None,
    ) -> None:
        self._engine, self._renderer, self._context, self._store = engine, renderer, context, store
        self._about = about
        self._said: dict[bytes, str] = {}
        # Told how many of how many are made.
        self.watch: Callable[[int, int], None] = lambda made, wanted: None
        self.calls = self.tokens = 0  # made in all, and how many tokens they and their prompts had
        self.told: list[tuple[tuple[int, ...], str]] = []  # what was asked and what was said, in order

    def answers(self, asks: Sequence[Ask]) -> list[str]:
        """Return what the model says to each, greedily; empty where it says nothing, or only thinks."""
        if not asks:
            return []
        prompts = [self._renderer.render(ask.chat).ids for ask in asks]
        longest = max(len(ids) + ask.tokens for ids, ask in zip(prompts, asks, strict=True))
        if longest > self._context:
            raise UserError(
                f"a defense asks the model about a request, in {longest} tokens, and the model reads "
                f"{self._context}: shorten the request"
            )
        names = [
            Namer({**self._about, "tokens": ask.tokens, "line": ask.line}).name(ids)
            for ids, ask in zip(prompts, asks, strict=True)
        ]
        if self._store is not None:
            self._said |= self._store.drafts([name for name in names if name not in self._said])
        new = {name: at for at, name in enumerate(names) if name not in self._said}
        made = 0

        def done(count: int) -> None:
            nonlocal made
            made += count
            self.watch(made, len(new))

        for tokens, line in dict.fromkeys((asks[at].tokens, asks[at].line) for at in new.values()):
            rows = [at for at in new.values() if (asks[at].tokens, asks[at].line) == (tokens, line)]
            rows.sort(key=lambda at: len(prompts[at]))
            # Some at a time: what is made is kept, should the run be ended.
            for start in range(0, len(rows), _AT_ONCE):
                some = rows[start : start + _AT_ONCE]
                self._make([prompts[at] for at in some], [names[at] for at in some], tokens, line, done)
        said = [self._said[name] for name in names]
        self.told += zip(prompts, said, strict=True)
        return said

    def fresh(self) -> Drafts:
        """Return the same with nothing known, so that what drafts cost can be seen."""
        return Drafts(self._engine, self._renderer, self._context, self._about)

    def _make(
        self,
        prompts: Sequence[tuple[int, ...]],
        names: Sequence[bytes],
        tokens: int,
        line: bool,
        done: Callable[[int], None],
    ) -> None:
        tokenizer = self._renderer.tokenizer

        def text(ids: Sequence[int]) -> str:
            return aloud(str(tokenizer.decode(list(ids), skip_special_tokens=True))).lstrip()

        def over(ids: list[int]) -> bool:
            return line and "\n" in text(ids)

        said = generation.answers(self._engine, prompts, tokens, tokenizer.eos_token_id, over, done)
        texts = [(text(ids).splitlines() or [""])[0].strip() if line else text(ids).rstrip() for ids in said]
        self.calls += len(prompts)
        self.tokens += sum(map(len, prompts)) + sum(map(len, said))
        rows = list(zip(names, texts, strict=True))
        self._said |= dict(rows)
        if self._store is not None and line:  # answers to requests are never kept
            self._store.keep_drafts(rows)
