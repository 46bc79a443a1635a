"""A small HTTP server on 127.0.0.1 for the tests of what talks to servers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


@dataclass
class Raw:
    """A reply as bytes: its headers, and its body in pieces, one every `pause` seconds."""

    pieces: list[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0


@dataclass
class Server:
    url: str
    requests: list[Request] = field(default_factory=list)


@contextmanager
def serve(answer: Callable[[Request], Any]) -> Iterator[Server]:
    """Serves `answer(request)`: a JSON value, text (HTML), (status, either of them), or `Raw`."""
    server = Server("")
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, parts.path, query, headers, body)
            server.requests.append(request)
            reply = answer(request)
            if isinstance(reply, Raw):
                self.write_raw(reply)
                return
            status, content = reply if isinstance(reply, tuple) else (200, reply)
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", text)
            data = text.encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def write_raw(self, reply: Raw) -> None:
            self.send_response(reply.status)
            length = sum(map(len, reply.pieces))
            for name, value in ({"Content-Length": str(length)} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client has gone
                for piece in reply.pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    if closing.wait(reply.pause):
                        return

        do_GET = do_POST = handle_any

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        closing.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@contextmanager
def drips(begin: bytes, seconds: float = 60.0) -> Iterator[int]:
    """A port that answers a connection with `begin` and then a byte every 0.05 seconds."""
    closing = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):  # the client has gone
                    connection.recv(1)
                    connection.sendall(begin)
                    for _ in range(int(seconds / 0.05)):
                        if closing.wait(0.05):
                            return
                        connection.sendall(b"2")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
