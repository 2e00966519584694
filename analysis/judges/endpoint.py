"""Client of a chat model behind an OpenAI-compatible endpoint, with a call budget and retries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

from analysis.served.address import ModelAddress, describe_call_error

_MAX_CONCURRENT_CALLS = 8
_TIMEOUT_SECONDS = 60.0  # limit of one call, and of one wait before a retry
_MAX_REJECTED_TEXTS = 8  # texts rejected before the first reply, after which the endpoint counts as failed
# HTTP statuses that mean: every call will fail; this text will always fail. Other errors may be transient.
_FATAL_STATUSES, _REJECTED_TEXT_STATUSES = (401, 404, 405), (400, 403, 413, 415, 422)


class CallBudget:
    """Thread-safe counter of the calls that remain.

    >>> budget = CallBudget(3)
    >>> budget.take_calls(2), budget.take_calls(2), budget.take_calls(2)
    (2, 1, 0)
    """

    def __init__(self, max_calls: int) -> None:
        self.max_calls = self._remaining_calls = max_calls
        self._lock = Lock()

    def take_calls(self, requested_calls: int = 1) -> int:
        """Return how many of the requested calls may be made, and count them as made."""
        with self._lock:
            granted_calls = max(0, min(requested_calls, self._remaining_calls))
            self._remaining_calls -= granted_calls
            return granted_calls


@dataclass(frozen=True)
class _CallResult:
    """Outcome of one call.

    Attributes:
        text: the reply.
        error: the reason for a failure, in one line; empty after a success.
        status: the HTTP status if it rules out a retry, else 0.
        retry_after: seconds that the endpoint asked to wait before the next call.
    """

    text: str = ""
    error: str = ""
    status: int = 0
    retry_after: float = 0.0


@dataclass
class EndpointChatModel:
    """Chat model behind an endpoint; it is called until the budget is spent or the endpoint fails for good.

    The retries are this class's own. Those of the OpenAI client (`max_retries`) sleep in a way that neither
    an interrupt nor a fatal error in another thread can end, back off for 8 seconds at most, and would
    repeat calls that the budget forbids.

    Attributes:
        client: client of the package `openai`.
        host: host name of the endpoint, for messages.
        model: name of the model at the endpoint.
        budget: budget of calls, retries included.
        retry_delays: seconds before each retry; the endpoint may ask for longer ones.
        failure_reason: why no further call is made; empty while calls are made.
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
        """Return the chat model at `http://host/v1#model`; the API key is read from OPENAI_API_KEY.

        Args:
            address: URL of the endpoint, with the name of the model after `#`.
            budget: maximum number of calls.
            offline: whether only endpoints on this machine are allowed.
            notify: callback that prints a line; it announces where texts are sent.

        Raises:
            UserError: if the address is invalid, `--offline` forbids it, the key would be sent unencrypted,
                or the package `openai` is missing.
        """
        parsed = ModelAddress.parse(address, "--judge-model")
        announcement = "queries and responses are sent to {host} for judging"
        client = parsed.make_client("--judge-model", offline, notify, announcement, _TIMEOUT_SECONDS)
        return cls(client, parsed.host, parsed.model, CallBudget(budget))

    @property
    def name(self) -> str:
        """Name of the model and host of the endpoint."""
        return f"{self.model} at {self.host}"

    def generate_replies(
        self, prompts: Sequence[str], is_valid: Callable[[str], bool], on_progress: Callable[[int], None]
    ) -> list[tuple[str, str]]:
        """Return (reply, reason for a missing reply) for each prompt, in the order of the prompts.

        After a keyboard interrupt, the replies received so far are returned.
        """
        replies = [("", "interrupted")] * len(prompts)
        pool = ThreadPoolExecutor(_MAX_CONCURRENT_CALLS)
        prompt_indices = {
            pool.submit(self._generate_reply, prompt, is_valid): index for index, prompt in enumerate(prompts)
        }
        try:
            for future in as_completed(prompt_indices):
                replies[prompt_indices[future]] = future.result()
                on_progress(1)
        except KeyboardInterrupt:
            self._stop_calls("interrupted")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return replies

    def _generate_reply(self, prompt: str, is_valid: Callable[[str], bool]) -> tuple[str, str]:
        """Call the endpoint until it returns a valid reply; an invalid reply is requested again once."""
        invalid_reply, n_replies_before, result = "", self._n_replies, _CallResult()
        for delay in (0.0, *self.retry_delays):
            self._wait_before_retry(max(delay, result.retry_after) if delay else 0)
            if self.failure_reason:
                return "", self.failure_reason
            if not self.budget.take_calls():
                return "", f"budget spent{f' ({result.error})' if result.error else ''}"
            result = self._call_endpoint(prompt)
            if result.status in _FATAL_STATUSES:
                self._stop_calls(result.error)
                return "", result.error
            if result.status in _REJECTED_TEXT_STATUSES:
                self._n_rejected_texts += 1
                if self._n_rejected_texts >= _MAX_REJECTED_TEXTS and not self._n_replies:
                    self._stop_calls(result.error)
                return "", result.error
            if result.error:
                continue
            self._n_replies += 1
            if is_valid(result.text):
                return result.text, ""
            if invalid_reply:
                return "", f"the judge replied {invalid_reply[:40]!r}, then {result.text[:40]!r}"
            invalid_reply = result.text or "nothing"
        if invalid_reply:
            return "", f"the judge replied {invalid_reply[:40]!r}"
        if self._n_replies == n_replies_before:  # no thread got a reply in the meantime
            self._stop_calls(result.error)
        return "", result.error

    def _call_endpoint(self, prompt: str) -> _CallResult:
        """Make one call; errors of the endpoint are returned, not raised."""
        import openai

        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
            )
            return _CallResult(str(completion.choices[0].message.content or ""))
        except openai.APIStatusError as error:
            header = error.response.headers.get("retry-after", "")
            retry_after = min(float(header), _TIMEOUT_SECONDS) if header.isdecimal() else 0.0
            retry_note = f" (retry after {header} s)" if header.isdecimal() else ""
            rules_out_retry = error.status_code in (*_FATAL_STATUSES, *_REJECTED_TEXT_STATUSES)
            return _CallResult(
                error=describe_call_error(self.client, error) + retry_note,
                status=error.status_code if rules_out_retry else 0,
                retry_after=retry_after,
            )
        except openai.APIError as error:
            return _CallResult(error=describe_call_error(self.client, error))
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            return _CallResult(
                error=f"unreadable reply ({describe_call_error(self.client, error)})",
                status=_REJECTED_TEXT_STATUSES[0],
            )

    def _wait_before_retry(self, seconds: float) -> None:
        """Wait, unless and until all calls are stopped."""
        self._stop_event.wait(seconds)

    def _stop_calls(self, reason: str) -> None:
        """Record the first reason for stopping and end all waits."""
        self.failure_reason = self.failure_reason or reason
        self._stop_event.set()
