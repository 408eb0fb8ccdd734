"""Which examples are held out from training, and what the model answers to them."""

import hashlib
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.recipes.model import Model
from lora_jax.recipes.tokenizer import Tokenizer
from lora_jax.recipes.tokens import Tokenized, TokenizedPairs

Data = TypeVar("Data", bound=Tokenized | TokenizedPairs)
OPENING = 16  # tokens of a text that has no prompt, which it is gone on from


def hold_out(data: Data, share: float, seed: int = 0) -> tuple[Data, Data | None]:
    """Return the examples to train with, and those that are held out; None if there are to be none.

    Which ones is decided by a hash of each prompt, whatever the order in the file; examples of one prompt are on one
    side.

    Args:
        data: examples or pairs.
        share: of the examples to hold out, at least one of them.
        seed: other ones for another seed.

    Returns:
        The two parts, of the kind of `data`.

    Raises:
        LoraError: nothing is left to train with.

    >>> import numpy as np, lora_jax as lora
    >>> from lora_jax.recipes.tokens import Tokenized
    >>> tokens = Tokenized(np.arange(9, dtype=np.int32), np.arange(9) % 3 > 0, np.array([0, 3, 6, 9]))
    >>> train, held_out = lora.recipes.hold_out(tokens, share=0.2)
    >>> len(train), len(held_out)
    (2, 1)
    """
    if not share:
        return data, None
    own = data.chosen if isinstance(data, TokenizedPairs) else data
    hashes = np.array([_hash(own, n, seed) for n in range(len(own))])
    most = np.sort(hashes)[max(1, round(share * len(own))) - 1]
    held = hashes <= most
    if held.all():
        raise LoraError(
            f"eval_split={share} of {len(own)} examples, of {len(set(hashes.tolist()))} different prompts, leaves none "
            "to train with: those of one prompt stay together. Give more examples, a smaller share, or 0 for none."
        )
    train, held_out = (data.select(np.flatnonzero(chosen)) for chosen in (~held, held))
    return cast(Data, train), cast(Data, held_out)


def _hash(data: Tokenized, n: int, seed: int) -> int:
    ids, first = _example(data, n)
    key = ids[:first] if first > 1 else ids
    return int.from_bytes(hashlib.sha256(f"{seed} {key.tolist()}".encode()).digest()[:7])


def _example(data: Tokenized, n: int) -> tuple[np.ndarray, int]:
    """Return the tokens of an example, and which one is the first that is learned."""
    here = slice(data.starts[n], data.starts[n + 1])
    return data.ids[here], int(data.learned[here].argmax())


@dataclass(frozen=True)
class Sample:
    """A prompt, and what follows it.

    Attributes:
        prompt: as text.
        answer: of the example.
        before: what the base writes.
        after: what it writes with the adapters.
    """

    prompt: str
    answer: str
    before: str
    after: str


def write_samples(
    model: Model,
    adapters: dict[str, Adapter],
    tokenizer: Tokenizer,
    held_out: Tokenized | TokenizedPairs,
    count: int,
    length: int = 64,
) -> list[Sample]:
    """Return what the model writes after the prompts of some examples, with adapters and without.

    Args:
        model, adapters: what writes.
        tokenizer: of the model.
        held_out: examples.
        count: how many of them.
        length: the most tokens of an answer.

    Returns:
        A `Sample` for each: the prompt, the answer of the example, and what the model writes before and after.

    >>> import json, tempfile, tokenizers, jax, jax.numpy as jnp, lora_jax as lora
    >>> from pathlib import Path
    >>> from lora_jax.recipes.examples import Completion
    >>> facts = {"model_type": "llama", "vocab_size": 4, "hidden_size": 8, "intermediate_size": 8}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     model = lora.recipes.abstract(folder, jnp.float32)
    >>> model = model.replace(params=jax.tree.map(lambda like: jnp.full(like.shape, 0.1, like.dtype), model.params))
    >>> tokenizer = lora.recipes.Tokenizer(words, {"eos_token": "</s>"}, [3])
    >>> tokens = lora.recipes.tokenized([Completion("a a", " b")], tokenizer, max_length=8)
    >>> [sample] = lora.recipes.write_samples(model, {}, tokenizer, tokens, count=1, length=2)
    >>> sample.prompt, sample.answer, sample.after
    ('a a', 'b </s>', 'a a')
    """
    own = held_out.chosen if isinstance(held_out, TokenizedPairs) else held_out
    prompts, answers = [], []
    for n in range(min(count, len(own))):
        ids, first = _example(own, n)
        first = first if first > 1 else min(OPENING, len(ids) - 1)
        prompts.append(ids[:first].tolist())
        answers.append(ids[first : first + length].tolist())
    if not prompts:
        return []
    ends = tokenizer.eos_ids or model.config.eos
    before, after = (model.generate(prompts, given, count=length, eos=ends) for given in ({}, adapters))
    texts = [[tokenizer.decode(ids) for ids in column] for column in (prompts, answers, before, after)]
    return [Sample(*row) for row in zip(*texts, strict=True)]
