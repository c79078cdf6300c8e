"""What every node of the pack has in common: its place in the menu, and what it shows on itself while it runs."""

from __future__ import annotations

import html

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

CATEGORY = "modular lora"
EVENT = "modular_lora.report"  # of the websocket; its text is read as text


def show_progress(node: type[io.ComfyNode], text: str) -> None:
    """Put how far a node is on the node itself, where the front end draws it as HTML while the job runs."""
    if node.hidden and node.hidden.unique_id:
        PromptServer.instance.send_progress_text(as_html(text), node.hidden.unique_id)


def leave(node: type[io.ComfyNode], text: str) -> None:
    """Leave a report on a node that ends without an answer (answers.py); web/report.js shows it."""
    if node.hidden and node.hidden.unique_id:
        server = PromptServer.instance
        server.send_sync(EVENT, {"node": node.hidden.unique_id, "text": text}, server.client_id)


def show_above(node: str, text: str, client: str | None) -> None:
    """Put a text above the report of a node that has ended; where there is no client, nobody reads it."""
    if client:
        PromptServer.instance.send_sync(EVENT, {"node": node, "above": text}, client)


def show_run(node: str, text: str) -> None:
    """Put what a run says of itself above the report of a node that has ended."""
    PromptServer.instance.send_sync(EVENT, {"node": node, "run": text}, PromptServer.instance.client_id)


def as_html(text: str) -> str:
    """HTML that shows ``text`` as it is; names, metadata, prompts and captions in a report are anybody's words.

    Beside HTML's own characters, two notations are escaped that the front end makes links of: ``[[label|address]]``,
    where the label hides the address, and the ``__LNK0__`` that it puts in the place of one.
    """
    return html.escape(text).replace("[", "&#91;").replace("__LNK", "_&#95;LNK")


def blocked(why: str | None) -> ExecutionBlocker:
    """An output that stops every node which is connected to it, with this message; None: without an error."""
    return ExecutionBlocker(why)
