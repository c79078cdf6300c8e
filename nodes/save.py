"""Save Attested Image and Save Image (Guarded): files that say which run made exactly these pixels, and which gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.saving import ENDINGS, Style, save
from ..modular_lora.errors import GuardError
from ..modular_lora.provenance.ledger import EDITED, Known, known
from ..modular_lora.provenance.verdict import refused, verdict
from .search_words import found_by
from .sockets import rarely

UNATTESTED, UNGATED = "unattested", "not gated"
FLAGGED = "flagged and left as they are"
REMEDY = (
    "connect Safety Gate behind Guarded VAE Decode and this node behind the gate, with nothing between, and let the "
    "gate act on what it flags"
)


class SaveAttestedImage(io.ComfyNode):
    """PNG files that say whether a guarded run made exactly these pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraSaveImage",
            **found_by("save image", "save png", "attestation", "provenance", "proof"),
            display_name="Save Attested Image",
            category=f"{CATEGORY}/sample",
            description="Saves PNG files with the attestation in their text; an image that a guarded run did "
            "not make is saved as unattested, or refused. PNG text can be forged by anyone who has the file.",
            inputs=[
                io.Image.Input("images", tooltip="Images straight from Guarded VAE Decode."),
                io.String.Input("filename_prefix", default="guarded", tooltip="File name prefix, as in Save Image."),
                io.Combo.Input(
                    "unattested",
                    ["save and say so", "refuse"],
                    default="save and say so",
                    tooltip="What to do with an image that no guarded run made.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, filename_prefix, unattested) -> io.NodeOutput:
        found = [known(image) for image in images]
        missing = sum(not k.guarded for k in found)
        if missing and unattested == "refuse":
            raise GuardError(
                f"{missing} of {len(found)} images are {EDITED}; connect Guarded VAE Decode directly.",
                code="save.unattested",
            )
        saved = save(cls, images, found, filename_prefix, Style())
        said = f"{len(found) - missing} of {len(found)} images attested{on_merged(found)}"
        said += f"; {missing} {EDITED}" * bool(missing)
        return _saved(said + saved.credentials, found, saved.files)


class SaveGatedImage(io.ComfyNode):
    """Files of images that a guarded run made and a gate let through, and of no others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraSaveGated",
            **found_by("save image", "safe save", "nsfw", "moderation", "jpeg", "webp"),
            display_name="Save Image (Guarded)",
            category=f"{CATEGORY}/gate",
            description="Saves only images that a guarded run made and a gate judged, with the record of both in the "
            "file. Such a record can be forged by anyone who has the file, unless an operator's policy signs it.",
            inputs=rarely(
                [
                    io.Image.Input("images", tooltip="Images straight from Safety Gate or Guarded Sample and Gate."),
                    io.String.Input("filename_prefix", default="gated", tooltip="File name prefix, as in Save Image."),
                    io.Combo.Input(
                        "format",
                        list(ENDINGS),
                        default="png",
                        tooltip="All carry the record; jpeg and webp have the workflow in a .json file beside them.",
                    ),
                    io.Int.Input(
                        "quality", default=95, min=1, max=100, tooltip="Quality of jpeg and webp; png has none."
                    ),
                    io.Combo.Input(
                        "unfit",
                        ["refuse", "skip and say so"],
                        default="refuse",
                        tooltip="What to do where an image is unattested, not gated, or flagged and left as it is: "
                        "refuse saves nothing of the batch; skip saves the others.",
                    ),
                    io.Boolean.Input(
                        "save_flagged",
                        default=False,
                        tooltip="Also save images that the gate flagged and only reported.",
                    ),
                ],
                "quality",
            ),
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, filename_prefix, format, quality, unfit, save_flagged) -> io.NodeOutput:
        found = [known(image) for image in images]
        problems = [_problem(k, save_flagged) for k in found]
        counts = ", ".join(f"{n} {problem}" for problem, n in Counter(filter(None, problems)).items())
        if counts and unfit == "refuse":
            raise GuardError(f"{counts} of {len(found)} images: nothing is saved; {REMEDY}.", code="save.refused")
        fit = [i for i, problem in enumerate(problems) if problem is None]
        saved = save(cls, [images[i] for i in fit], [found[i] for i in fit], filename_prefix, Style(format, quality))
        skipped = f"; left out: {counts}" if counts else ""
        merged = on_merged(found[i] for i in fit)
        said = f"{len(fit)} of {len(found)} images saved, attested and gated{merged}{skipped}"
        return _saved(said + saved.credentials, found, saved.files, problems)


def _saved(
    line: str,
    found: Sequence[Known],
    written: Sequence[Mapping[str, str]],
    problems: Sequence[str | None] = (),
) -> io.NodeOutput:
    """What both nodes answer: ``images`` as ComfyUI's Save Image has them, the files in order, and all verdicts.

    ``problems``: why each image was left out, None where it was written; none: all were written.
    """
    problems = problems or [None] * len(found)
    files, verdicts = iter(written), []
    for i, (one, problem) in enumerate(zip(found, problems, strict=True)):
        verdicts.append(
            verdict(
                i,
                one,
                file=next(files) if problem is None else None,
                withheld=problem is not None,
                refusal=refused("unfit", "save.refused", problem, REMEDY) if problem else None,
            )
        )
    edited = ", ".join(dict.fromkeys(name for one in found for name in one.edits))
    passed = ", ".join(dict.fromkeys(name for one in found for name in one.through))
    more = [f"edited on the way by {edited}"] * bool(edited)
    more += [f"unattested ones passed through {passed}"] * bool(passed)
    return io.NodeOutput(ui=answer(line, "\n".join(more), verdicts, images=list(written)))


def on_merged(found: Iterable[Known]) -> str:
    """How many of the attested images are of a base with merged LoRAs or models, in words; "" where none is."""
    merged = sum(k.guarded and k.run is not None and k.run.base_had_merged_loras for k in found)
    return f", {merged} of them on a merged base" if merged else ""


def _problem(image: Known, save_flagged: bool) -> str | None:
    """Why an image may not be saved, or None."""
    if image.run is None:
        return UNATTESTED
    if image.gate is None:
        return UNGATED
    return FLAGGED if image.gate.flagged and not (image.gate.changed or save_flagged) else None
