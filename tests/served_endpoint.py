"""An OpenAI-compatible endpoint that tests serve in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, int], tuple[int, str]]


@contextmanager
def serve_endpoint(reply_to: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve an OpenAI-compatible endpoint; `reply_to` receives the prompt and the number of earlier calls."""
    requests: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, text = reply_to(body["messages"][0]["content"], len(requests))
                requests.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            completion = {
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
                **{"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]},
            }
            reply = json.dumps(completion if status == 200 else {"error": {"message": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            if status == 429:
                self.send_header("Retry-After", "30")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#judge", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
