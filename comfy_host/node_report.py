"""What every node of the pack has in common: its place in the menu, and what it shows on itself while it runs.

A text goes to the client that queued the prompt, and to nobody where it gave no id: ComfyUI sends what is for no client
to every page that is open, on which a node of the same id would show it. The policy cuts it down as it does what nodes
answer (answers.py).
"""

from __future__ import annotations

import html

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

from . import running
from .answers import left

CATEGORY = "modular lora"
EVENT = "modular_lora.report"  # of the websocket; its text is read as text


def show_progress(node: type[io.ComfyNode], line: str, more: str = "") -> None:
    """Put how far a node is on the node itself, where the front end draws it as HTML while the job runs.

    Args:
        node: The node that runs.
        line: Names no file, prompt or hash.
        more: What it has said so far, the newest first.
    """
    client, text = _client(), left(line, more)
    if client and text and node.hidden and node.hidden.unique_id:
        PromptServer.instance.send_progress_text(as_html(text), node.hidden.unique_id, client)


def leave(node: type[io.ComfyNode], line: str, more: str = "") -> None:
    """Leave a report on a node that ends without an answer; web/report.js shows it. See answers.answer."""
    if node.hidden and node.hidden.unique_id:
        _send(node.hidden.unique_id, "text", left(line, more), _client())


def show_run(node: str, line: str, more: str = "") -> None:
    """Put what a run says of itself above the report of a node that has ended. See answers.answer."""
    _send(node, "run", left(line, more), _client())


def show_above(node: str, text: str, client: str | None) -> None:
    """Put a text above the report of a node whose prompt has ended; ``client``: who queued it."""
    _send(node, "above", text, client)


def _send(node: str, key: str, text: str, client: str | None) -> None:
    if client and text:
        PromptServer.instance.send_sync(EVENT, {"node": node, key: text}, client)


def _client() -> str | None:
    """Who queued the prompt that runs; None: it gave no id, or no prompt runs."""
    prompt = running.current.get()
    return prompt.client if prompt is not None else None


def as_html(text: str) -> str:
    """HTML that shows ``text`` as it is; names, metadata, prompts and captions in a report are anybody's words.

    Beside HTML's own characters, two notations are escaped that the front end makes links of: ``[[label|address]]``,
    where the label hides the address, and the ``__LNK0__`` that it puts in the place of one.
    """
    return html.escape(text).replace("[", "&#91;").replace("__LNK", "_&#95;LNK")


def blocked(why: str | None) -> ExecutionBlocker:
    """An output that stops every node which is connected to it, with this message; None: without an error."""
    return ExecutionBlocker(why)
