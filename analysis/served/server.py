"""Servers of models: how each kind is asked for the next token's log-probabilities and for responses.

vLLM and llama.cpp are asked at `/v1/completions`, as is any other server with an OpenAI-compatible API;
SGLang, which names tokens by their text there, at its own `/generate`. Prompts are token ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from analysis.served.address import ModelAddress, describe_call_error
from analysis.served.listed_tokens import TokenList, TokenNames
from defenses.errors import UserError, unknown_name_error

# Greedy decoding without penalties, whatever the server's defaults; vLLM and llama.cpp name one differently.
_GREEDY = {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
_NO_PENALTY = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
_NAMED_BY_ID = {"return_tokens_as_token_ids": True, "return_token_ids": True}
_LIST_LENGTHS = (1000, 100, 50, 20, 10, 5, 1)  # that are tried after the whole vocabulary
_MAX_PADDING_MASS = 1e-5  # of token ids that a model has and its tokenizer has not
_MAX_GIVEN_IDS = 128  # per call, of vLLM
_REJECTED = (400, 404, 413, 422, 501)  # HTTP statuses: not in this way
_N_PROBE_TOKENS = 8


class CallRejectedError(UserError):
    """The server does not do what it was asked for."""


@dataclass(frozen=True)
class Abilities:
    """What a server was found to do, beside generating.

    Attributes:
        takes_ids: whether it tells the log-probabilities of given tokens.
        n_listed: number of most probable tokens that it lists when asked for as many as possible.
        lists_all: whether these are the whole vocabulary.
        takes_extras: whether it accepts more parameters than those of OpenAI's API.
    """

    takes_ids: bool = False
    n_listed: int = 0
    lists_all: bool = False
    takes_extras: bool = True

    def describe(self) -> str:
        """Return of which tokens the log-probabilities are known, in words."""
        if self.lists_all:
            return "all tokens"
        top = f"the {self.n_listed} most probable tokens" if self.n_listed else ""
        return " and ".join(filter(None, ["any tokens that it is asked for" if self.takes_ids else "", top]))


@dataclass(frozen=True)
class ModelServer:
    """A model behind an OpenAI-compatible API, asked at `/v1/completions`.

    Attributes:
        address: of the model.
        client: from `ModelAddress.make_client`.
        entry: what the server tells of the model in its list.
        versions: what else it tells of itself, for cache keys and run.json.
        tokenizer: of the model.
        abilities: see `find_abilities`.
    """

    address: ModelAddress
    client: Any
    entry: Mapping[str, Any]
    versions: Mapping[str, Any]
    tokenizer: Any = None
    abilities: Abilities = field(default_factory=Abilities)

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes the model and how it is asked, in plain values."""
        return {
            "url": self.address.url,
            "name": self.address.model,
            "told": _select_fields(self.entry, *_LASTING_FIELDS),
            "versions": dict(self.versions),
            "first_token": asdict(self.abilities),
        }

    @property
    def context_length(self) -> int | None:
        """Maximum number of tokens of prompt and response; None if the server does not tell it."""
        length = self.entry.get("max_model_len") or self.versions.get("n_ctx")
        return int(length) if length else None

    @cached_property
    def token_names(self) -> TokenNames:
        """The names of the tokens."""
        return TokenNames(self.tokenizer)

    def find_abilities(self, prompt: Sequence[int]) -> ModelServer:
        """Return this server with what it is found to do.

        Args:
            prompt: token ids of a short prompt.

        Raises:
            UserError: if it takes no token ids as prompts, tells no log-probabilities, or has another
                tokenizer.
        """
        server = self
        try:
            server._complete(prompt, 1)
        except CallRejectedError:
            server = replace(self, abilities=Abilities(takes_extras=False))
            server._complete(prompt, 1)
        server._check_tokenizer(prompt)
        n_tokens = len(self.tokenizer)
        for n_asked in (n_tokens, *_LIST_LENGTHS):
            try:
                listed = server.list_tokens(prompt, n_asked)
            except CallRejectedError:
                continue
            if n_told := len(listed.log_probabilities):
                mass = sum(map(math.exp, listed.log_probabilities.values()))
                lists_all = n_told >= n_tokens and mass > 1 - _MAX_PADDING_MASS
                found = replace(server.abilities, n_listed=min(n_asked, n_told), lists_all=lists_all)
                server = replace(server, abilities=found)
                break
        if server.abilities.lists_all:
            return server
        given = sorted({0, n_tokens // 2, n_tokens - 1})
        try:
            takes_ids = set(given) <= set(server.read_tokens(prompt, given).log_probabilities)
        except CallRejectedError:
            takes_ids = False
        if not takes_ids and not server.abilities.n_listed:
            raise UserError(
                f"--model at {self.address.host}: the server tells no log-probabilities of the next token at "
                "/v1/completions, so there are no margins; start it so that it does"
            )
        return replace(server, abilities=replace(server.abilities, takes_ids=takes_ids))

    def list_tokens(self, prompt: Sequence[int], n_tokens: int) -> TokenList:
        """Return the most probable tokens after a prompt.

        Args:
            prompt: token ids.
            n_tokens: how many are asked for.
        """
        return self._read_list(self._complete(prompt, 1, logprobs=n_tokens, **self._go_on))

    def read_tokens(self, prompt: Sequence[int], token_ids: Sequence[int]) -> TokenList:
        """Return the log-probabilities of given tokens after a prompt.

        Args:
            prompt: token ids of the prompt.
            token_ids: the tokens.
        """
        tokens = TokenList({})
        for start in range(0, len(token_ids), _MAX_GIVEN_IDS):
            given = list(token_ids[start : start + _MAX_GIVEN_IDS])
            choice = self._complete(prompt, 1, logprobs=1, logprob_token_ids=given, **self._go_on)
            found = self._read_list(choice)
            tokens = tokens.join(TokenList(found.log_probabilities))
        return tokens

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy response to a prompt as token ids; an end token may be the last.

        Args:
            prompt: token ids.
            max_new_tokens: maximum length of the response.
        """
        ids, text = self._read_response(self._complete(prompt, max_new_tokens, logprobs=1))
        return ids if ids is not None else self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def _go_on(self) -> dict[str, bool]:
        """Makes llama.cpp list the tokens also where the response ends at once."""
        return {"ignore_eos": True} if self.abilities.takes_extras else {}

    def _complete(self, prompt: Sequence[int], max_tokens: int, **parameters: Any) -> dict[str, Any]:
        """Return the one choice of a greedy completion."""
        extras = {**_NO_PENALTY, **_NAMED_BY_ID} if self.abilities.takes_extras else {}
        body = {"model": self.address.model, "prompt": list(prompt), "max_tokens": max_tokens, **_GREEDY}
        reply = self._post("/completions", body | extras | parameters)
        self._check_length(prompt, (reply.get("usage") or {}).get("prompt_tokens"))
        try:
            choice: dict[str, Any] = reply["choices"][0]
        except (LookupError, TypeError) as error:
            raise UserError(f"--model at {self.address.host}: unreadable reply: {reply!r:.120}") from error
        return choice

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the reply to a call, after retries."""
        import openai

        try:
            return self.client.post(path, body=body, cast_to=object)
        except openai.APIStatusError as error:
            text = describe_call_error(self.client, error)
            if error.status_code in _REJECTED:
                raise CallRejectedError(f"--model at {self.address.host}: {text}") from error
            raise UserError(f"--model at {self.address.host}: {text}") from error
        except (openai.APIError, ValueError) as error:
            raise UserError(
                f"--model at {self.address.host}: {describe_call_error(self.client, error)}: run the same "
                "command again to go on from here"
            ) from error

    def _check_length(self, prompt: Sequence[int], n_read: Any) -> None:
        """Raise if the server read another number of tokens than the prompt has."""
        if isinstance(n_read, int) and n_read != len(prompt):
            raise UserError(
                f"--model at {self.address.host}: the server read {n_read} tokens of a prompt of "
                f"{len(prompt)}: it adds or cuts off tokens, so its answers are to other prompts"
            )

    def _check_tokenizer(self, prompt: Sequence[int]) -> None:
        """Raise if the server's text of some tokens is not that of the tokenizer."""
        try:
            choice = self._complete(prompt, _N_PROBE_TOKENS, logprobs=1)
        except CallRejectedError:  # it tells no log-probabilities, which is found next
            return
        ids, text = self._read_response(choice)
        if ids is None:
            return
        decoded = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        # The last token may hold a part of a character.
        if decoded.strip()[:-1].strip("\ufffd") not in text.strip():
            raise UserError(
                f"--model at {self.address.host}: the tokenizer does not fit: the server calls the tokens "
                f"{ids} {text!r:.60}, and the tokenizer {decoded!r:.60}; name the model's own with "
                "--tokenizer"
            )

    def _read_response(self, choice: Mapping[str, Any]) -> tuple[list[int] | None, str]:
        """Return the generated token ids, None if the server does not tell them, and the text."""
        text = str(choice.get("text") or "")
        if isinstance(ids := choice.get("token_ids"), list):
            return ids, text
        logprobs = choice.get("logprobs") or {}
        named = [entry.get("id") for entry in logprobs.get("content") or []]
        if not named:
            names = [str(name) for name in logprobs.get("tokens") or []]
            named = [self.token_names.find_id(name) if "token_id:" in name else None for name in names]
        return (named, text) if named and None not in named else (None, text)

    def _read_list(self, choice: Mapping[str, Any]) -> TokenList:
        """Return the tokens that a choice lists for the first position."""
        logprobs = choice.get("logprobs") or {}
        if content := logprobs.get("content"):  # llama.cpp
            entries = [
                (entry.get("id", entry.get("token")), entry["logprob"])
                for entry in [*content[0].get("top_logprobs", []), content[0]]
            ]
        else:
            first = (logprobs.get("top_logprobs") or [None])[0] or {}
            entries = list(first.items())
        listed: dict[int, float] = {}
        unknown = []
        for name, value in entries:
            token_id = name if isinstance(name, int) else self.token_names.find_id(str(name))
            if token_id is None:
                unknown.append(float(value))
            else:
                listed[token_id] = float(value)
        # A listed token whose id is unknown may be any of the others.
        cap = max([min(listed.values(), default=0.0), *unknown])
        return TokenList(listed, cap)


@dataclass(frozen=True)
class SglangServer(ModelServer):
    """A model served by SGLang, asked at `/generate`."""

    def list_tokens(self, prompt: Sequence[int], n_tokens: int) -> TokenList:
        """Return the most probable tokens after a prompt."""
        told = self._generate(prompt, 1, return_logprob=True, top_logprobs_num=n_tokens)
        listed = _read_entries(told, "output_top_logprobs")
        return TokenList(listed, min(listed.values(), default=0.0))

    def read_tokens(self, prompt: Sequence[int], token_ids: Sequence[int]) -> TokenList:
        """Return the log-probabilities of given tokens after a prompt."""
        told = self._generate(prompt, 1, return_logprob=True, token_ids_logprob=list(token_ids))
        return TokenList(_read_entries(told, "output_token_ids_logprobs"))

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy response to a prompt as token ids; an end token may be the last."""
        return list(self._generate(prompt, max_new_tokens)["output_ids"])

    def _check_tokenizer(self, prompt: Sequence[int]) -> None:
        told = self._generate(prompt, _N_PROBE_TOKENS)
        text = str(told.get("text") or "")
        decoded = str(self.tokenizer.decode(told["output_ids"], skip_special_tokens=True))
        if decoded.strip()[:-1].strip("\ufffd") not in text.strip():
            raise UserError(
                f"--model at {self.address.host}: the tokenizer does not fit: the server writes {text!r:.60} "
                f"and the tokenizer {decoded!r:.60}; name the model's own with --tokenizer"
            )

    def _generate(self, prompt: Sequence[int], max_tokens: int, **parameters: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": max_tokens, "repetition_penalty": 1.0, **_GREEDY}
        url = f"{self.address.url.removesuffix('/v1')}/generate"
        reply: dict[str, Any] = self._post(
            url, {"input_ids": list(prompt), "sampling_params": sampling, **parameters}
        )
        self._check_length(prompt, (reply.get("meta_info") or {}).get("prompt_tokens"))
        return reply


# Fields of an entry of `/v1/models` that stay the same; others are times and permissions.
_LASTING_FIELDS = ("id", "root", "owned_by", "parent", "max_model_len")


def find_server(address: ModelAddress, client: Any) -> ModelServer:
    """Return the server at an address; it is asked for its list of models and for its version.

    Args:
        address: of the model.
        client: from `ModelAddress.make_client`.

    Raises:
        UserError: if there is no server, or it does not have the model.
    """
    root = address.url.removesuffix("/v1")
    models = _get_json(client, "/models", must_exist=True)
    entries = {str(entry.get("id")): entry for entry in models.get("data") or [] if isinstance(entry, dict)}
    if entries and address.model not in entries:
        raise unknown_name_error(f"model at {address.host}", address.model, entries)
    entry = entries.get(address.model, {})
    if entry.get("owned_by") == "sglang":
        info = _get_json(client, f"{root}/get_server_info")
        return SglangServer(address, client, entry, _select_fields(info, "version", "model_path", "dtype"))
    version = _get_json(client, f"{root}/version")  # vLLM
    props = {} if version else _get_json(client, f"{root}/props")  # llama.cpp
    versions = _select_fields(version, "version") | _select_fields(props, "build_info", "model_path")
    if n_ctx := (props.get("default_generation_settings") or {}).get("n_ctx"):
        versions["n_ctx"] = n_ctx
    return ModelServer(address, client, entry, versions)


def digest_vocabulary(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tokens and chat template."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    text = json.dumps([list(map(str, tokens)), tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _select_fields(told: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the fields of these names."""
    return {name: told[name] for name in names if name in told}


def _get_json(client: Any, path: str, must_exist: bool = False) -> dict[str, Any]:
    """Return what a server tells at a path; empty if nothing."""
    import openai

    try:
        reply = client.with_options(max_retries=1).get(path, cast_to=object)
    except openai.APIStatusError as error:
        if error.status_code in (401, 403):
            raise UserError(f"--model: {describe_call_error(client, error)}") from error
        return {}
    except (openai.APIError, ValueError) as error:
        if must_exist:
            raise UserError(
                f"--model: {describe_call_error(client, error)}: is a server running at {client.base_url}?"
            ) from error
        return {}
    return reply if isinstance(reply, dict) else {}


def _read_entries(told: Mapping[str, Any], name: str) -> dict[int, float]:
    """Return log-probabilities by token id at the first position of a reply of SGLang."""
    positions = (told.get("meta_info") or {}).get(name) or [[]]
    return {int(token_id): float(value) for value, token_id, *_ in positions[0] or []}
