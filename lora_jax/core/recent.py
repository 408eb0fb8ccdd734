"""What is kept of a function's results, so that a process that sees ever new shapes does not grow."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """The values of the keys that were asked for last, at most so many.

    >>> squares = Recent(2)
    >>> [squares.get(n, lambda n=n: n * n) for n in (1, 2, 1, 3)], len(squares)
    ([1, 4, 1, 9], 2)
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()  # one function may be called by several threads
        self._values: dict[Hashable, V] = {}  # the one that was asked for last comes last

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of a key, made if it is not there."""
        with self._lock:
            if key in self._values:
                value = self._values[key] = self._values.pop(key)
                return value
        value = make()  # not under the lock: it may take long, and ask for values itself
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._size:
                del self._values[next(iter(self._values))]
        return value

    def __len__(self) -> int:
        return len(self._values)
