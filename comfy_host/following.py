"""Every node of a prompt as it runs, where the prompt holds a guard or a policy is in force: what it makes of what.

Two functions of ComfyUI are wrapped, and nothing of another pack: ``execution.PromptExecutor.execute_async`` tells
which prompt runs, ``execution.get_output_data`` is what every node runs through. A node that does not run again keeps
what was remembered of its outputs, as that is known by their content.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..modular_lora.errors import GuardError
from ..modular_lora.provenance import edits
from ..modular_lora.provenance.edits import Row
from . import pack_edits, pack_samplers, running, told, weightings
from .enforcement import node_info
from .enforcement import policy as policies
from .image_values import image_values

# ComfyUI's node types that make images, latents and masks of what comes to them over links and of nothing else; each
# is run in tests/comfy/provenance/test_edits.py. Changes of colour (ImageInvert, ImageBlend) are left out on purpose:
# they can bring out what nobody sees in the image that was made.
EDITS = frozenset((
    "CropMask",
    "FeatherMask",
    "GrowMask",
    "ImageBatch",
    "ImageBlur",
    "ImageCompositeMasked",
    "ImageCrop",
    "ImageFlip",
    "ImagePadForOutpaint",
    "ImageRotate",
    "ImageScale",
    "ImageScaleBy",
    "ImageScaleToMaxDimension",
    "ImageScaleToTotalPixels",
    "ImageSharpen",
    "ImageStitch",
    "ImageToMask",
    "ImageUpscaleWithModel",
    "InvertMask",
    "LatentBatch",
    "LatentComposite",
    "LatentCompositeMasked",
    "LatentConcat",
    "LatentCrop",
    "LatentCut",
    "LatentUpscale",
    "LatentUpscaleBy",
    "MaskComposite",
    "MaskToImage",
    "ResizeAndPadImage",
    "SolidMask",
    "TrimVideoLatent",
    "VAEEncode",
    "VAEEncodeForInpaint",
    "VAEEncodeTiled",
))  # fmt: skip


def register() -> None:
    """Wrap the two functions, once."""
    import execution  # ComfyUI's top-level module

    if not hasattr(execution.get_output_data, "follows"):
        execution.get_output_data = _node(execution.get_output_data)
        execution.PromptExecutor.execute_async = _prompt(execution.PromptExecutor.execute_async)
    told.register()


def _prompt(original: Callable) -> Callable:
    @functools.wraps(original)
    async def execute_async(self, prompt, prompt_id, extra_data=None, *args, **kwargs):
        extra_data = told.without_own(extra_data or {})
        now = running.Prompt(prompt_id, extra_data.get("client_id"), prompt, *_policy())
        token = running.current.set(now)
        try:
            return await original(self, prompt, prompt_id, extra_data, *args, **kwargs)
        finally:
            running.current.reset(token)
            told.end(now)

    return execute_async


def _policy() -> tuple[bool, bool]:
    """Whether a policy is in force, and whether it requires a gate; one that cannot be read counts as both."""
    try:
        policy = policies.current()
    except GuardError:
        return True, True
    return (False, False) if policy is None else (True, policy.gate.required)


def _node(original: Callable) -> Callable:
    @functools.wraps(original)
    async def get_output_data(prompt_id, unique_id, obj, input_data_all, *args, **kwargs):
        prompt = running.current.get()
        if prompt is None or not prompt.followed:
            return await original(prompt_id, unique_id, obj, input_data_all, *args, **kwargs)
        kind = type(obj)
        name = _name(prompt, unique_id, kind)
        facts = node_info.facts(kind)
        edits_only = name in EDITS if facts.core else pack_edits.vouched(name, kind)
        samples = pack_samplers.vouched(name, kind, input_data_all)
        given = [rows for some in input_data_all.values() for value in some for rows in _rows(value) if facts.outputs]
        noted = facts.is_output and (name in told.OURS or not facts.ours)  # not what a gate takes out
        if noted:
            found = told.note(prompt, unique_id, name, input_data_all)
            input_data_all, kwargs = told.with_entry(found, name, facts, input_data_all, kwargs)
        inside = edits.Inside(name, [edits.source(row) for rows in given for row in rows]) if samples else None
        token = running.inside.set(inside)
        try:
            with weightings.watching(name, facts, input_data_all) as texts:
                made = await original(prompt_id, unique_id, obj, input_data_all, *args, **kwargs)
        finally:
            running.inside.reset(token)

        def after(outputs: Any) -> None:
            if not facts.ours:  # ours remember themselves what they sample, decode and judge
                edits.follow(name, edits_only or samples, given, _rows(outputs), inside.ran if inside else ())

        outputs, shown_on_page, expands, later = made
        if noted:
            told.note_files(prompt, unique_id, shown_on_page)
            if not facts.ours:  # ours have answered with theirs
                shown_on_page = told.with_verdicts(found, facts.core, shown_on_page)
        if later:  # what a coroutine encodes is not watched, and stays as it is known
            outputs = [_then(one, after) if isinstance(one, asyncio.Task) else one for one in outputs]
            return outputs, shown_on_page, expands, later
        if not expands:  # else the nodes that it expands to run by themselves
            after(outputs)
            texts.end(outputs)
        return outputs, shown_on_page, expands, later

    vars(get_output_data)["follows"] = True
    return get_output_data


def _name(prompt: running.Prompt, unique_id: str, kind: type) -> str:
    """A node's type, which the graph calls it by; of nodes that others expand to, what its class goes by."""
    said = prompt.graph.get(unique_id, {}).get("class_type")
    names = node_info.names(kind) or [kind.__name__]
    return said if said in names else names[0]


def _then(task: asyncio.Task, after: Callable[[Any], None]) -> asyncio.Task:
    async def followed() -> Any:
        result = await task
        after(getattr(result, "result", result.get("result") if isinstance(result, Mapping) else result))
        return result

    return asyncio.create_task(followed())


def _rows(value: Any) -> Iterator[tuple[Row, ...]]:
    """The rows of every image, latent and mask in a value."""
    for kind, tensor in image_values(value):
        yield edits.rows(tensor, kind)
