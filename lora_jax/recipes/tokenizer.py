"""The tokenizer of a model's folder: `tokenizer.json`, its special tokens, and its chat template."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax.core.errors import LoraError, LoraWarning, short
from lora_jax.core.untrusted import open_file, read_json, size_of

if TYPE_CHECKING:
    from lora_jax.recipes.templates import Template

LARGEST_TOKENIZER = 2**28  # bytes of tokenizer.json; those of 256,000 tokens have 35 MB
LARGEST_CONFIG = 2**25  # bytes of another file; tokenizer_config.json may list each added token
LARGEST_TEMPLATE = 2**20
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
USUAL_SHARE = 0.9  # of the embeddings that a tokenizer uses at least: tables are padded, by some thousands at most


@dataclass(frozen=True)
class Tokens:
    """What a text is for the model.

    Attributes:
        ids: of each token.
        offsets: [n, 2], from which to which character of the text each is; nothing of it for one that was added.
    """

    ids: list[int]
    offsets: np.ndarray


class Tokenizer:
    """The tokenizer of a published model, as `Tokenizer.load` reads it.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        special: the text of special tokens by their names, such as `eos_token`, as templates know them.
        eos_ids: the tokens at which the model stops.
        templates: the chat templates by their names; most have one, "default".
        now: the date for templates that write one; by default that of today.
        where: what messages call it.

    >>> import tokenizers, lora_jax as lora
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = lora.recipes.Tokenizer(words, {"eos_token": "</s>"}, eos_ids=[3])
    >>> tokenizer.encode("b a").ids, tokenizer.eos_id, tokenizer.decode([0, 1])
    ([1, 0], 3, 'a b')
    """

    def __init__(
        self,
        tokenizer: Any,
        special: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        templates: Mapping[str, str] | None = None,
        now: datetime | None = None,
        where: str = "the tokenizer",
    ) -> None:
        tokenizer.no_truncation()  # published files have these switched on
        tokenizer.no_padding()
        self._tokenizer, self._where = tokenizer, where
        self.special, self.eos_ids = dict(special or {}), tuple(dict.fromkeys(eos_ids))
        self.templates, self.now = dict(templates or {}), now or datetime.now()

    @classmethod
    def load(cls, folder: str | Path, now: datetime | None = None) -> "Tokenizer":
        """Load the tokenizer of a folder in HF's form.

        Args:
            folder: with `tokenizer.json`, and beside it, where there is one, `tokenizer_config.json`,
                `special_tokens_map.json`, `generation_config.json`, `config.json` and `chat_template.jinja`.
            now: the date that templates write which write one; by default that of today. A run that is to be continued
                on another day with the same tokens gives the same one.

        Returns:
            The tokenizer, with the templates and the ends that the files name.

        Raises:
            LoraError: a file is missing, cannot be read, or is none of these.
        """
        try:
            import tokenizers
        except ImportError:
            raise LoraError("text needs tokenizers, which is not installed: pip install 'lora_jax[recipes]'.") from None
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise LoraError(
                f"{folder} has no tokenizer.json. For tokenizers of other forms transformers writes one: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        text = _read(path, LARGEST_TOKENIZER)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # tokenizers raises no other class
            raise LoraError(f"{path} is no tokenizer: {str(error)[:200]}.") from None
        config = _config(folder / "tokenizer_config.json")
        special = _special({**_config(folder / "special_tokens_map.json"), **config})
        ids = [_ids(folder / name) for name in ("generation_config.json", "config.json")]
        own = tokenizer.token_to_id(special.get("eos_token", ""))
        stops = [*ids[0], *([] if own is None else [own]), *ids[1]]
        return cls(tokenizer, special, stops, _templates(folder, config), now, str(folder))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self._tokenizer.token_to_id(self.special.get("bos_token", ""))

    @functools.cached_property
    def eos_id(self) -> int:
        """The token that ends a text.

        Raises:
            LoraError: no file says which one it is.
        """
        own = self._tokenizer.token_to_id(self.special.get("eos_token", ""))
        if own is None and not self.eos_ids:
            raise LoraError(f"{self._where}: no file says which token ends a text (eos_token).")
        return self.eos_ids[0] if own is None else own

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """What the tokens that stand for no text are written as."""
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(token.content for _, token in sorted(added.items()) if token.special)

    def check(self, vocabulary: int) -> None:
        """Check that each token has its row among a model's embeddings.

        Args:
            vocabulary: the number of rows.

        Raises:
            LoraError: it has fewer than the tokenizer has tokens.

        Warns:
            LoraWarning: it has many more, so that it may be another model's.
        """
        size = self.size
        if size > vocabulary:
            token = self._tokenizer.id_to_token(size - 1)
            raise LoraError(
                f"{self._where} does not fit the model: its last token, {short(token)}, is number {size - 1:,}, and "
                f"the model has embeddings of {vocabulary:,} tokens."
            )
        if size < USUAL_SHARE * vocabulary:
            warnings.warn(
                LoraWarning(
                    f"{self._where} has {size:,} tokens, and the model embeddings of {vocabulary:,}: is it the "
                    "tokenizer of another model?"
                ),
                stacklevel=2,
            )

    def encode(self, text: str, special: bool = False) -> Tokens:
        """Return the tokens of a text.

        Args:
            text: any.
            special: also add the tokens that the model expects around a text. What a template wrote has them already.

        Raises:
            LoraError: it has half a character, as `check_text` says.
        """
        check_text(text)
        return self.encode_all([text], special)[0]

    def encode_all(self, texts: Sequence[str], special: bool = False) -> list[Tokens]:
        """Return the tokens of each text, found on all cores.

        Args:
            texts: any number of them.
            special: as of `encode`.
        """
        found = self._tokenizer.encode_batch([*texts], add_special_tokens=special)
        return [Tokens(one.ids, _pairs(one.offsets)) for one in found]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of tokens.

        Args:
            ids: of the tokens.
            special: also write special tokens.
        """
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

    def template(self, tools: bool = False) -> "Template":
        """Return the chat template.

        Args:
            tools: the one for conversations with tools, where there is one of its own.

        Raises:
            LoraError: there is none, or it is no Jinja.
        """
        from lora_jax.recipes.templates import Template

        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            has = (
                f"no chat template named default, but {short([*self.templates])}"
                if self.templates
                else "no chat template"
            )
            raise LoraError(
                f"{self._where} has {has}. Base models often have none: give prompt and completion, or text."
            )
        return _compiled(Template, self.templates[name], tuple(self.special.items()), self.now)


def check_text(text: str) -> None:
    """Raise if a text has half of a surrogate pair, as cut texts in JSON have it: no tokenizer reads that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LoraError(
            f"character {error.start} of its text is {text[error.start]!r}, half of a surrogate pair, which is no "
            "character by itself: take it out."
        ) from None


@functools.lru_cache(16)
def _compiled(make: Any, source: str, special: tuple[tuple[str, str], ...], now: datetime) -> Any:
    template = make(source, dict(special), now)
    template.check()
    return template


def _pairs(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return pairs as an array [n, 2]. np.array takes three times as long, and there is one for each token."""
    return np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)


# Files ----------------------------------------------------------------------------------------------------------------


def _read(path: Path, most: int) -> bytes:
    with open_file(path) as file:
        if size_of(file) > most:
            raise LoraError(f"{path} has more than {most:,} bytes.")
        return file.read(most)


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_json(path, LARGEST_CONFIG, "config", finite=False)
    if not isinstance(found, dict):
        raise LoraError(f"{path} is {short(found)}, expected an object.")
    return found


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of special tokens, each of which a file has as it is, or as an object with its content."""
    found = {}
    for name in SPECIAL:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
        elif token is not None:
            raise LoraError(f"tokenizer_config.json: {name} is {short(token)}, expected text.")
    return found


def _ids(path: Path) -> list[int]:
    """Return the ids of `eos_token_id`: none, one, or a list."""
    found = _config(path).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise LoraError(f"{path}: eos_token_id is {short(found)}, expected ids of tokens.")
    return ids


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates by their names: a file of its own comes before what the config says."""
    found = config.get("chat_template") or {}
    where = "tokenizer_config.json: chat_template"
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
            raise LoraError(f"{where} is {short(found)}, expected a list of objects with a name and a template.")
        found = {one["name"]: one.get("template") for one in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise LoraError(f"{where} is {short(found)}, expected text.")
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            found = {**found, "default": _read(path, LARGEST_TEMPLATE).decode()}
        except UnicodeDecodeError as error:
            raise LoraError(f"{path} is no text in UTF-8: {error}.") from None
    for name, text in found.items():
        if len(text) > LARGEST_TEMPLATE:
            raise LoraError(f"the chat template {short(name)} has more than {LARGEST_TEMPLATE:,} characters.")
    return found
