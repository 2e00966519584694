"""A chat model behind an OpenAI-compatible endpoint: a budget of calls, retries with back-off."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from defenses.errors import UserError

_AT_ONCE = 8  # calls under way
_SECONDS = 60.0  # for one call, and for one wait at most
_HOPELESS = 8  # texts in a row that the endpoint will not read, none that it did
# HTTP statuses: what is wrong with every call, and with this text. Others may be over in a while.
_FATAL, _TEXT = (401, 404, 405), (400, 403, 413, 415, 422)


class Budget:
    """Calls that are left.

    >>> budget = Budget(3)
    >>> budget.take(2), budget.take(2), budget.take(2)
    (2, 1, 0)
    """

    def __init__(self, calls: int) -> None:
        self.calls = self._left = calls
        self._lock = Lock()

    def take(self, wanted: int = 1) -> int:
        """Return how many of the calls that are wanted may be made; they count as made."""
        with self._lock:
            given = max(0, min(wanted, self._left))
            self._left -= given
            return given


@dataclass
class Endpoint:
    """An endpoint that is asked until the budget is spent or it fails for good; then `down` says why.

    Attributes:
        client: of the package `openai`.
        host: for people.
        model: its name there.
        budget: calls, retries included.
        waits: seconds before each further try; the endpoint may ask for more.
    """

    client: Any
    host: str
    model: str
    budget: Budget
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    down: str = ""
    _stop: Event = field(default_factory=Event, repr=False)
    _good: int = 0
    _unread: int = 0

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
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname or "", parts.port
        except ValueError as error:
            raise UserError(
                f"--judge-model: this is no address ({error}): http://host:8000/v1#NAME"
            ) from error
        if not host or not model:
            raise UserError("--judge-model: write the model's name behind the address: http://host/v1#NAME")
        here, key = host in ("localhost", "127.0.0.1", "::1"), os.environ.get("OPENAI_API_KEY", "")
        if offline and not here:
            raise UserError(f"--judge-model at {host}: --offline forbids it")
        if key and parts.scheme == "http" and not here:
            raise UserError(
                f"--judge-model at {host}: the key would go over plain http; take https, or unset it"
            )
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "an endpoint as judge needs the package openai: pip install 'refusalscope[judge]'"
            ) from error
        if not here:
            with_key = ", with the key in OPENAI_API_KEY" if key else ""
            tell(f"requests and answers are sent to {host} to be judged{with_key}")
        client = openai.OpenAI(
            base_url=url,
            api_key=key or "none",
            max_retries=0,
            timeout=_SECONDS,
            # A proxy would carry what is meant for this machine away from it.
            http_client=openai.DefaultHttpxClient(trust_env=not here),
        )
        return cls(client, host, model, Budget(budget))

    @property
    def name(self) -> str:
        """The model and where it is."""
        return f"{self.model} at {self.host}"

    def replies(
        self, prompts: Sequence[str], valid: Callable[[str], bool], done: Callable[[int], None]
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt, in their order.

        Interrupted, it returns what there is.
        """
        found = [("", "interrupted")] * len(prompts)
        pool = ThreadPoolExecutor(_AT_ONCE)
        places = {pool.submit(self._reply, prompt, valid): place for place, prompt in enumerate(prompts)}
        try:
            for future in as_completed(places):
                found[places[future]] = future.result()
                done(1)
        except KeyboardInterrupt:
            self._give_up("interrupted")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return found

    def _reply(self, prompt: str, valid: Callable[[str], bool]) -> tuple[str, str]:
        said, why, good = "", "", self._good
        for wait in (0.0, *self.waits):
            self._wait(max(wait, self._asked_to_wait(why)) if wait else 0)
            if self.down:
                return "", self.down
            if not self.budget.take():
                return "", f"budget spent{f' ({why})' if why else ''}"
            text, why, status = self._call(prompt)
            if status in _FATAL:
                self._give_up(why)
                return "", why
            if status in _TEXT:
                self._unread += 1
                if self._unread >= _HOPELESS and not self._good:
                    self._give_up(why)
                return "", why
            if why:
                continue
            self._good += 1
            if valid(text):
                return text, ""
            if said:
                return "", f"the judge said {said[:40]!r}, then {text[:40]!r}"
            said = text or "nothing"
        if said:
            return "", f"the judge said {said[:40]!r}"
        if self._good == good:  # nothing worked for anybody in the meantime
            self._give_up(why)
        return "", why

    def _call(self, prompt: str) -> tuple[str, str, int]:
        """Words, what went wrong, and the status that says for whom; 0 where there is none."""
        import openai

        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
            )
            return str(reply.choices[0].message.content or ""), "", 0
        except openai.APIStatusError as error:
            after = error.response.headers.get("retry-after", "")
            asked = f" (retry after {after} s)" if after.isdecimal() else ""
            known = error.status_code in (*_FATAL, *_TEXT)
            return "", self._plain(error) + asked, error.status_code if known else 0
        except openai.APIError as error:
            return "", self._plain(error), 0
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            return "", f"no reply that can be read ({self._plain(error)})", _TEXT[0]

    @staticmethod
    def _asked_to_wait(why: str) -> float:
        """Seconds that the endpoint asked for in what went wrong."""
        _, _, behind = why.rpartition("(retry after ")
        number = behind.partition(" s)")[0]
        return min(float(number), _SECONDS) if number.isdecimal() else 0.0

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)  # no longer than until all is over

    def _give_up(self, why: str) -> None:
        self.down = self.down or why
        self._stop.set()

    def _plain(self, error: Exception) -> str:
        """The error in one line, without the key."""
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        key = self.client.api_key
        return (text.replace(key, "…") if key != "none" else text)[:160]
