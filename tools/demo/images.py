"""Images side by side, and what is written inside them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...modular_lora.util import atomic

ENLARGE = 3
LETTER = 6  # pixels of a letter's width
GAP, LABEL, NAMES = 10, 24, 120
INK, PAPER, MARK = (30, 33, 38), (255, 255, 255), (190, 60, 45)


def attestation(png: bytes) -> dict[str, Any]:
    """What the pack's save node wrote into a PNG: the JSON objects in its text entries that name the pack."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        entries = dict(getattr(image, "text", None) or {})
    found = {key: _json(value) for key, value in entries.items() if "modular" in key.lower()}
    return {key: value for key, value in found.items() if isinstance(value, dict)}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def comparison(rows: Sequence[tuple[str, bool]], columns: Mapping[str, Sequence[bytes]], destination: Path) -> None:
    """One image: a row per prompt (name, suppressed), a column per arm."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    tiles = {name: [_open(png) for png in images] for name, images in columns.items()}
    side = next(iter(tiles.values()))[0].width
    size = (NAMES + len(tiles) * (side + GAP) + GAP, LABEL + len(rows) * (side + GAP))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (name, images) in enumerate(tiles.items()):
        left = NAMES + column * (side + GAP)
        draw.multiline_text((left, 4), _wrap(name, side), fill=INK, font=font, spacing=2)
        for row, image in enumerate(images):
            canvas.paste(image, (left, LABEL + row * (side + GAP)))
    for row, (prompt, suppressed) in enumerate(rows):
        top = LABEL + row * (side + GAP) + side // 2 - 12
        kind = "suppressed" if suppressed else "kept"
        draw.multiline_text(
            (GAP, top), f"{_wrap(prompt, NAMES)}\n({kind})", fill=MARK if suppressed else INK, font=font
        )
    with atomic.replacing(destination) as part:
        canvas.save(part, format="PNG")


def _open(png: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        plain = image.convert("RGB")
    return plain.resize((plain.width * ENLARGE, plain.height * ENLARGE), Image.Resampling.BICUBIC)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, max(8, width // LETTER))[:2])
