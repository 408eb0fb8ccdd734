"""Examples for training from a file: JSON lines or Parquet, one at a time, with the line of each in every error.

What the records of a file are is said by their keys:

| keys | record |
|---|---|
| `chosen`, `rejected`, with a `prompt` or without | `Preference` |
| `messages`, with `tools` or without | `Conversation` |
| `prompt`, `completion` | `Completion` |
| `text` | `Text` |

The first row of the table that fits is meant; other keys, such as `id` or `source`, say nothing. A key whose value is
null counts as one that is not there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import open_file, parse_json, size_of

LONGEST_LINE = 2**24  # bytes: five million tokens, more than any model reads at once
ROWS_AT_A_TIME = 256  # of a Parquet file
PARQUET = b"PAR1"  # the first bytes of such a file

Span = tuple[int, int]  # from which to which character of a text
Message = dict[str, Any]  # "role" and "content", and what else the chat template knows, such as "tool_calls"

# Keys that change what a record means, and that nothing here acts upon.
_NOT_READ = {
    "images": "only text is read",
    "audios": "only text is read",
    "videos": "only text is read",
    "documents": "write them into the messages",
    "chat_template_kwargs": "settings of the template are the same for all examples",
    "conversations": 'write "messages", each with a "role" and "content"',
}


@dataclass(frozen=True)
class Text:
    """A text that is learned as a whole."""

    text: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that is to follow it."""

    prompt: str
    completion: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template, of which those of the assistant are learned."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # descriptions of functions, for the template
    context: int = 0  # so many messages at the beginning are not learned, whoever wrote them
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better one."""

    chosen: Completion | Conversation
    rejected: Completion | Conversation
    line: int = field(default=0, compare=False)


Example = Text | Completion | Conversation | Preference


class Examples:
    """The examples of a file, read anew by each `for` loop, one at a time.

    Attributes:
        path: of the file.
        kind: the class of its records, once the first one has been read.
        read: how many records the last loop has given so far.
        bad: how many it has left out so far.
        first_bad: what was wrong with the first of these.
    """

    def __init__(self, path: Path, skip_bad: bool) -> None:
        self.path, self.skip_bad = path, skip_bad
        self.kind: type[Example] | None = None
        self.read, self.bad, self.first_bad = 0, 0, ""

    def __iter__(self) -> Iterator[Example]:
        self.kind, self.read, self.bad, self.first_bad = None, 0, 0, ""
        for line, get in _records(self.path):
            try:
                example = make_example(get(), line)
                self._check_kind(example)
            except LoraError as error:
                if not self.skip_bad:
                    raise LoraError(f"{self.path}, line {line}: {error}") from None
                self.bad += 1
                self.first_bad = self.first_bad or f"line {line}: {error}"
            else:
                self.read += 1
                yield example
        if not self.read:
            skipped = f": all {self.bad} were left out, the first for {self.first_bad}" if self.bad else "."
            raise LoraError(f"{self.path} holds no examples{skipped}")

    def _check_kind(self, example: Example) -> None:
        self.kind = self.kind or type(example)
        if type(example) is not self.kind:
            raise LoraError(
                f"this is a {type(example).__name__}, and what comes before it is a {self.kind.__name__}: give each "
                "kind a file of its own."
            )


def read_examples(path: str | Path, skip_bad: bool = False) -> Examples:
    """Read the examples of a file of JSON lines or of Parquet, one at a time.

    Args:
        path: of the file. Which of the two it is, its first bytes say.
        skip_bad: leave out and count what is no example, in place of raising.

    Returns:
        An iterable of `Text`, `Completion`, `Conversation` or `Preference`, all of one kind, each with its line. Empty
        lines are passed over, and count as lines.

    Raises:
        LoraError: the file cannot be read, or holds no examples. In the loop: a line is longer than 16 MiB, is no JSON
            object, has none of the sets of keys that are known, or another one than the lines before it.

    >>> import tempfile, lora_jax.recipes.examples as examples
    >>> file = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
    >>> print('{"prompt": "2 + 2 = ", "completion": "4"}', file=file, flush=True)
    >>> list(examples.read_examples(file.name))
    [Completion(prompt='2 + 2 = ', completion='4', line=1)]
    """
    path = Path(path)
    open_file(path).close()
    return Examples(path, skip_bad)


# Records of a file ----------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Give the number of each line and a function that returns, or raises for, what it holds."""
    with open_file(path) as file:
        is_parquet = file.read(len(PARQUET)) == PARQUET
    return _rows(path) if is_parquet else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    line = 0
    with open_file(path) as file:
        if not size_of(file):
            return
        while text := file.readline(LONGEST_LINE + 1):
            line += 1
            if len(text) > LONGEST_LINE:
                while text and not text.endswith(b"\n"):  # to the end of it, no more than so much at a time
                    text = file.readline(LONGEST_LINE)
                yield line, _refuse_long
            elif text := (
                text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text
            ).strip():  # without a byte order mark
                yield line, partial(_parse, text)


def _parse(text: bytes) -> Any:
    if text.startswith(b"["):
        raise LoraError("it is a list, expected a JSON object on each line (JSON lines).")
    return parse_json(text, "it", finite=False)


def _refuse_long() -> Any:
    raise LoraError(f"it has more than {LONGEST_LINE:,} bytes.")


def _rows(path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Read the columns that mean something; the number of a row is its line."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LoraError(f"{path} is Parquet, for which pyarrow is needed: pip install 'lora_jax[parquet]'.") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _KEYS]
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield row, partial(dict, record)
    except (pyarrow.ArrowException, OSError) as error:
        raise LoraError(f"{path}, after row {row}, cannot be read as Parquet: {str(error)[:200]}.") from None


# One record -----------------------------------------------------------------------------------------------------------


def make_example(record: Any, line: int = 0) -> Example:
    """Make an example of what one line holds.

    Args:
        record: a mapping with the keys of one kind of example.
        line: where it is.

    Raises:
        LoraError: it has not the keys of any kind, or values of other types.

    >>> make_example({"text": "Once upon a time", "source": "a book"})
    Text(text='Once upon a time', line=0)
    """
    if not isinstance(record, Mapping):
        raise LoraError(f"it is {short(record)}, expected a JSON object.")
    record = {key: value for key, value in record.items() if value is not None}
    for key, instead in _NOT_READ.items():
        if record.get(key):
            raise LoraError(f'it has "{key}", which is not supported: {instead}.')
    for keys, make in _KINDS:
        if all(key in record for key in keys):
            return make(record, line)
    known = "; ".join(" and ".join(f'"{key}"' for key in keys) for keys, _ in _KINDS)
    raise LoraError(f"it has the keys {short(list(record))}, expected one of these sets: {known}.")


def _preference(record: Mapping[str, Any], line: int) -> Preference:
    prompt, tools = record.get("prompt"), _tools(record)
    if record["chosen"] == record["rejected"]:
        raise LoraError('"chosen" and "rejected" are the same.')
    if isinstance(record["chosen"], str):
        if not isinstance(prompt, str):
            raise LoraError('"chosen" is text without a "prompt" that is text, so there is nothing that it answers.')
        better, worse = (Completion(prompt, _text(record, key), line) for key in ("chosen", "rejected"))
        return Preference(better, worse, line)
    chosen, rejected = _messages(record, "chosen"), _messages(record, "rejected")
    if isinstance(prompt, list):
        context = _messages(record, "prompt")
        chosen, rejected, shared = (*context, *chosen), (*context, *rejected), len(context)
    else:
        shared = _shared(chosen, rejected)
        if isinstance(prompt, str) and prompt not in [message.get("content") for message in chosen[:shared]]:
            raise LoraError('"chosen" and "rejected" are messages that do not both begin with the "prompt".')
    if not shared or shared == min(len(chosen), len(rejected)):
        raise LoraError('"chosen" and "rejected" are not two ways in which the same messages, or a "prompt", go on.')
    return Preference(Conversation(chosen, tools, shared, line), Conversation(rejected, tools, shared, line), line)


def _shared(one: tuple[Message, ...], other: tuple[Message, ...]) -> int:
    """Return with how many messages both begin."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def _conversation(record: Mapping[str, Any], line: int) -> Conversation:
    return Conversation(_messages(record, "messages"), _tools(record), 0, line)


def _completion(record: Mapping[str, Any], line: int) -> Completion | Conversation:
    if isinstance(record["prompt"], str):
        return Completion(record["prompt"], _text(record, "completion"), line)
    prompt = _messages(record, "prompt")
    return Conversation((*prompt, *_messages(record, "completion")), _tools(record), len(prompt), line)


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str) or not record[key]:
        raise LoraError(f'"{key}" is {short(record[key])}, expected text.')
    return record[key]


def _messages(record: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """Return the messages without keys that are null: templates would write None, and Parquet has all keys in each."""
    found = record[key]
    if not isinstance(found, list) or not found:
        raise LoraError(f'"{key}" is {short(found)}, expected a list of messages.')
    for i, message in enumerate(found):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise LoraError(f'"{key}" {i} is {short(message)}, expected an object with a "role".')
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise LoraError(f'"{key}" {i} has the content {short(content)}, expected text, or a list of parts.')
        if isinstance(content, list) and not all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            raise LoraError(f'"{key}" {i} has parts that are no text, and only text is read.')
        if message.get("weight") not in (None, 0, 1):
            raise LoraError(f'"{key}" {i} has the weight {short(message["weight"])}, expected 0 or 1.')
    return tuple({key: value for key, value in message.items() if value is not None} for message in found)


def _tools(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools, which some files have as JSON inside of a string: Parquet has no objects of any form."""
    tools = record.get("tools") or []
    if isinstance(tools, str):
        tools = parse_json(tools.encode(errors="replace"), '"tools"', finite=False)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise LoraError(f'"tools" is {short(tools)}, expected a list of objects.')
    return tuple(dict(tool) for tool in tools)


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], int], Example]], ...] = (
    (("chosen", "rejected"), _preference),
    (("messages",), _conversation),
    (("prompt", "completion"), _completion),
    (("text",), lambda record, line: Text(_text(record, "text"), line)),
)
_KEYS = dict.fromkeys([*(key for keys, _ in _KINDS for key in keys), "tools", *_NOT_READ])
