"""Block weights of a task LoRA: one factor a block, in the notation of the LoRA block weight extensions.

``"1,0.5,0,..."`` lists BASE (text encoder) and then every block that the LoRA touches, in model order (17 numbers for
an SD1.5 attention LoRA, 12 for SDXL, 58 for Flux), or every block of the model. ``"IN01:0.5, M00:0, BASE:1"`` names
blocks; the others stay at 1. Transformers with two kinds of blocks have DOUBLE00 and SINGLE00 on, others BLOCK00.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from ..errors import GuardError

_NAMES = {
    "input_blocks": "IN",
    "middle_block": "M",
    "output_blocks": "OUT",
    "double_blocks": "DOUBLE",  # Flux, Chroma, Hunyuan Video
    "double_layers": "DOUBLE",  # AuraFlow
    "double_stream_blocks": "DOUBLE",  # HiDream
    "single_blocks": "SINGLE",
    "single_layers": "SINGLE",
    "single_stream_blocks": "SINGLE",
    "joint_blocks": "BLOCK",  # SD3
    "transformer_blocks": "BLOCK",  # Qwen-Image, LTX Video
    "blocks": "BLOCK",  # Wan, PixArt, HunyuanDiT, Mochi, Cosmos
    "layers": "BLOCK",  # Lumina, Z-Image, OmniGen2
}
_BLOCK = re.compile(rf"^diffusion_model\.({'|'.join(_NAMES)})\.(?:block)?(\d+)\.")
_ORDER = tuple(dict.fromkeys(_NAMES.values()))


def block_of(key: str) -> str:
    """IN04, M00, OUT11, DOUBLE18, SINGLE37, BLOCK05 for a weight key; BASE for everything outside the blocks."""
    if not (found := _BLOCK.match(key)):
        return "BASE"
    stage = _NAMES[found[1]]
    return "M00" if stage == "M" else f"{stage}{int(found[2]):02d}"


def parse_block_weights(text: str, keys: Iterable[str], all_keys: Iterable[str], subject: str) -> Mapping[str, float]:
    """Factor by block for ``text``; ``keys`` are the weight keys that the LoRA touches, ``all_keys`` the model's.

    Raises GuardError for a wrong count, an unknown block or a value that is not a finite number.
    """
    if not text.strip():
        return {}
    touched, known = _ordered(keys), _ordered(all_keys)
    items = [item.strip() for item in text.split(",")]
    if all(":" in item for item in items):
        pairs = [(name.strip().upper(), value) for name, value in (item.split(":", 1) for item in items)]
        named = dict(pairs)
        if twice := next((name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])), None):
            raise GuardError(
                f"Block weights of {subject}: block {twice} is named twice; give one factor a block.",
                code="blocks.twice",
            )
        if unknown := sorted(set(named) - {"BASE", *known}):
            have = ", ".join(known)
            raise GuardError(
                f"Block weights of {subject}: no block {', '.join(unknown)}; this model has {have}.",
                code="blocks.unknown",
            )
        return {name: _number(value, subject) for name, value in named.items()}
    for blocks in (touched, known):
        if len(items) == len(blocks) + 1:
            return dict(zip(("BASE", *blocks), (_number(value, subject) for value in items), strict=True))
    raise GuardError(
        f"Block weights of {subject}: {len(items)} numbers given, {len(touched) + 1} expected "
        f"(BASE, {', '.join(touched)}), or {len(known) + 1} for every block of the model.",
        code="blocks.count",
    )


def _ordered(keys: Iterable[str]) -> tuple[str, ...]:
    blocks = {block_of(key) for key in keys} - {"BASE"}
    return tuple(sorted(blocks, key=lambda b: (_ORDER.index(b.rstrip("0123456789")), len(b), b)))


def _number(value: str, subject: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise GuardError(
            f"Block weights of {subject}: {value.strip()!r} is not a number; give one factor a block.",
            code="blocks.no-number",
        )
    return number
