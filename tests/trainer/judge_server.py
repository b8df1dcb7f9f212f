"""A judge on this machine: a real HTTP server with the chat completions of an OpenAI-compatible
API."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PART = re.compile(r"<<< ([\w ]+?) ([0-9a-f]{16})>>>\n(.*?)\n<<< end \2>>>", re.S)


@dataclass
class Response:
    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: Callable[[], object] = lambda: None
    """Called before the body is sent."""


def said(text: str | None) -> Response:
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return Response({"choices": [{"message": {"content": text}}], "usage": usage})


@dataclass
class JudgeServer:
    endpoint: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all requests."""
    headers: list[Mapping[str, str]] = field(default_factory=list)


def parts_of(request: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a request by name: prompt, reference, answer A, answer B."""
    text = request["messages"][-1]["content"]
    return {name: what for name, _, what in _PART.findall(text)}


@contextmanager
def judge_server(answer: Callable[[Mapping[str, Any], int], Response]) -> Iterator[JudgeServer]:
    """Serve while the context lasts.

    Args:
        answer: gets the body of a request and its number, from 0.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                number = len(found.requests)
                found.requests.append(raw)
                found.headers.append(dict(self.headers))
            response = answer(raw, number)
            body = response.body
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            response.wait()
            try:
                self.send_response(response.status)
                self.send_header("Content-Length", str(len(text)))
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)
            except OSError:  # the client has given up
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found = JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
