"""Tells the pack's errors apart in tests: by their code, never by their sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refuses(code: str | tuple[str, ...], *named: object) -> Iterator[pytest.ExceptionInfo]:
    """The block must end with an error of this code, whose message names what is ``named``: files, layers, numbers.

    Several codes: one of them, where it is for ComfyUI's version or for chance to choose.
    Sentences belong into `tests/unit/snapshots/messages.txt` alone. An error without a code has the code "".
    """
    with pytest.raises(Exception) as caught:
        yield caught
    error = caught.value
    found = getattr(error, "code", "")
    if found not in ((code,) if isinstance(code, str) else code):
        raise AssertionError(f"{code} was expected, {found or 'no code'} came: {error}") from error
    missing = [str(one) for one in named if str(one) not in str(error)]
    assert not missing, f"{missing} are not named: {error}"
