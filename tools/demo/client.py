"""A small client of ComfyUI's HTTP and websocket interface."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .server import DIRECT

Prompt = dict[str, dict[str, Any]]
PATIENCE = 20  # seconds in which the record of a finished run must be there
ENDINGS = {"execution_success", "execution_error", "execution_interrupted"}


class ClientError(RuntimeError):
    """The server did not do what was asked."""

    code: str = "client"

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        if code:
            self.code = code


class Rejected(ClientError):
    """The graph was refused before anything ran."""

    code = "client.rejected"

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status, self.body = status, body
        super().__init__(f"graph refused (HTTP {status}): {'; '.join(self.reasons()) or body}")

    def errors(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(node id, error) for every error of every node."""
        for node, entry in (self.body.get("node_errors") or {}).items():
            for error in entry.get("errors", []):
                yield node, error

    def types(self) -> set[str]:
        return {str(error.get("type")) for _, error in self.errors()}

    def reasons(self) -> list[str]:
        found = [f"node {node}: {error.get('message')}: {error.get('details')}" for node, error in self.errors()]
        general = self.body.get("error") or {}
        return found or [f"{general.get('message')} {general.get('details') or ''}".strip()]


class Failed(ClientError):
    """A node raised while the graph ran."""

    code = "client.failed"

    def __init__(self, data: dict[str, Any]) -> None:
        self.node, self.kind = str(data.get("node_id")), str(data.get("node_type"))
        self.exception, self.reason = str(data.get("exception_type")), str(data.get("exception_message")).strip()
        super().__init__(f"node {self.node} ({self.kind}): {self.reason}")


class Interrupted(ClientError):
    """The run was interrupted through the server."""

    code = "client.interrupted"


@dataclass(frozen=True)
class Event:
    """Progress within a node: `value` of `maximum` steps; both 0 when the node has just begun."""

    node: str
    value: int = 0
    maximum: int = 0


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    seconds: float
    messages: list[Any] = field(default_factory=list)

    def images(self, node: str) -> list[dict[str, str]]:
        return self.outputs.get(node, {}).get("images", [])

    def text(self, node: str) -> str:
        return "\n".join(map(str, self.outputs.get(node, {}).get("text", [])))


class Client:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, timeout: float = 60) -> bytes:
        return self._open(urllib.request.Request(f"{self.url}{path}"), timeout)

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post_json(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = self._open(request)
        return json.loads(answer) if answer else {}

    def _open(self, request: urllib.request.Request, timeout: float = 60) -> bytes:
        try:
            with DIRECT.open(request, timeout=timeout) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ClientError(
                f"{request.full_url}: no answer ({error}); is the server still running?", code="client.no-answer"
            ) from error

    def submit(self, prompt: Prompt, client_id: str | None = None) -> str:
        """Queue a graph and give its id; a graph of which any part is refused counts as refused."""
        body: dict[str, Any] = {"prompt": prompt, **({"client_id": client_id} if client_id else {})}
        try:
            answer = self.post_json("/prompt", body)
        except urllib.error.HTTPError as error:
            raise Rejected(error.code, _json_or_text(error.read())) from error
        if answer.get("node_errors"):
            self.cancel(answer["prompt_id"])
            raise Rejected(200, answer)
        return str(answer["prompt_id"])

    def cancel(self, prompt_id: str) -> None:
        self.post_json("/queue", {"delete": [prompt_id]})
        self.interrupt()

    def interrupt(self) -> None:
        self.post_json("/interrupt", {})

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The record of a finished run, which the server writes shortly after its last event."""
        deadline = time.monotonic() + PATIENCE
        while True:
            record = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if record is not None:
                return dict(record)
            if time.monotonic() > deadline:
                raise ClientError(f"run {prompt_id}: no record in the history after {PATIENCE} s")
            time.sleep(0.05)

    def image(self, reference: dict[str, str]) -> bytes:
        return self.get(f"/view?{urllib.parse.urlencode(reference)}")

    def run(self, prompt: Prompt, on_event: Callable[[Event], None] | None = None, timeout: float = 1800) -> Result:
        """Queue a graph, follow it over the websocket, and give what it left."""
        began = time.monotonic()
        try:
            prompt_id = asyncio.run(asyncio.wait_for(self._follow(prompt, on_event or _ignore), timeout))
        except (asyncio.TimeoutError, TimeoutError) as error:
            self.interrupt()
            raise ClientError(
                f"the graph did not finish within {timeout:.0f} s and was interrupted: end other programs that use the "
                "processor, or draw with fewer steps.",
                code="client.too-slow",
            ) from error
        record = self.history(prompt_id)
        messages = record.get("status", {}).get("messages", [])
        return Result(prompt_id, record.get("outputs", {}), time.monotonic() - began, messages)

    async def _follow(self, prompt: Prompt, on_event: Callable[[Event], None]) -> str:
        import aiohttp

        client_id = uuid.uuid4().hex
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt_id = await asyncio.to_thread(self.submit, prompt, client_id)
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                if self._handle(event.get("type"), event.get("data") or {}, prompt_id, on_event):
                    return prompt_id
        raise ClientError("the server closed the connection before the graph had finished; see its log")

    def _handle(self, kind: str, data: dict[str, Any], prompt_id: str, on_event: Callable[[Event], None]) -> bool:
        """True when this event ends the run."""
        if data.get("prompt_id") != prompt_id:
            return False
        if kind == "execution_error":
            raise Failed(data)
        if kind == "execution_interrupted":
            raise Interrupted(f"run {prompt_id} was interrupted at node {data.get('node_id')}")
        if kind == "executing" and data.get("node"):
            on_event(Event(str(data["node"])))
        if kind == "progress":
            on_event(Event(str(data.get("node")), int(data.get("value", 0)), int(data.get("max", 0))))
        return kind in ENDINGS


def _ignore(event: Event) -> None:
    del event


def _json_or_text(body: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(body))
    except ValueError:
        return {"error": {"message": body.decode("utf-8", "replace")[:500]}}
