"""An HTTP proxy before an S3 server that records the requests' methods, addresses and headers, and
refuses encryption with keys of a key management service, which the server lacks."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import urlsplit


class Request(NamedTuple):
    """One request: ``PUT /bucket/key?uploads`` with its headers in lower case."""

    line: str
    headers: dict[str, str]


@contextmanager
def recording(endpoint: str) -> Iterator[tuple[str, list[Request]]]:
    """Yield the address of a proxy before a server, and the requests so far."""
    found: list[Request] = []
    host = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.append(Request(f"{self.command} {self.path}", headers))
            if headers.get("expect") == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(headers.get("content-length", 0)))
            if headers.get("x-amz-server-side-encryption") == "aws:kms":
                self._refuse()
                return
            upstream = http.client.HTTPConnection(host)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            if answer.getheader("content-length") is None:
                self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            upstream.close()

        def _refuse(self) -> None:
            """Answer as a server without a key management service."""
            text = b"<Error><Code>NotImplemented</Code><Message>no keys</Message></Error>"
            self.send_response(501)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
