"""A reverse proxy in front of several servers, and a receiver of webhooks, each in a thread of this process."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEADER = "X-Tenant"
LISTED, STRANGER = "127.0.0.2", "127.0.0.3"  # addresses that connections to a server come from


class From(urllib.request.HTTPHandler):
    """Opens connections from one loopback address."""

    def __init__(self, address: str):
        super().__init__()
        self._address = address

    def http_open(self, request: urllib.request.Request) -> Any:
        import http.client

        make = lambda host, **how: http.client.HTTPConnection(host, source_address=(self._address, 0), **how)  # noqa: E731
        return self.do_open(make, request)


def opener(address: str) -> urllib.request.OpenerDirector:
    """Without a proxy of the environment."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), From(address))


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def proxy(workers: Sequence[str], tenants: dict[str, str], worker_of: Callable[[str], int]) -> Iterator[str]:
    """Address of a proxy that knows tenants by their API key and names them to the worker that ``worker_of`` picks.

    A tenant always comes to the same worker: queue and history are a process's own.
    """
    to = opener(LISTED)

    class Proxy(_Quiet):
        def _pass(self) -> None:
            tenant = tenants.get(self.headers.get("X-Api-Key", ""))
            if tenant is None:
                self.reply(401, b"{}")
                return
            kept = {"Content-Type": self.headers.get("Content-Type", "application/json"), HEADER: tenant}
            body = self.body() or None
            request = urllib.request.Request(
                f"{workers[worker_of(tenant)]}{self.path}", body, kept, method=self.command
            )
            try:
                with to.open(request, timeout=120) as answer:
                    self.reply(answer.status, answer.read(), answer.headers.get_content_type())
            except urllib.error.HTTPError as error:
                self.reply(error.code, error.read(), error.headers.get_content_type())

        do_GET = do_POST = _pass

    with _serving(Proxy) as url:
        yield url


@contextmanager
def receiver(statuses: list[int]) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """Address of a webhook that answers with these statuses in turn, then 204; and what came: headers and body."""
    came: list[tuple[dict[str, str], bytes]] = []

    class Receiver(_Quiet):
        def do_POST(self) -> None:
            came.append(({name.lower(): value for name, value in self.headers.items()}, self.body()))
            status = statuses.pop(0) if statuses else 204
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            came.append(({"redirected": self.path}, b""))
            self.reply(200, b"{}")

    with _serving(Receiver) as url:
        yield url, came


def asked(url: str, headers: dict[str, str], body: object = None, source: str = LISTED) -> tuple[int, Any]:
    """Status and JSON (or text) of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with opener(source).open(request, timeout=120) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()
