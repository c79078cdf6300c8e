"""What a CLIP's tokenizer makes of a text that is taken literally, and which of it are tokens.

ComfyUI reads (words:1.2) as words of another weight, unless the tokenizer is given disable_weights=True. Those that put
a prompt into a chat template (Qwen-Image, Z-Image, Flux 2) set it themselves and cannot be given it a second time; some
hand it on to one of their encoders alone, and some drop it. What all of these take is ComfyUI's own escape: \\( and \\)
stand for the brackets themselves. A few others (LongCat, Lens) know neither weights nor escapes.
"""

from __future__ import annotations

import re
from typing import Any

BRACKET = re.compile(r"(?<!\\)[()]")  # one behind a backslash is escaped already


def literal(clip, text: str) -> dict[str, Any]:
    """The tokens of a text whose brackets are no weights: those of disable_weights=True, which reads \\( as ( too."""
    if BRACKET.search(text) and clip.tokenize("\\(") == clip.tokenize("("):
        text = BRACKET.sub(r"\\\g<0>", text)
    return clip.tokenize(text)


def streams(tokens: dict[str, Any]) -> dict[str, list]:
    """The chunks of (token, weight) of every encoder; tokenizers for sound put settings beside them."""
    return {name: chunks for name, chunks in tokens.items() if isinstance(chunks, list)}
