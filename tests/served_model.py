"""A server of a transformers model with an OpenAI-compatible API, as far as served models are asked.

It can play vLLM, SGLang, llama.cpp or a plain server, list all tokens, some or none, and fail.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class TestServer:
    """A model that is served, and what was asked of it.

    Attributes:
        model: a transformers model.
        tokenizer: its tokenizer.
        kind: vllm, sglang, llamacpp or plain (tokens are named by their text, other parameters are refused).
        max_listed: maximum number of listed tokens; 0 for none, None for all.
        takes_ids: whether log-probabilities of given tokens are told.
        name: of the model.
        root: what is told of its origin.
        n_added: number of tokens that it adds to every prompt.
        get_status: called with the number of earlier calls; another status than 200 is a failure.
        calls: path, body and headers of each call.
        url: of the API.
    """

    __test__ = False

    model: Any
    tokenizer: Any
    kind: str = "vllm"
    max_listed: int | None = None
    takes_ids: bool = False
    name: str = "tiny"
    root: str = ""
    n_added: int = 0
    get_status: Callable[[int], int] = lambda n_calls: 200
    calls: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> str:
        """The address for `--model`."""
        return f"{self.url}#{self.name}"

    @property
    def limit(self) -> int:
        """The maximum number of listed tokens."""
        return self.model.config.vocab_size if self.max_listed is None else self.max_listed

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and reply."""
        if path == "/v1/models":
            entry = {"id": self.name, "owned_by": self.kind, "created": len(self.calls)}
            known = {"root": self.root, "max_model_len": 512} if self.kind in ("vllm", "sglang") else {}
            return 200, {"object": "list", "data": [entry | known]}
        if path == "/version" and self.kind == "vllm":
            return 200, {"version": "0.0.test"}
        if path == "/props" and self.kind == "llamacpp":
            settings = {"n_ctx": 512}
            return 200, {"build_info": "b1-test", "default_generation_settings": settings}
        if path == "/get_server_info" and self.kind == "sglang":
            return 200, {"version": "0.0.test", "api_key": "sk-of-the-server"}
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/generate" and self.kind == "sglang":
            return 200, self.generate_natively(body)
        return 404, {"error": {"message": "not here"}}

    def continue_prompt(self, prompt: list[int], n_tokens: int, end: bool = True):
        """Return the greedy response, and the log-probabilities at each of its tokens."""
        ids, rows = list(prompt), []
        with torch.inference_mode(), self.lock:
            for _ in range(n_tokens):
                logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                rows.append(logits.double().log_softmax(-1))
                ids.append(int(logits.argmax()))
                if end and ids[-1] == self.tokenizer.eos_token_id:
                    break
        return ids[len(prompt) :], rows

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a call of `/v1/completions`."""
        if self.kind == "plain" and set(body) - set(PLAIN_PARAMETERS):
            return 400, {"error": {"message": "unknown parameters"}}
        n_asked, given = body.get("logprobs"), body.get("logprob_token_ids") if self.takes_ids else None
        if self.kind == "vllm" and n_asked is not None and not given and n_asked > self.limit:
            return 400, {"error": {"message": f"{n_asked} is greater than max allowed: {self.limit}"}}
        ids, rows = self.continue_prompt(body["prompt"], body["max_tokens"])
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(ids, skip_special_tokens=True)}
        if self.kind == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if n_asked is not None and self.limit:
            choice["logprobs"] = self.list_tokens(ids, rows, min(n_asked, self.limit), given)
        n_read = len(body["prompt"]) + self.n_added
        return 200, {"choices": [choice], "usage": {"prompt_tokens": n_read, "completion_tokens": len(ids)}}

    def list_tokens(self, ids, rows, n_listed: int, given: list[int] | None) -> dict[str, Any]:
        """Return the log-probabilities in the form of the kind of server."""
        lists = []
        for token_id, row in zip(ids, rows, strict=True):
            chosen = given or row.topk(n_listed).indices.tolist()
            lists.append({int(one): float(row[one]) for one in [token_id, *chosen]})
        if self.kind == "llamacpp":
            return {
                "content": [
                    {"id": token_id, "logprob": listed[token_id], "top_logprobs": [
                        {"id": one, "token": self.tokenizer.decode([one]), "logprob": value}
                        for one, value in listed.items()
                    ]}
                    for token_id, listed in zip(ids, lists, strict=True)
                ]
            }  # fmt: skip

        def name(token_id: int) -> str:
            return f"token_id:{token_id}" if self.kind == "vllm" else self.tokenizer.decode([token_id])

        return {
            "tokens": [name(token_id) for token_id in ids],
            "token_logprobs": [listed[token_id] for token_id, listed in zip(ids, lists, strict=True)],
            "top_logprobs": [{name(one): value for one, value in listed.items()} for listed in lists],
        }

    def generate_natively(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a call of SGLang's `/generate`."""
        ids, rows = self.continue_prompt(body["input_ids"], body["sampling_params"]["max_new_tokens"])
        told: dict[str, Any] = {"prompt_tokens": len(body["input_ids"])}
        if n_listed := min(body.get("top_logprobs_num", 0), self.limit):
            told["output_top_logprobs"] = [
                [[float(row[one]), int(one), None] for one in row.topk(n_listed).indices] for row in rows
            ]
        if body.get("token_ids_logprob") and self.takes_ids:
            told["output_token_ids_logprobs"] = [
                [[float(row[one]), one, None] for one in body["token_ids_logprob"]] for row in rows
            ]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return {"text": text, "output_ids": ids, "meta_info": told}

    def completions(self) -> list[dict[str, Any]]:
        """Return the bodies of the calls for completions."""
        return [body for path, body, _ in self.calls if path in ("/v1/completions", "/generate")]


PLAIN_PARAMETERS = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"),
    "logprobs",
)


@contextmanager
def serve_model(model: Any, tokenizer: Any, **settings: Any) -> Iterator[TestServer]:
    """Serve a model on this machine while the context lasts; the settings are those of `TestServer`."""
    served = TestServer(model, tokenizer, **settings)
    counter = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            with counter:
                n_calls = len(served.completions())
                status = served.get_status(n_calls) if self.command == "POST" else 200
                if status == 200:
                    served.calls.append((self.path, body, dict(self.headers)))
            answer: dict[str, Any] = {"error": {"message": "it fails on purpose"}}
            if status == 200:
                status, answer = served.answer(self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
