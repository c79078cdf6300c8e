"""Clips of a data set, for models of video: which frames of a file are taken, and their pixels.

Videos are read by PyAV, which ComfyUI brings (imported when the first one is read), animated GIF and WebP by PIL. A
frame comes as a player shows it: turned as its file says, with square pixels, transparent parts on white. The rate of
frames is not changed, and sound is not read.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from PIL import Image

from ...modular_lora.errors import GuardError
from ...modular_lora.files.images import Decoded, ImageError, decode_frames

VIDEOS = (".mp4", ".webm", ".mkv", ".mov")
ANIMATED = (".gif", ".webp")  # clips where a data set asks for clips; a WebP of one frame is an image
MATROSKA = b"\x1aE\xdf\xa3"  # how WebM and MKV begin; MP4 and QuickTime are the other form


class ClipError(ImageError):
    """A file that is no whole clip."""

    code = "image.clip"


def look(data: bytes, ending: str, wanted: int, extraction: str) -> tuple[Decoded, tuple[int, ...]]:
    """The first frame of a clip, with how many there are, and which of them are taken; ImageError for no whole clip.

    ``head`` takes the first frames in a row and looks no further, so that there may be more than are counted;
    ``spread`` takes them evenly from the first to the last. None are taken of a clip with fewer than ``wanted``.
    """
    first: Image.Image | None = None
    clear, turned, count = None, False, 0
    with closing(_frames(data, ending)) as frames:
        for image, alpha, is_turned in frames:
            first, clear = first or image, clear or alpha
            if image.size != first.size:
                raise ClipError("its frames change their size: make it of one size")
            turned, count = turned or is_turned, count + 1
            if extraction == "head" and count == wanted:
                break
    if first is None:
        raise ClipError("has no frame: mend or delete it")
    return Decoded(first, clear, turned, count), _taken(count, wanted)


def read(data: bytes, ending: str, taken: Sequence[int]) -> Iterator[Image.Image]:
    """The taken frames (RGB), in their order; ImageError where the file ends before the last of them."""
    wanted, left = set(taken), len(taken)
    with closing(_frames(data, ending)) as frames:
        for index, (image, _, _) in enumerate(frames):
            if index in wanted:
                left -= 1
                yield image
            if not left:
                return
    raise ClipError(f"ends {left} frames before the last that is taken: mend or delete it")


def _taken(count: int, wanted: int) -> tuple[int, ...]:
    """``wanted`` of ``count`` frames, evenly from the first to the last; as many in a row where these are all."""
    if count < wanted:
        return ()
    gaps = max(1, wanted - 1)
    return tuple((i * (count - 1) + gaps // 2) // gaps for i in range(wanted))


def _frames(data: bytes, ending: str) -> Generator[tuple[Image.Image, Image.Image | None, bool], None, None]:
    """(RGB, alpha or None, whether it was turned) of each frame."""
    if ending.lower() in ANIMATED:
        yield from ((image, alpha, False) for image, alpha in decode_frames(data))
    else:
        yield from ((image, None, turned) for image, turned in _video(data))


def _video(data: bytes) -> Iterator[tuple[Image.Image, bool]]:
    try:
        import av
    except ImportError as error:
        raise GuardError(
            f"clip_frames: clips are read by PyAV ({error}): pip install av, or set clip_frames to 0.",
            code="train.no-av",
        ) from error
    form = "matroska" if data.startswith(MATROSKA) else "mov"  # no form that names further files
    try:
        with av.open(io.BytesIO(data), format=form) as container:
            if not container.streams.video:
                raise ClipError("has no video in it: delete it")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                yield _shown(frame, stream.sample_aspect_ratio)
    except ClipError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ClipError(f"no whole MP4, QuickTime, WebM or MKV ({type(error).__name__}: {error})") from error


def _shown(frame: Any, aspect: Any) -> tuple[Image.Image, bool]:
    """A decoded frame as a player shows it, and whether that turned it; ``aspect``: of a pixel, None where unknown."""
    image = frame.to_image()
    if aspect and aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height))
    turn = frame.rotation % 360
    return (image.rotate(turn, expand=True) if turn else image), bool(turn)
