"""What every node of the pack has in common: its place in the menu, and the report that it shows on itself."""

from __future__ import annotations

import html

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

CATEGORY = "modular lora"


def show(node: type[io.ComfyNode], text: str) -> None:
    """Put a report on the node itself, where the front end draws it as HTML."""
    if node.hidden and node.hidden.unique_id:
        PromptServer.instance.send_progress_text(as_html(text), node.hidden.unique_id)


def show_on(node_id: str, text: str) -> None:
    """The same on a node that does not run at the moment."""
    PromptServer.instance.send_progress_text(as_html(text), node_id)


def as_html(text: str) -> str:
    """HTML that shows ``text`` as it is; names, metadata, prompts and captions in a report are anybody's words.

    Beside HTML's own characters, two notations are escaped that the front end makes links of: ``[[label|address]]``,
    where the label hides the address, and the ``__LNK0__`` that it puts in the place of one.
    """
    return html.escape(text).replace("[", "&#91;").replace("__LNK", "_&#95;LNK")


def blocked(why: str) -> ExecutionBlocker:
    """An output that stops every node which is connected to it, with this message."""
    return ExecutionBlocker(why)
