"""A chat model behind an OpenAI-compatible endpoint: a budget of calls, retries with back-off."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from defenses.errors import UserError

_AT_ONCE = 8  # calls under way
_SECONDS = 60.0  # for one call


@dataclass
class Endpoint:
    """An endpoint that is asked until the budget is spent or it fails for good; then `down` says why.

    Attributes:
        client: of the package `openai`.
        host: for people.
        model: its name there.
        budget: calls that are left, retries included.
        waits: seconds before each further try.
    """

    client: Any
    host: str
    model: str
    budget: int
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    down: str = ""
    _lock: Any = field(default_factory=Lock, repr=False)

    @classmethod
    def at(cls, address: str, budget: int, offline: bool, tell: Callable[[str], None]) -> Endpoint:
        """Return the endpoint at an address, `http://host/v1#model`; the key is read from OPENAI_API_KEY.

        Args:
            address: of the endpoint, and the model behind `#`.
            budget: calls at most.
            offline: whether only this machine may be asked.
            tell: told where the texts go.
        """
        url, _, model = address.partition("#")
        host = urlsplit(url).hostname or ""
        if not host or not model:
            raise UserError(f"--judge-model {address}: write the model's name behind it, as in {url}#NAME")
        here = host in ("localhost", "127.0.0.1", "::1")
        if offline and not here:
            raise UserError(f"--judge-model {address}: --offline forbids it")
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UserError(
                "an endpoint as judge needs the package openai: pip install 'refusalscope[judge]'"
            ) from error
        if not here:
            tell(f"requests and answers are sent to {host} to be judged")
        client = OpenAI(
            base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0, timeout=_SECONDS
        )
        return cls(client, host, model, budget)

    @property
    def name(self) -> str:
        """The model and where it is."""
        return f"{self.model} at {self.host}"

    def replies(
        self, prompts: Sequence[str], valid: Callable[[str], bool], done: Callable[[int], None]
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt, in their order."""

        def ask(prompt: str) -> tuple[str, str]:
            found = self._reply(prompt, valid)
            done(1)
            return found

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(ask, prompts))

    def _reply(self, prompt: str, valid: Callable[[str], bool]) -> tuple[str, str]:
        import openai

        said, why = "", ""
        for wait in (0.0, *self.waits):
            time.sleep(wait)
            if self.down:
                return "", self.down
            if not self._spend():
                return "", f"budget spent{f' ({why})' if why else ''}"
            try:
                reply = self.client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
                )
                text = str(reply.choices[0].message.content or "")
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                return "", self._plain(error)  # this text's own fault, such as its length
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
                why = self._plain(error)
                continue
            except (openai.APIError, ValueError, IndexError, AttributeError, TypeError) as error:
                why = self._plain(error)
                break
            if valid(text):
                return text, ""
            if said:
                return "", f"the judge said {said[:40]!r}, then {text[:40]!r}"
            said = text or "nothing"
        if said:
            return "", f"the judge said {said[:40]!r}"
        self.down = why  # it fails again and again: the others would wait as long for nothing
        return "", why

    def _spend(self) -> bool:
        with self._lock:
            self.budget -= 1
            return self.budget >= 0

    def _plain(self, error: Exception) -> str:
        """The error in one line, without the key."""
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        key = self.client.api_key
        return (text.replace(key, "…") if len(key) > len("none") else text)[:160]
