"""One bounded cache for everything that is kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """A map that drops the least recently used entries where it grows beyond a limit.

    The entry that was put in last stays even if it is larger than the limit by itself.
    """

    def __init__(self, limit: int, size: Callable[[V], int] | None = None):
        """
        Args:
            limit: How many entries are kept or, with ``size``, how many bytes.
            size: Bytes of a value; asked again at every ``put``, as a value may grow and shrink. Every ``put`` takes
                time in proportion to the number of entries then.
        """
        self.limit, self._size = limit, size
        self._kept: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes of all values; how many entries there are where no size function was given."""
        # of a copy: a value's finalizer may drop entries meanwhile
        return len(self._kept) if self._size is None else sum(map(self._size, list(self._kept.values())))

    def get(self, key: K) -> V | None:
        """The value of a key, which counts as used now; None where it is not kept."""
        try:
            self._kept.move_to_end(key)
        except KeyError:
            return None
        return self._kept.get(key)

    def put(self, key: K, value: V) -> V:
        """Keep a value, in the place of the one that the key had. Returns the value."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self.size > self.limit:
            self._kept.popitem(last=False)
        return value

    def drop(self, where: Callable[[K], bool]) -> None:
        """Remove the entries whose key satisfies ``where``."""
        for key in [key for key in list(self._kept) if where(key)]:
            self._kept.pop(key, None)

    def clear(self) -> None:
        """Remove all entries."""
        self._kept.clear()
