"""Node types of other packs that make their images of what comes to them over links and of nothing else.

A type counts only while the source of its class is one that was read and run with the pack itself
(docs/compatibility.md): neither another version of it nor another pack's class of that name is vouched for.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache

# SHA-256 of the class's source
SOURCES: dict[str, tuple[str, ...]] = {
    "ConstrainImage|pysssss": ("62f319b71d001a3395dcdbc42287be7373d4480d0b5e7bd104ace70af0725af5",),
    "Image Resize": ("023c7ebb4c7bc0839fc135bee13106ae70faa737d22bb85aed38be1e85b88b1c",),
    "Image Resize (rgthree)": ("2f38b50022a25867626f392aabdf75c23232a564e7329ee2face3ac7f6bdfba8",),
    "ImageConcanate": (
        "9aaf858498c72231a7b9e5fc85956ec94fd2d06f060a568d9b13904220be8235",
        "6106214715a15c5021364aac0524a9fd05ab65eb364d8eb003ecb28dff98e47a",
    ),
    "ImageResize+": ("059afa49fc06381af5693d3893bfa7ef2cae4153b57ae081e42ad694cddfebab",),
    "ImageResizeKJv2": (
        "d72f0394be6f418f5e1de3697a9520f0d94f6eab2e6b1a51513d6c4e8777d976",
        "69abfd239cfdb1771ba1caf4ff9a2b84088d649b83c169486cefdd5818c443d5",
    ),
}


def vouched(name: str, kind: type) -> bool:
    """Whether the class that goes by this name is one of these."""
    return name in SOURCES and source_sha256(kind) in SOURCES[name]


@cache
def source_sha256(kind: type) -> str:
    """Of a class's source; "" where there is none."""
    try:
        return hashlib.sha256(inspect.getsource(kind).strip().encode()).hexdigest()
    except (OSError, TypeError):
        return ""
