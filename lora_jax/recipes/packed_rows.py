"""Rows of tokens that hold several examples, and batches of them, without one example seeing another.

Which example goes into which row depends on the lengths of all, the seed and the epoch, and on nothing else: every host
finds the same rows and reads the tokens of its own, and a run that was killed goes on with the same batches, on any
number of hosts.

Each example goes into the row that it fills best (best fit; Johnson et al. 1974, "Worst-Case Performance Bounds for
Simple One-Dimensional Packing Algorithms"), in a random order, and the rows are then put in a random order.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from lora_jax.core.argument_checks import refuse
from lora_jax.core.errors import LoraError
from lora_jax.recipes.tokens import Tokenized

CALL = "packed_batches(tokens, rows, length, seed)"
MOST_OPEN = 4096  # rows with room that are kept in mind, so that the time is linear in the examples
Batch = dict[str, np.ndarray]
Rows = list[list[int]]  # the numbers of the examples in each row
DTYPES = {"ids": np.int32, "positions": np.int32, "segments": np.int32, "targets": np.int32, "weights": np.float32}


def pack(lengths: Sequence[int] | np.ndarray, length: int, seed: int, epoch: int = 0, most: int | None = None) -> Rows:
    """Return which examples go into which row.

    Args:
        lengths: the places that each example takes.
        length: the places of a row.
        seed: of the order.
        epoch: each has an order of its own.
        most: examples of a row; by default as many as there is room for.

    Raises:
        LoraError: an example is longer than a row.

    >>> pack([3, 2, 2, 3, 1], length=5, seed=0)
    [[0], [2, 4, 1], [3]]
    """
    sizes = np.asarray(lengths)
    if len(sizes) and sizes.max() > length:
        raise LoraError(
            f"example {sizes.argmax():,} takes {sizes.max():,} places, and a row has {length:,}: give rows at least "
            "the max_length that the examples were made with."
        )
    random = np.random.default_rng([seed, epoch])
    rows: Rows = []
    open_rows: list[tuple[int, int]] = []  # the places left and the number of each row that has some, in order
    for n in random.permutation(len(sizes)).tolist():
        size = int(sizes[n])
        at = bisect_left(open_rows, (size, -1))
        if at < len(open_rows):
            left, row = open_rows.pop(at)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(n)
        if left > size and len(rows[row]) != most:
            insort(open_rows, (left - size, row))
            if len(open_rows) > MOST_OPEN:
                del open_rows[0]  # the fullest
    return [rows[i] for i in random.permutation(len(rows))]


def place(tokens: Tokenized, rows: Rows, length: int) -> Batch:
    """Return the arrays of some rows, `[len(rows), length]` each.

    Returns:
        `ids`; `positions`, which start again with each example; `segments`, 1 for the first example of a row and 0
        where there is none; `targets`, the token that comes next in the same example; and `weights`, 1 where that one
        is learned, else 0.
    """
    batch = {name: np.zeros((len(rows), length), dtype) for name, dtype in DTYPES.items()}
    for i, row in enumerate(rows):
        done = 0
        for segment, n in enumerate(row, 1):
            start, stop = tokens.starts[n], tokens.starts[n + 1]
            here = slice(done, done := done + int(stop - start) - 1)
            batch["ids"][i, here] = tokens.ids[start : stop - 1]
            batch["positions"][i, here] = np.arange(stop - start - 1)
            batch["segments"][i, here] = segment
            batch["targets"][i, here] = tokens.ids[start + 1 : stop]
            batch["weights"][i, here] = tokens.learned[start + 1 : stop]
    return batch


class Order(NamedTuple):
    """Which rows there are, how they follow one another, and which of them are read; as of `packed_batches`."""

    rows: int
    length: int
    seed: int
    epoch: int
    start: int
    shard: tuple[int, int]
    epochs: int


class PackedBatches:
    """Batches of packed rows, epoch after epoch: an iterator, which is gone through once.

    `get_state()` is the place among the batches, `set_state(...)` goes there, and `len(...)` is the number of batches
    of all epochs, from the first one on. `str(...)` says how full the rows are.

    Args:
        lengths: the places that each example takes.
        make: makes the arrays of some rows.
        data: a checksum of the examples: a state belongs to the same ones.
        order: of the rows.
        most: examples of a row.

    Attributes:
        epoch: of the next batch.
        batch: the number of the next batch in its epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        make: Callable[[Rows], Batch],
        data: str,
        order: Order,
        most: int | None = None,
    ) -> None:
        self._lengths, self._make, self._most = lengths, make, most
        self._rows, self._length, self._seed = order.rows, order.length, order.seed
        self._first, self._end = order.epoch, order.epoch + order.epochs
        part, parts = order.shard
        self._own = slice(order.rows * part // parts, order.rows * (part + 1) // parts)
        self._about = {name: int(getattr(order, name)) for name in ("rows", "length", "seed")} | {"data": data}
        self._packed: tuple[int, Rows] = (-1, [])  # an epoch, and its rows
        self._counts: dict[int, int] = {}  # the batches of epochs that were packed
        self._go_to(order.epoch, order.start)

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __len__(self) -> int:
        """Return the number of batches of all epochs."""
        return sum(map(self.batches_of, range(self._first, self._end)))

    def __next__(self) -> Batch:
        """Return this host's rows of the next batch."""
        if self.epoch >= self._end:
            raise StopIteration
        rows = self._rows_of(self.epoch)[self.batch * self._rows : (self.batch + 1) * self._rows]
        rows += [[]] * (self._rows - len(rows))  # the last batch of an epoch
        self._go_to(self.epoch, self.batch + 1)
        return self._make(rows[self._own])

    def __str__(self) -> str:
        """Say how many batches there are, and how full they are."""
        rows = len(self._rows_of(self._first))
        full, examples = self._lengths.sum() / (rows * self._length), len(self._lengths) / rows
        return (
            f"{self.batches_of(self._first):,} batches an epoch of {self._rows} rows of {self._length:,} tokens: "
            f"{examples:.1f} examples a row, which fill {full:.1%} of it."
        )

    def batches_of(self, epoch: int) -> int:
        """Return the number of batches of an epoch; orders differ, and so may this."""
        if epoch not in self._counts:
            self._counts[epoch] = -(-len(self._rows_of(epoch)) // self._rows)
        return self._counts[epoch]

    def get_state(self) -> dict[str, Any]:
        """Return the place of the next batch, as plain data."""
        return {"epoch": self.epoch, "batch": self.batch, **self._about}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `get_state` returned, on any number of hosts.

        Raises:
            LoraError: it is of other examples, rows or seeds, so that the batches there are others.
        """
        for name, value in self._about.items():
            if state.get(name) != value:
                raise LoraError(
                    f"the batches that are to go on had another `{name}`: {state.get(name)!r}, and now it is "
                    f"{value!r}. The same examples, tokenizer and settings give the same batches."
                )
        self._go_to(state["epoch"], state["batch"])

    def _go_to(self, epoch: int, batch: int) -> None:
        """Go to a batch; after the last one of an epoch comes the first one of the next."""
        count = self.batches_of(epoch)
        if not 0 <= batch <= count:
            raise LoraError(f"packed_batches: epoch {epoch} has {count} batches, and `start` is {batch}.")
        self.epoch, self.batch = (epoch + 1, 0) if batch == count else (epoch, batch)

    def _rows_of(self, epoch: int) -> Rows:
        if self._packed[0] != epoch:
            self._packed = epoch, pack(self._lengths, self._length, self._seed, epoch, self._most)
        return self._packed[1]


def packed_batches(
    tokens: Tokenized,
    rows: int,
    length: int,
    seed: int,
    epoch: int = 0,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    epochs: int = 1,
) -> PackedBatches:
    """Return batches of packed rows: dicts of arrays `[rows of this host, length]`, as `place` makes them.

    Each example is in one row of each epoch. The last batch of an epoch has empty rows where none are left, so that all
    have one shape; `weights` are 0 there.

    Args:
        tokens: of the examples, from `tokenized`.
        rows: of a batch, on all hosts together.
        length: the places of a row, in tokens.
        seed: of the orders of examples and of rows.
        epoch: the first one; each has an order of its own.
        start: how many of its batches are passed over.
        shard: which part of the rows is this host's, and of how many parts: `(jax.process_index(),
            jax.process_count())` where each process has the same number of rows (`lora.local_rows`).
        epochs: how many there are.

    Returns:
        An iterator of the batches. Its `get_state` and `set_state` are for checkpoints.

    Raises:
        LoraError: an example is longer than a row; the hosts cannot have equal parts; an argument is none of these.

    >>> import numpy as np
    >>> tokens = Tokenized(np.arange(9, dtype=np.int32), np.ones(9, bool), np.array([0, 4, 7, 9]))
    >>> batch = next(packed_batches(tokens, rows=1, length=6, seed=0))
    >>> print(np.concatenate([batch[name] for name in ("ids", "targets", "positions", "segments")]))
    [[7 0 1 2 4 5]
     [8 1 2 3 5 6]
     [0 0 1 2 0 1]
     [1 2 2 2 3 3]]
    """
    order = checked_order(CALL, Order(rows, length, seed, epoch, start, shard, epochs))
    make = functools.partial(place, tokens, length=length)
    return PackedBatches(tokens.lengths, make, tokens.fingerprint, order)


def checked_order(call: str, order: Order, **more: Any) -> Order:
    """Raise unless rows, lengths and epochs are at least 1, other numbers at least 0, and hosts have equal parts."""
    numbers: dict[str, Any] = order._asdict() | more
    shard: Any = numbers.pop("shard")
    for name, value in numbers.items():
        least = 1 if name in ("rows", "length", "epochs", "most") else 0
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            refuse(call, name, value, f"a whole number of at least {least}")
    if not (
        isinstance(shard, tuple)
        and len(shard) == 2
        and all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in shard)
        and 0 <= shard[0] < shard[1]
    ):
        refuse(call, "shard", shard, "which part this host has and of how many, such as (0, 1)")
    if numbers["rows"] % shard[1]:
        raise LoraError(
            f"{call}: {numbers['rows']} rows cannot be split evenly over {shard[1]} hosts: give a multiple of "
            f"{shard[1]}."
        )
    return order
