"""Which layers of a network a training takes, by the names that ComfyUI's classes have for its parts.

Most networks are blocks of one kind in a row, with what reads image, text and time before them. A U-Net is told by
its transformers standing inside of other blocks; its layers are chosen as sd-scripts chooses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .options import Objective, Target

_TRANSFORMER = re.compile(r"\.transformer_blocks\.|\.proj_(in|out)$")
_RESIDUAL = re.compile(r"\.(in_layers|out_layers|emb_layers|skip_connection|op|conv)(\.|$)")
_BLOCK = re.compile(r"^(language_model\.)?\w*(blocks|layers|refiner)\.")  # of any other; HiDream O1 is a language model
_ATTENTION = re.compile(
    r"(^|\.)(attn|attn[12]|\w+_attn|(\w+_)?attention|kv_mapper)\."
    r"|^blocks\.\d+\.(q|k|v|attn_out)$"  # CogVideoX
)
_CROSS = re.compile(  # where the text enters
    r"\.(attn2|cross_att(n|ention)|kv_mapper)\."  # from image to text, and what makes the text's keys and values
    r"|\.txt_attn\.|\.context_block\.attn\."  # the text's half of a joint attention: Flux, SD3,
    r"|\.attn\.(add_[qkv]_proj|to_add_out)(\.|$)"  # Qwen-Image,
    r"|\.attn1\.to_(q|k|v|out)_t(\.|$)"  # HiDream,
    r"|\.attn\.w1[qkvo]$|\.attn\.(qkv|proj)_y$"  # AuraFlow, Mochi
)


def select(names: Mapping[str, str], target: Target) -> dict[str, str]:
    """The part of ``names`` (module path -> layer name in files) that a target takes.

    cross-attention: where the text enters; attention: all attention; linear: all of the blocks (of a U-Net its
    transformers with proj_in and proj_out); conv: everything (of a U-Net the residual, down- and upsampling blocks as
    well). Where no attention of text is told apart, as in Lumina 2, cross-attention takes all attention.
    """
    rules: dict[str, Callable[[str], object]]
    if _is_unet(names):
        rules = {
            "cross-attention": re.compile(r"\.attn2\.").search,
            "attention": re.compile(r"\.attn[12]\.").search,
            "linear": _TRANSFORMER.search,
            "conv": lambda path: _TRANSFORMER.search(path) or _RESIDUAL.search(path),
        }
    else:
        crosses = tells_text_apart(names)
        attention = lambda path: _BLOCK.search(path) and _ATTENTION.search(path)  # noqa: E731
        rules = {
            "cross-attention": (lambda path: _BLOCK.search(path) and _CROSS.search(path)) if crosses else attention,
            "attention": attention,
            "linear": _BLOCK.search,
            "conv": lambda path: True,
        }
    return {path: name for path, name in names.items() if rules[target](path)}


def tells_text_apart(names: Mapping[str, str]) -> bool:
    """Whether some layers of a network's attention are the text's alone."""
    return _is_unet(names) or any(_BLOCK.search(path) and _CROSS.search(path) for path in names)


def erasing(names: Mapping[str, str], target: Target, objective: Objective) -> dict[str, str]:
    """The part of what ``target`` takes that an erasure trains.

    esd-x and SDD: cross-attention; esd-u: all but it; LECO: all.
    """
    chosen, crossing = select(names, target), select(names, "cross-attention")
    if objective in ("esd-x", "sdd"):
        return {path: name for path, name in chosen.items() if path in crossing}
    if objective == "esd-u":
        return {path: name for path, name in chosen.items() if path not in crossing}
    return chosen


def _is_unet(names: Mapping[str, str]) -> bool:
    return any(".transformer_blocks." in path for path in names)
