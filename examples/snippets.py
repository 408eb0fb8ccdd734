"""Sentences of film reviews with the ratings of at least 20 people each, split and batched for training.

The data come with Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text"; the sentences with Pang and Lee 2005, "Seeing Stars".

Axes: B sentences, T tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

LENGTH = 64  # tokens; one sentence in a thousand is longer and is cut
BUCKETS = (32, 48, 64)  # lengths that batches are padded to: one compilation each


@dataclass(frozen=True)
class Split:
    tokens: list[list[int]]
    labels: np.ndarray  # [N], 1 for positive

    def __len__(self) -> int:
        return len(self.tokens)


def read(path: Path) -> list[tuple[str, int]]:
    """(sentence, 1 if positive): those whose mean rating, on a scale from -4 to 4, is at least half a point."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(text.strip(), int(float(rating) > 0)) for _, rating, text in rows if abs(float(rating)) >= 0.5]


def split_by_hash(sentences: list[tuple[str, int]], tokenizer: Tokenizer) -> dict[str, Split]:
    """70 % train, 10 % validation, 20 % test. A sentence's hash decides: the same in every run, and for duplicates."""
    chosen: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for text, label in sentences:
        bucket = int(hashlib.sha256(text.lower().encode()).hexdigest(), 16) % 10
        chosen["train" if bucket < 7 else "validation" if bucket < 8 else "test"].append((text, label))
    return {
        name: Split([tokenizer.encode(text).ids for text, _ in rows], np.array([label for _, label in rows], np.int32))
        for name, rows in chosen.items()
    }


def tokenize(sentences: list[tuple[str, int]], tokenizer: Tokenizer) -> Split:
    """All of the sentences as one split."""
    labels = np.array([label for _, label in sentences], np.int32)
    return Split([tokenizer.encode(text).ids for text, _ in sentences], labels)


def pick(split: Split, chosen: np.ndarray) -> Split:
    return Split([split.tokens[n] for n in chosen], split.labels[chosen])


def shorter(split: Split, longest: int) -> Split:
    """The sentences of at most so many tokens."""
    return pick(split, np.flatnonzero(np.array([len(row) <= longest for row in split.tokens])))


def balanced(split: Split, n: int, seed: int = 0) -> Split:
    """At most n sentences, drawn at random: half of them positive, where there are enough of both."""
    order = np.random.default_rng(seed).permutation(len(split))
    return pick(split, np.concatenate([order[split.labels[order] == label][: n // 2] for label in (0, 1)]))


def pad(tokens: list[list[int]], rows: int, longest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [rows, T], T the shortest bucket that holds all; rows beyond the sentences repeat the last.

    Where these are some rows of a longer batch, `longest` is the length of its longest sentence.
    """
    tokens = tokens + [tokens[-1]] * (rows - len(tokens))
    longest = max(longest, *map(len, tokens))
    length = next(bucket for bucket in BUCKETS if bucket >= longest)
    ids = np.array([row + [0] * (length - len(row)) for row in tokens], np.int32)
    return ids, np.arange(length) < np.array([[len(row)] for row in tokens])


def training_batches(split: Split, batch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One epoch in random order: ids, mask, labels. Sentences of like length share a batch: less padding."""
    rng = np.random.default_rng(seed)
    order, pool = rng.permutation(len(split)), 16 * batch
    order = np.concatenate(
        [sorted(order[i : i + pool], key=lambda n: len(split.tokens[n])) for i in range(0, len(order), pool)]
    )
    starts = np.arange(0, len(order) - batch + 1, batch)
    for start in rng.permutation(starts):
        chosen = order[start : start + batch]
        yield *pad([split.tokens[n] for n in chosen], batch), split.labels[chosen]


def in_batches(f: Callable[[np.ndarray, np.ndarray], Any], tokens: list[list[int]], rows: int = 64) -> np.ndarray:
    """f(ids, mask) [rows, n] for all sentences, in their own order [N, n]."""
    order = sorted(range(len(tokens)), key=lambda n: len(tokens[n]))
    parts = [order[i : i + rows] for i in range(0, len(order), rows)]
    out = np.concatenate([np.asarray(f(*pad([tokens[n] for n in part], rows)))[: len(part)] for part in parts])
    return out[np.argsort(order)]
