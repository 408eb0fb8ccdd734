"""Examples as tokens, all of them in a few flat arrays, with what was cut and left out.

A model that reads n tokens predicts the n tokens that come one later. So an example of n + 1 tokens takes n places of a
row, and an example of `max_length` places has one token more.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from lora_jax.core.argument_checks import refuse
from lora_jax.core.errors import LoraError
from lora_jax.recipes.chat import render
from lora_jax.recipes.examples import Completion, Conversation, Example, Preference, Span, Text
from lora_jax.recipes.tokenizer import Tokenizer, Tokens

AT_A_TIME = 512  # examples that the tokenizer is given at once, for all cores
TooLong = Literal["cut", "drop", "split"]


@dataclass(frozen=True)
class Counts:
    """What became of the examples.

    Attributes:
        examples: how many there are as tokens.
        places: of a row that they take: the tokens that the model reads.
        learned: how many of the tokens after these count for the loss.
        cut: how many examples were longer than the limit, and lost their end.
        split: how many were made into several.
        dropped: how many were left out: longer than the limit, or with nothing to be learned before it.
        bad: how many could not be read, or made into text.
        last_only: conversations of which only the last answer is learned.
        notes: the first example of each problem.
    """

    examples: int = 0
    places: int = 0
    learned: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    bad: int = 0
    last_only: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in a few lines."""
        first = f"{self.examples:,} examples, {self.places:,} tokens, of which {self.learned:,} are learned."
        lost = {
            "cut at the longest length": self.cut,
            "split into several": self.split,
            "dropped": self.dropped,
            "bad and left out": self.bad,
            "with only their last answer learned": self.last_only,
        }
        more = ", ".join(f"{count:,} {what}" for what, count in lost.items() if count)
        return "\n".join([first, *([f"{more[0].upper()}{more[1:]}."] if more else []), *self.notes])


@dataclass(frozen=True, eq=False)
class Tokenized:
    """Examples as tokens, one after another.

    Attributes:
        ids: [N] int32, of all examples.
        learned: [N] bool, which tokens count for the loss: those of answers.
        starts: [n + 1] int64, where each example begins, and the end.
        counts: what became of the examples.
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    counts: Counts = Counts()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The places of a row that each example takes, [n]: one less than its tokens."""
        return np.diff(self.starts) - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of the tokens, by which a run that goes on knows that it has the same."""
        found = hashlib.sha256()
        for array in (self.ids, self.learned, self.starts):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:32]

    def select(self, numbers: Sequence[int] | np.ndarray) -> "Tokenized":
        """Return some of the examples, such as those that are held out."""
        numbers = np.asarray(numbers, np.int64)
        parts = [slice(self.starts[n], self.starts[n + 1]) for n in numbers]
        ids = np.concatenate([self.ids[part] for part in parts] or [self.ids[:0]])
        learned = np.concatenate([self.learned[part] for part in parts] or [self.learned[:0]])
        starts = np.concatenate([[0], np.cumsum(np.diff(self.starts)[numbers])])
        counts = replace(self.counts, examples=len(numbers), places=len(ids) - len(numbers), learned=int(learned.sum()))
        return Tokenized(ids, learned, starts, counts)


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """Preferences as tokens: the two answers of a pair have one number in both.

    Attributes:
        chosen: the better answers, each with its prompt.
        rejected: the others.
    """

    chosen: Tokenized
    rejected: Tokenized

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """A checksum of the tokens of both."""
        return f"{self.chosen.fingerprint} {self.rejected.fingerprint}"

    def select(self, numbers: Sequence[int] | np.ndarray) -> "TokenizedPairs":
        """Return some of the pairs."""
        return TokenizedPairs(self.chosen.select(numbers), self.rejected.select(numbers))


def tokenized(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    too_long: TooLong = "cut",
    skip_bad: bool = False,
) -> Tokenized:
    """Return examples as tokens, of which the answers are learned.

    Of a `Conversation` that is what the assistant wrote, with the token that ends it; of a `Completion` the completion
    and the token that ends a text; of a `Text` all.

    Args:
        examples: such as `read_examples` reads.
        tokenizer: of the model.
        max_length: the most tokens of one example that the model reads.
        too_long: what becomes of a longer example: its end is cut off, it is dropped, or it is split into several.
        skip_bad: leave out and count conversations that the template refuses, in place of raising. What cannot be read
            at all is left out by `read_examples(path, skip_bad=True)`.

    Returns:
        The tokens, which of them are learned, and what became of the examples.

    Raises:
        LoraError: an example is a pair of preferences, or is refused by the template, with its line; nothing is left.

    >>> import tokenizers, lora_jax as lora
    >>> from lora_jax.recipes.examples import Completion
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = lora.recipes.Tokenizer(words, {"eos_token": "</s>"}, eos_ids=[3])
    >>> tokens = lora.recipes.tokenized([Completion("a", " b"), Completion("b", " a")], tokenizer, max_length=8)
    >>> tokens.ids.tolist(), tokens.learned.tolist()
    ([0, 1, 3, 1, 0, 3], [False, True, True, False, True, True])
    """
    _check("tokenized", max_length, too_long)
    found, tally = _Arrays(), _Tally.of(examples)
    for line, [(ids, learned)] in _encoded(_singles(examples), tokenizer, tally, skip_bad):
        pieces = [(ids[part], learned[part]) for part in _parts(len(ids), max_length, too_long)]
        useful = [piece for piece in pieces if piece[1][1:].any()]
        if len(ids) > max_length + 1:
            tally.count(too_long if useful else "dropped", line, _long(ids, max_length))
        elif not useful:
            tally.count("dropped", line, "there is nothing in it that is to be learned.")
        for piece in useful:
            found.add(*piece)
    return found.result(tally.counts(examples))


def tokenized_pairs(
    examples: Iterable[Example], tokenizer: Tokenizer, max_length: int, *, skip_bad: bool = False
) -> TokenizedPairs:
    """Return preferences as tokens. Pairs of which one answer is too long are dropped: no half of an answer is better.

    Args:
        examples, tokenizer, max_length, skip_bad: as of `tokenized`.

    Returns:
        The tokens of the better and of the worse answers.

    Raises:
        LoraError: an example is no pair, or is refused by the template, with its line; nothing is left.

    >>> import tokenizers, lora_jax as lora
    >>> from lora_jax.recipes.examples import Completion, Preference
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = lora.recipes.Tokenizer(words, {"eos_token": "</s>"}, eos_ids=[3])
    >>> pair = Preference(chosen=Completion("a", " b"), rejected=Completion("a", " a"))
    >>> pairs = lora.recipes.tokenized_pairs([pair], tokenizer, max_length=8)
    >>> pairs.chosen.ids.tolist(), pairs.rejected.ids.tolist()
    ([0, 1, 3], [0, 0, 3])
    """
    _check("tokenized_pairs", max_length, "drop")
    chosen, rejected, tally = _Arrays(), _Arrays(), _Tally.of(examples)
    for line, pair in _encoded(_pairs(examples), tokenizer, tally, skip_bad):
        longest = max((ids for ids, _ in pair), key=len)
        if len(longest) > max_length + 1:
            tally.count("dropped", line, _long(longest, max_length))
        else:
            chosen.add(*pair[0])
            rejected.add(*pair[1])
    counts = tally.counts(examples)
    return TokenizedPairs(chosen.result(counts), rejected.result(counts))


# How it is done -------------------------------------------------------------------------------------------------------

Encoded = tuple[np.ndarray, np.ndarray]  # ids [n] and which are learned [n]
Group = tuple[int, tuple[Example, ...]]  # the line, and what belongs together: one example, or both answers of a pair


def _singles(examples: Iterable[Example]) -> Iterator[Group]:
    for example in examples:
        if isinstance(example, Preference):
            raise LoraError(f"line {example.line} is a pair of preferences: use tokenized_pairs.")
        yield example.line, (example,)


def _pairs(examples: Iterable[Example]) -> Iterator[Group]:
    for example in examples:
        if not isinstance(example, Preference):
            raise LoraError(f'line {example.line} is a {type(example).__name__}, expected "chosen" and "rejected".')
        yield example.line, (example.chosen, example.rejected)


@dataclass(frozen=True)
class _Written:
    """An example as text; `special` says whether the tokens around a text are still to be added."""

    text: str
    answers: list[Span]
    special: bool


def _encoded(
    groups: Iterable[Group], tokenizer: Tokenizer, tally: "_Tally", skip_bad: bool
) -> Iterator[tuple[int, list[Encoded]]]:
    """Give the line of each group, and the tokens of all that belongs to it."""
    written = _written(groups, tokenizer, tally, skip_bad)
    while some := [*islice(written, AT_A_TIME)]:
        texts = [one for _, group in some for one in group]
        tokens: dict[bool, Iterator[Tokens]] = {
            special: iter(tokenizer.encode_all([one.text for one in texts if one.special == special], special))
            for special in (False, True)
        }
        for line, group in some:
            yield line, [_finish(one, next(tokens[one.special]), tokenizer) for one in group]


def _finish(written: _Written, tokens: Tokens, tokenizer: Tokenizer) -> Encoded:
    """Return the ids, and which are learned: those that have a character of an answer, and the end of a text."""
    ids, learned = np.array(tokens.ids, np.int32), np.zeros(len(tokens.ids), bool)
    for start, stop in written.answers:
        learned |= (tokens.offsets[:, 1] > start) & (tokens.offsets[:, 0] < stop)
    if written.special:
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:  # the text itself began with it
            ids, learned = ids[1:], learned[1:]
        if not len(ids) or ids[-1] != tokenizer.eos_id:
            ids, learned = np.append(ids, np.int32(tokenizer.eos_id)), np.append(learned, True)
        learned[-1] = True
    return ids, learned


def _written(
    groups: Iterable[Group], tokenizer: Tokenizer, tally: "_Tally", skip_bad: bool
) -> Iterator[tuple[int, list[_Written]]]:
    for line, group in groups:
        for example in group:
            if isinstance(example, Conversation):
                tokenizer.template(tools=bool(example.tools))  # that there is none, say, is no fault of this line
        try:
            found = [_write(example, tokenizer, line, tally) for example in group]
        except LoraError as error:
            if not skip_bad:
                raise LoraError(f"{tally.where}line {line}: {error}") from None
            tally.count("bad", line, str(error))
        else:
            yield line, found


def _write(example: Example, tokenizer: Tokenizer, line: int, tally: "_Tally") -> _Written:
    match example:
        case Text(text):
            return _Written(text, [(0, len(text))], True)
        case Completion(prompt, completion):
            text = prompt + completion
            return _Written(text, [(len(prompt), len(text))], True)
        case Conversation():
            found = render(example, tokenizer.template(tools=bool(example.tools)), tokenizer.special_texts)
            if found.last_only:
                tally.count("last_only", line, found.last_only)
            return _Written(found.text, found.answers, False)
    raise AssertionError(example)


_FIRST = {
    "cut": "First cut",
    "split": "First split",
    "dropped": "First dropped",
    "bad": "First bad",
    "last_only": "First with only its last answer learned",
}


@dataclass
class _Tally:
    where: str  # the file and a comma; empty for examples that are of none
    numbers: Counter[str] = field(default_factory=Counter)
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, examples: Any) -> "_Tally":
        path = getattr(examples, "path", None)
        return cls("" if path is None else f"{path}, ")

    def count(self, what: str, line: int, why: str) -> None:
        self.numbers[what] += 1
        self.notes.setdefault(what, f"{_FIRST[what]}: line {line}: {why}")

    def counts(self, examples: Any) -> Counts:
        """Return the counts, with those of what could not be read."""
        unread, why = getattr(examples, "bad", 0), getattr(examples, "first_bad", "")
        notes = [*self.notes.values(), *([f"First that could not be read: {why}"] if unread else [])]
        return Counts(**{**self.numbers, "bad": self.numbers["bad"] + unread}, notes=tuple(notes))


@dataclass
class _Arrays:
    ids: list[np.ndarray] = field(default_factory=list)
    learned: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: np.ndarray, learned: np.ndarray) -> None:
        self.ids.append(ids)
        self.learned.append(np.append(False, learned[1:]))  # nothing comes before the first token

    def result(self, counts: Counts) -> Tokenized:
        if not self.ids:
            raise LoraError(f"there is nothing to be learned: {counts}")
        starts = np.cumsum([0, *map(len, self.ids)], dtype=np.int64)
        ids, learned = np.concatenate(self.ids), np.concatenate(self.learned)
        counts = replace(counts, examples=len(self.ids), places=len(ids) - len(self.ids), learned=int(learned.sum()))
        return Tokenized(ids, learned, starts, counts)


def _parts(tokens: int, max_length: int, too_long: TooLong) -> list[slice]:
    """Return the parts of an example that are kept. Two that follow one another share a token: a target, then read."""
    count = -(-(tokens - 1) // max_length)
    if count > 1:
        count = {"cut": 1, "drop": 0, "split": count}[too_long]
    return [slice(i * max_length, (i + 1) * max_length + 1) for i in range(count)]


def _check(call: str, max_length: int, too_long: str) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        refuse(call, "max_length", max_length, "a whole number of at least 1, such as 2048")
    if too_long not in ("cut", "drop", "split"):
        refuse(call, "too_long", too_long, '"cut", "drop" or "split"')


def _long(ids: np.ndarray, max_length: int) -> str:
    return f"the model would read {len(ids) - 1:,} tokens, and the longest length is {max_length:,}."
