"""Tells the pack's errors apart in tests: by their code, never by their sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refuses(code: str, *named: object) -> Iterator[pytest.ExceptionInfo]:
    """The block must end with an error of this code, whose message names what is ``named``: files, layers, numbers.

    Sentences belong into `tests/unit/snapshots/messages.txt` alone. An error without a code has the code "".
    """
    with pytest.raises(Exception) as caught:
        yield caught
    error = caught.value
    found = getattr(error, "code", "")
    if found != code:
        raise AssertionError(f"{code} was expected, {found or 'no code'} came: {error}") from error
    missing = [str(one) for one in named if str(one) not in str(error)]
    assert not missing, f"{missing} are not named: {error}"
