"""Files that are damaged in one place, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DataObject


def damaged(data: DataObject, raw: bytes, kept: range = range(0)) -> bytes:
    """``raw`` with a bit turned, cut off, or with bytes put in or taken out; not at the places of ``kept``.

    Where the byte that is put in is the one that stood there, it is what it was.
    """
    made = bytearray(raw)
    place = data.draw(st.integers(0, len(made) - 1).filter(lambda n: n not in kept))
    what = data.draw(st.sampled_from(["bit", "cut", "insert", "remove"]))
    if what == "bit":
        made[place] ^= 1 << data.draw(st.integers(0, 7))
    elif what == "cut":
        del made[place:]
    elif what == "insert":
        made[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        del made[place : place + data.draw(st.integers(1, 20))]
    return bytes(made)
