"""What a file is that is no safetensors file, by its ending and its first bytes: said before anything is judged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from ..errors import LoraFileError, shown

_PICKLE = "pickle files can run code, convert it first"
_ENDINGS = {  # what a file with another ending is
    **dict.fromkeys((".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"), _PICKLE),
    ".gguf": "GGUF holds quantised models, no LoRA: load the model with a GGUF loader, and its LoRA here",
    ".onnx": "ONNX files hold networks, no LoRA: use the LoRA's .safetensors file",
    **dict.fromkeys((".zip", ".7z", ".rar", ".gz", ".tar"), "it is an archive: unpack it and use the file inside"),
    **dict.fromkeys(
        (".part", ".crdownload", ".tmp", ".download", ".aria2", ".partial", ".incomplete"),
        "it is an unfinished download: wait for it, or download it again",
    ),
}
_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
_AGAIN = "download it again"
_STARTS = (  # first bytes -> what the file is, and what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for: get that with git lfs pull"),
    (b"GGUF", "a GGUF file (a quantised model), no LoRA: load it with a GGUF loader"),
    (b"PK\x03\x04", f"a zip archive, as PyTorch's .ckpt and .pt files are: unpack it; {_PICKLE}"),
    (b"\x80\x02", f"a pickle file under another name: {_PICKLE}"),
    (b"\x80\x03", f"a pickle file under another name: {_PICKLE}"),
    (b"\x80\x04", f"a pickle file under another name: {_PICKLE}"),
    (b"\x80\x05", f"a pickle file under another name: {_PICKLE}"),
    (b"\x89PNG\r\n", f"a PNG image: {_AGAIN}, this is the preview"),
    (b"\xff\xd8\xff", f"a JPEG image: {_AGAIN}, this is the preview"),
    (b"RIFF", f"a WebP image or a video: {_AGAIN}, this is the preview"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it and use the file inside"),
    (b"Rar!", "a RAR archive: unpack it and use the file inside"),
    (b"\x1f\x8b", "a gzip archive: unpack it and use the file inside"),
    (b"\x89HDF", "an HDF5 file (Keras): use the LoRA's .safetensors file"),
    (b"%PDF", f"a PDF document: {_AGAIN}"),
)
_LOGIN = "the server wants a login or the file is gone: download it in a browser where you are logged in"


def refuse_ending(path: Path, name: str) -> NoReturn:
    """LoraFileError for a file that is not named as a safetensors file; it is never opened."""
    why = _ENDINGS.get(path.suffix.lower(), "LoRA files are read from .safetensors only: use such a file")
    raise LoraFileError(f"{name}: is not a .safetensors file: {why}", code="file.ending")


def refuse_contents(start: bytes, size: int, name: str) -> None:
    """LoraFileError where the first bytes of a file that is no safetensors file tell what it is."""
    if not size:
        raise LoraFileError(f"{name}: is empty, header of 0 bytes: {_AGAIN}", code="file.empty")
    start = start.removeprefix(b"\xef\xbb\xbf")  # UTF-8's mark
    for first, kind in _STARTS:
        if start.startswith(first):
            raise LoraFileError(f"{name}: is {kind}", code="file.another-kind")
    if _PAGE.match(start):
        raise LoraFileError(f"{name}: is a web page (HTML) and no LoRA file: {_LOGIN}", code="file.another-kind")
    text = _text(start)
    if text[:1] in ("{", "["):
        raise LoraFileError(
            f"{name}: is JSON text, such as a server's error ({shown(text[:200])}): {_LOGIN}", code="file.another-kind"
        )
    if len(text) >= 16:
        raise LoraFileError(
            f"{name}: is text and no LoRA file ({shown(text[:200])}): {_LOGIN}", code="file.another-kind"
        )
    if not any(start):
        raise LoraFileError(
            f"{name}: begins with zeros, as an unfinished download does: {_AGAIN}", code="file.another-kind"
        )


def _text(start: bytes) -> str:
    """The bytes as text, "" where they are none; a character that is cut off at the end is left out."""
    text = start.decode("utf-8", "ignore").strip()
    if len(text.encode()) < len(start.strip()) - 6 or not all(c.isprintable() or c.isspace() for c in text):
        return ""
    return text
