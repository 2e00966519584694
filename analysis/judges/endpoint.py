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

_MAX_CONCURRENT_CALLS = 8  # calls under way
_TIMEOUT_SECONDS = 60.0  # for one call, and for one wait at most
_MAX_REJECTED_TEXTS = 8  # texts in a row that the endpoint will not read, none that it did
# HTTP statuses: what is wrong with every call, and with this text. Others may be over in a while.
_FATAL_STATUSES, _REJECTED_TEXT_STATUSES = (401, 404, 405), (400, 403, 413, 415, 422)


class CallBudget:
    """Calls that are left.

    >>> budget = CallBudget(3)
    >>> budget.take_calls(2), budget.take_calls(2), budget.take_calls(2)
    (2, 1, 0)
    """

    def __init__(self, max_calls: int) -> None:
        self.max_calls = self._remaining_calls = max_calls
        self._lock = Lock()

    def take_calls(self, requested_calls: int = 1) -> int:
        """Return how many of the calls that are wanted may be made; they count as made."""
        with self._lock:
            given = max(0, min(requested_calls, self._remaining_calls))
            self._remaining_calls -= given
            return given


@dataclass
class EndpointChatModel:
    """An endpoint that is asked until the budget is spent or it fails for good; then `down` says why.

    Attributes:
        client: of the package `openai`.
        host: for people.
        model: its name there.
        budget: calls, retries included.
        retry_delays: seconds before each further try; the endpoint may ask for more.
    """

    client: Any
    host: str
    model: str
    budget: CallBudget
    retry_delays: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    failure_reason: str = ""
    _stop_event: Event = field(default_factory=Event, repr=False)
    _n_replies: int = 0
    _n_rejected_texts: int = 0

    @classmethod
    def from_address(
        cls, address: str, budget: int, offline: bool, notify: Callable[[str], None]
    ) -> EndpointChatModel:
        """Return the endpoint at an address, `http://host/v1#model`; the key is read from OPENAI_API_KEY.

        Args:
            address: of the endpoint, and the model behind `#`.
            budget: calls at most.
            offline: whether only this machine may be asked.
            notify: told where the texts go.
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
            notify(f"requests and answers are sent to {host} to be judged{with_key}")
        client = openai.OpenAI(
            base_url=url,
            api_key=key or "none",
            max_retries=0,
            timeout=_TIMEOUT_SECONDS,
            # A proxy would carry what is meant for this machine away from it.
            http_client=openai.DefaultHttpxClient(trust_env=not here),
        )
        return cls(client, host, model, CallBudget(budget))

    @property
    def name(self) -> str:
        """The model and where it is."""
        return f"{self.model} at {self.host}"

    def generate_replies(
        self, prompts: Sequence[str], is_valid: Callable[[str], bool], on_progress: Callable[[int], None]
    ) -> list[tuple[str, str]]:
        """Return words and why there are none, of each prompt, in their order.

        Interrupted, it returns what there is.
        """
        found = [("", "interrupted")] * len(prompts)
        pool = ThreadPoolExecutor(_MAX_CONCURRENT_CALLS)
        places = {
            pool.submit(self._generate_reply, prompt, is_valid): place for place, prompt in enumerate(prompts)
        }
        try:
            for future in as_completed(places):
                found[places[future]] = future.result()
                on_progress(1)
        except KeyboardInterrupt:
            self._stop_calls("interrupted")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return found

    def _generate_reply(self, prompt: str, is_valid: Callable[[str], bool]) -> tuple[str, str]:
        said, why, good = "", "", self._n_replies
        for wait in (0.0, *self.retry_delays):
            self._wait_before_retry(max(wait, self._parse_retry_after(why)) if wait else 0)
            if self.failure_reason:
                return "", self.failure_reason
            if not self.budget.take_calls():
                return "", f"budget spent{f' ({why})' if why else ''}"
            text, why, status = self._call_endpoint(prompt)
            if status in _FATAL_STATUSES:
                self._stop_calls(why)
                return "", why
            if status in _REJECTED_TEXT_STATUSES:
                self._n_rejected_texts += 1
                if self._n_rejected_texts >= _MAX_REJECTED_TEXTS and not self._n_replies:
                    self._stop_calls(why)
                return "", why
            if why:
                continue
            self._n_replies += 1
            if is_valid(text):
                return text, ""
            if said:
                return "", f"the judge said {said[:40]!r}, then {text[:40]!r}"
            said = text or "nothing"
        if said:
            return "", f"the judge said {said[:40]!r}"
        if self._n_replies == good:  # nothing worked for anybody in the meantime
            self._stop_calls(why)
        return "", why

    def _call_endpoint(self, prompt: str) -> tuple[str, str, int]:
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
            known = error.status_code in (*_FATAL_STATUSES, *_REJECTED_TEXT_STATUSES)
            return "", self._describe_api_error(error) + asked, error.status_code if known else 0
        except openai.APIError as error:
            return "", self._describe_api_error(error), 0
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            return (
                "",
                f"no reply that can be read ({self._describe_api_error(error)})",
                _REJECTED_TEXT_STATUSES[0],
            )

    @staticmethod
    def _parse_retry_after(error_text: str) -> float:
        """Seconds that the endpoint asked for in what went wrong."""
        _, _, behind = error_text.rpartition("(retry after ")
        number = behind.partition(" s)")[0]
        return min(float(number), _TIMEOUT_SECONDS) if number.isdecimal() else 0.0

    def _wait_before_retry(self, seconds: float) -> None:
        self._stop_event.wait(seconds)  # no longer than until all is over

    def _stop_calls(self, reason: str) -> None:
        self.failure_reason = self.failure_reason or reason
        self._stop_event.set()

    def _describe_api_error(self, error: Exception) -> str:
        """The error in one line, without the key."""
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        key = self.client.api_key
        return (text.replace(key, "…") if key != "none" else text)[:160]
