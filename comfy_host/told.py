"""Where it can be read what is known of a prompt's images: on the Guard node, over HTTP, and in the files themselves.

Over HTTP it is told in `/history`, in the answer of the node that saved or showed them, and at a route of ours.

Noted is what comes to every node that writes or shows, before it runs, so that stock nodes and those of other packs are
covered. What a file says of itself, anybody who has the file can change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

from ..modular_lora.guard import activity
from ..modular_lora.provenance import attested, ledger
from ..modular_lora.provenance.attestation import Attestation
from ..modular_lora.provenance.ledger import Known
from ..modular_lora.provenance.verdict import verdict
from ..modular_lora.util import plain_json
from ..modular_lora.util.cache import Cache
from ..modular_lora.util.hashing import hash_file
from ..operators.graph import NodeFacts
from . import model_folders, running
from .answers import beside, how_much
from .enforcement import policy as policies
from .image_values import image_values
from .node_report import show_above

KEY = "modular_lora_images"  # of a prompt's extra_pnginfo, which Save Image writes into PNG files
OWN = frozenset((KEY, attested.KEY))
ROUTE = "/modular_lora/images/{prompt_id}"
OURS = frozenset(("ModularLoraSaveImage", "ModularLoraSaveGated"))  # of our nodes those that write
FILMS = frozenset(("SaveAnimatedPNG", "SaveAnimatedWEBP", "SaveVideo", "SaveWEBM"))  # all frames go into one file
SAVES = FILMS | {"SaveImage"}  # ComfyUI's own; they get an entry also where the client sent no extra_pnginfo at all
FILE = ("filename", "subfolder", "type")  # of an entry of `images` as ComfyUI's own nodes give it
BRIEF = ("node", "type", "status", "edits", "pixels_sha256", "pixels_size")  # of `Shown`: nothing of a prompt
MOST_ENTRIES = 64  # images of one node of which its files say something: every file of a batch holds all entries
MOST_TOLD = 512  # images of one prompt that are told one by one, and frames of which a film says something

_prompts: Cache[str, Ended] = Cache(256)  # by prompt id


@dataclass(frozen=True)
class Shown:
    """An image that came to a node which writes or shows it.

    Attributes:
        node: The node's id.
        type: Its type.
        status: See `ledger.Known.status`.
        edits: Types of the nodes that edited it since a guarded run made it.
        through: Types of the nodes it passed through and for which nobody vouches.
        pixels_sha256: Of its 8-bit pixels, h w c, as Save Image rounds them.
        pixels_size: Width, height and channels.
        activity: What the safety LoRAs' activity says of its prompt, in words; "" where it is not known.
    """

    node: str
    type: str
    status: str
    edits: tuple[str, ...]
    through: tuple[str, ...]
    pixels_sha256: str
    pixels_size: tuple[int, ...]
    activity: str = ""


@dataclass(frozen=True)
class Written:
    """A file that a node wrote into the output folder, of the images that came to it.

    Attributes:
        subfolder: Of the output folder.
        filename: Its name there.
        sha256: Of the whole file, as the node left it: by this a film is known again, whose pixels its codec changes.
    """

    subfolder: str
    filename: str
    sha256: str


@dataclass
class Wrote:
    """A node which writes or shows images.

    Attributes:
        node: Its id.
        type: Its type.
        said: Each status, and how many of its images have it.
        files: The files that it wrote, where it was done with them when it returned.
    """

    node: str
    type: str
    said: dict[str, int]
    files: tuple[Written, ...] = ()


@dataclass(frozen=True)
class Ended:
    """What is left of a prompt that has ended: who queued it, its images, and the nodes that they came to."""

    client: str | None
    shown: tuple[Shown, ...]
    wrote: tuple[Wrote, ...]


def register() -> None:
    """Add the route; a server without routes (a test's) has none."""
    if (routes := getattr(PromptServer.instance, "routes", None)) is not None:
        routes.get(ROUTE)(answer)


async def answer(request: web.Request) -> web.Response:
    """What is known of a prompt's images, for the client that queued it and names itself by ``?client_id=``.

    ComfyUI's ``/history`` shows that id to everybody, so the policy cuts this down as it does the verdicts there.
    """
    prompt, told = _prompts.get(request.match_info["prompt_id"]), how_much()
    if told == "none":
        return web.json_response({"error": "The operator's policy tells nothing here (history.verdict)."}, status=404)
    if prompt is None or not prompt.client or request.query.get("client_id") != prompt.client:
        said = "No prompt of this id that this client_id queued has ended here, or it held no guard."
        return web.json_response({"error": said}, status=404)
    left = {"images": list(map(asdict, prompt.shown)), "nodes": list(map(asdict, prompt.wrote))}
    if told == "brief":
        left["images"] = [{key: one[key] for key in BRIEF} for one in left["images"]]
    return web.json_response({"prompt_id": request.match_info["prompt_id"]} | left)


def without_own(extra_data: Mapping[str, Any]) -> dict[str, Any]:
    """What a client sent along, without what would pass for a record of ours; in a PNG a key ends at a NUL."""
    sent = extra_data.get("extra_pnginfo")
    if not isinstance(sent, Mapping):
        return dict(extra_data)
    kept = {key: value for key, value in sent.items() if str(key).partition("\0")[0] not in OWN}
    return {**extra_data, "extra_pnginfo": kept}


def note(
    prompt: running.Prompt, node: str, name: str, inputs: Mapping[str, list]
) -> list[tuple[Known, dict[str, Any]]]:
    """What is known of every image that came to a node which writes or shows, with the hash of its pixels."""
    found = [(ledger.known(image), attested.pixels(_pixels(image))) for image in _images(inputs)]
    prompt.shown += [
        Shown(
            node,
            name,
            known.status,
            known.edits,
            known.through,
            said["pixels_sha256"],
            tuple(said["pixels_size"]),
            activity.in_words([known.run]),
        )
        for known, said in found
    ]
    del prompt.shown[MOST_TOLD:]
    for known, said in found:
        judged = known.run is not None and any(one.prompt for one in known.run.activity.values())
        prompt.judged[said["pixels_sha256"]] = known.run if judged else None
    if found:
        prompt.wrote.append(Wrote(node, name, dict(Counter(known.status for known, _ in found))))
    return found


def note_files(prompt: running.Prompt, node: str, shown_on_page: Any) -> None:
    """What a node that was noted wrote, by what it tells the page: {key: [{filename, subfolder, type}]}."""
    wrote = next((one for one in reversed(prompt.wrote) if one.node == node), None)
    if wrote is None or not isinstance(shown_on_page, Mapping):
        return
    parts = (part for part in shown_on_page.values() if isinstance(part, list | tuple))
    files = [one for part in parts for one in part if isinstance(one, Mapping) and one.get("type") == "output"]
    found = (_written(str(one.get("subfolder", "")), str(one.get("filename", ""))) for one in files)
    wrote.files = tuple(one for one in dict.fromkeys(found) if one is not None)


def with_verdicts(found: list[tuple[Known, dict[str, Any]]], core: bool, shown_on_page: Any) -> Any:
    """What a node that was noted tells the page, with a verdict on each image, where it has a file for each of them.

    A film has one file of many frames: what is known of these is told at the route. That the files are in the images'
    order is known of ComfyUI's own nodes (``core``) alone.
    """
    files = shown_on_page.get("images") if isinstance(shown_on_page, Mapping) else None
    if not found or not isinstance(files, list | tuple) or len(files) != len(found):
        return shown_on_page
    names = [{key: one[key] for key in FILE} if core else None for one in files]
    return beside(shown_on_page, [verdict(i, known, file=names[i]) for i, (known, _) in enumerate(found)])


def _written(subfolder: str, filename: str) -> Written | None:
    """A file of the output folder; None: it is none, or cannot be read."""
    folder = model_folders.output_folder().resolve()
    try:
        path = (folder / subfolder / filename).resolve()
        return Written(subfolder, filename, hash_file(path)) if folder in path.parents else None
    except (OSError, ValueError):
        return None


def _images(inputs: Mapping[str, list]) -> Iterator[torch.Tensor]:
    for kind, batch in (pair for some in inputs.values() for value in some for pair in image_values(value)):
        if kind == "image" and batch.ndim == 4 and batch.shape[-1] in (1, 3, 4):
            yield from batch


def _pixels(image: torch.Tensor) -> np.ndarray:
    return np.clip(image.detach().float().cpu().numpy() * 255.0, 0, 255).astype(np.uint8)


def with_entry(
    found: list[tuple[Known, dict[str, Any]]],
    name: str,
    facts: NodeFacts,
    inputs: dict[str, list],
    options: dict[str, Any],
) -> tuple[dict[str, list], dict[str, Any]]:
    """The inputs and hidden inputs of a node, with an entry in its extra_pnginfo for each image that came to it.

    Only this node's copy has the entry. Nodes whose client sent no extra_pnginfo get none, except ComfyUI's own that
    save: others may look for a workflow in it. A film has the key also where it has no entry, as Save Video otherwise
    copies that of a video file that was loaded.
    """
    told = policies.records_activity()
    film = facts.core and name in FILMS
    entries = {
        said["pixels_sha256"]: plain_json.finite(known.record(told) | {"said": known.status} | said)
        for known, said in found[: MOST_TOLD if film else MOST_ENTRIES]
    }
    if facts.ours or not (entries or film):  # our own nodes write a record of their own
        return inputs, options
    own = facts.core and name in SAVES
    if "extra_pnginfo" in inputs:
        inputs = {**inputs, "extra_pnginfo": [_with(one, entries, own) for one in inputs["extra_pnginfo"]]}
    if hidden := options.get("hidden_inputs"):
        options = {**options, "hidden_inputs": _with_hidden(hidden, entries, own)}
    if hidden := (options.get("v3_data") or {}).get("hidden_inputs"):  # 0.33.0
        options = {**options, "v3_data": {**options["v3_data"], "hidden_inputs": _with_hidden(hidden, entries, own)}}
    return inputs, options


def _with_hidden(hidden: Mapping[Any, Any], entries: dict[str, Any], own: bool) -> dict[Any, Any]:
    """Hidden inputs of a V3 node."""
    key = io.Hidden.extra_pnginfo
    return {**hidden, key: _with(hidden[key], entries, own)} if key in hidden else dict(hidden)


def _with(extra: Any, entries: dict[str, Any], own: bool) -> Any:
    return {**(extra or {}), KEY: entries} if isinstance(extra, Mapping) or (own and extra is None) else extra


def end(prompt: running.Prompt) -> None:
    """Keep what is known of a prompt's images, and show it on its Guard nodes, as far as the policy lets it stand."""
    if not prompt.followed:
        return
    _prompts.put(prompt.id, Ended(prompt.client, tuple(prompt.shown), tuple(prompt.wrote)))
    told = how_much()
    if prompt.shown and told != "none":
        said = in_words(prompt.wrote, list(prompt.judged.values())) if told == "full" else in_brief(prompt.wrote)
        for node in prompt.holding(running.GUARDS):
            show_above(node, said, prompt.client)


def in_brief(wrote: list[Wrote]) -> str:
    """How many of the images that came to nodes which write or show are attested, and nothing else."""
    counts = _counts(wrote)
    guarded = sum(n for status, n in counts.items() if status.startswith("guarded"))
    return f"{guarded} of {counts.total()} images attested"


def _counts(wrote: list[Wrote]) -> Counter[str]:
    """How many images have each status."""
    return sum((Counter(one.said) for one in wrote), Counter())


def in_words(wrote: list[Wrote], judged: list[Attestation | None]) -> str:
    """One line for each status: how many images, and which nodes they came to; then what is known of their prompts."""
    counts = _counts(wrote)
    lines = []
    for status, n in counts.items():
        nodes = dict.fromkeys(f"{one.type} {one.node}" for one in wrote if status in one.said)
        lines.append(f"{n} of {counts.total()} images ({', '.join(nodes)}): {status}")
    return "\n".join(filter(None, (*lines, activity.in_words(judged))))
