"""Address of a model behind an OpenAI-compatible API, `http://host/v1#model`, and the client for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from defenses.errors import UserError, describe_download_error

KEY_VARIABLE = "OPENAI_API_KEY"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
MISSING_CLIENT = "needs the package openai: pip install 'refusalscope[judge]'"


def is_address(name: str) -> bool:
    """Return whether a model's name is the address of an API.

    >>> is_address("http://localhost:8000/v1#my-model"), is_address("smollm2:attacked")
    (True, False)
    """
    return re.match(r"https?://", name) is not None


@dataclass(frozen=True)
class ModelAddress:
    """Where a model is served. Credentials in the URL are kept apart, and no text of an address shows them.

    >>> address = ModelAddress.parse("http://me:secret@gpu:8000/v1#my-model", "--model")
    >>> str(address), address
    ('http://gpu:8000/v1#my-model', ModelAddress(url='http://gpu:8000/v1', host='gpu', model='my-model'))

    Attributes:
        url: of the API, without credentials.
        host: name of the host.
        model: name of the model at the API.
        credentials: user and password; None without any.
    """

    url: str
    host: str
    model: str
    credentials: tuple[str, str] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str, option: str) -> ModelAddress:
        """Return the address in a text.

        Args:
            text: such as `http://localhost:8000/v1#my-model`.
            option: name of the option, for errors.

        Raises:
            UserError: if it is no such address.
        """
        url, _, model = text.partition("#")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UserError(
                f"{option}: invalid address ({error}); expected http://host:8000/v1#NAME"
            ) from error
        if not host or not model:
            raise UserError(f"{option}: add the name of the model to the address: http://host/v1#NAME")
        if parts.query:
            raise UserError(
                f"{option} at {host}: the address has a query (?…), which may be a secret; put the key into "
                f"{KEY_VARIABLE}"
            )
        place = f"[{host}]" if ":" in host else host
        clean = f"{parts.scheme}://{place}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        has_credentials = parts.username is not None or parts.password is not None
        credentials = (unquote(parts.username or ""), unquote(parts.password or ""))
        return cls(clean, host, model, credentials if has_credentials else None)

    def __str__(self) -> str:
        return f"{self.url}#{self.model}"

    @property
    def is_local(self) -> bool:
        """Whether the API is on this machine."""
        return self.host in LOCAL_HOSTS

    def make_client(
        self,
        option: str,
        offline: bool,
        notify: Callable[[str], None],
        announcement: str,
        timeout: float,
        max_retries: int = 0,
    ) -> Any:
        """Return a client of the package `openai`; the API key is read from the environment.

        Args:
            option: name of the option, for errors.
            offline: whether only hosts on this machine are allowed.
            notify: called with a line of text if texts leave this machine.
            announcement: what is sent to `{host}`, and what for.
            timeout: of one call, seconds.
            max_retries: of a call that failed in a way that may pass: no connection, too many, a 5xx status.

        Raises:
            UserError: if `offline` forbids the host, a secret would be sent unencrypted, or the package
                `openai` is missing.
        """
        key = os.environ.get(KEY_VARIABLE, "")
        if offline and not self.is_local:
            raise UserError(f"{option} at {self.host}: --offline forbids it")
        if self.url.startswith("http:") and not self.is_local and (key or self.credentials):
            secret = f"unset {KEY_VARIABLE}" if key else "leave the password out"
            raise UserError(
                f"{option} at {self.host}: the {'API key' if key else 'password'} would be sent over plain "
                f"http; use https, or {secret}"
            )
        try:
            import openai
        except ImportError as error:
            raise UserError(f"{option} at {self.host} {MISSING_CLIENT}") from error
        if not self.is_local:
            with_key = f", with the key in {KEY_VARIABLE}" if key else ""
            notify(announcement.format(host=self.host) + with_key)
        try:
            # A proxy would send texts meant for this machine to another one.
            http_client = openai.DefaultHttpxClient(trust_env=not self.is_local, auth=self.credentials)
        except (ImportError, ValueError) as error:
            raise UserError(f"{option} at {self.host}: {describe_download_error(error)}") from error
        return openai.OpenAI(
            base_url=self.url,
            api_key=key or "none",
            max_retries=max_retries,
            timeout=timeout,
            http_client=http_client,
        )


def describe_call_error(client: Any, error: Exception) -> str:
    """Format an error of a call in one short line, without the API key.

    Args:
        client: from `ModelAddress.make_client`.
        error: the error.
    """
    text = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    key = client.api_key
    return (text.replace(key, "…") if key != "none" else text)[:160]
