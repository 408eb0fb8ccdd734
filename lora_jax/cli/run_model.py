"""The commands that run a model: `generate` and `eval`, and what they share with `train`."""

import math
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from lora_jax import recipes
from lora_jax.cli.folders import OWN, PEFT, Base, format_in, read_modules
from lora_jax.cli.output import print_json, say
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable
from lora_jax.interop.conversions import About
from lora_jax.interop.module_adapters import for_parameters
from lora_jax.interop.peft.load import load_peft
from lora_jax.recipes import chat
from lora_jax.recipes.examples import Conversation, Preference
from lora_jax.recipes.objectives import make_loss
from lora_jax.recipes.tokens import TokenizedPairs
from lora_jax.recipes.training_run import Data, make_batches
from lora_jax.recipes.wrappers import UNREAD

Rest = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ADAPTERS] PROMPT")]
RestData = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ADAPTERS] DATA")]
MOST_EXPONENT = 709.0  # of e in fp64
Bits = Literal[4, 8, 16]
Dtype = Literal["auto", "float32", "bfloat16"]


def generate(
    model: Base,
    prompt: Rest,
    /,
    system: str = "",
    raw: bool = False,
    count: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    bits: Bits = 16,
    dtype: Dtype = "auto",
) -> int:
    """Write what a model answers to a prompt, with adapters or without.

    Example: lora-jax generate SmolLM2-135M-Instruct runs/first/peft "Who are you?"

    Args:
        model: a folder with config.json, safetensors and tokenizer.json.
        prompt: the adapters, of HF PEFT, mlx-lm or GGUF, if there are any; and the text.
        system: what the conversation begins with.
        raw: go on with the text as it is, without the chat template.
        count: the most tokens to write.
        temperature: 0 for the likeliest token each time; else tokens are drawn, the more freely the higher it is.
        top_p: draw from the likeliest tokens that have this share of the probability together.
        seed: of what is drawn.
        bits: of the frozen weights of linear layers.
        dtype: of what is computed; auto is that of the files.
    """
    adapters, text = _one_or_two(prompt, "a prompt")
    format = _format(adapters)
    options = recipes.Options(bits=bits, dtype=dtype, seed=seed)
    options.check()
    tokenizer = load_tokenizer(model)
    loaded = load(model, options)
    if not raw and tokenizer.templates:
        messages = [{"role": "system", "content": system}] if system else []
        conversation = Conversation((*messages, {"role": "user", "content": text}))
        text = chat.prompt(conversation, tokenizer.template())
    ids = tokenizer.encode(text, special=raw or not tokenizer.templates).ids
    if not ids:
        raise LoraError("the prompt has no tokens: give some text, or leave out --raw.")
    ends, key = tokenizer.eos_ids or loaded.config.eos, jax.random.key(seed)
    [answer] = loaded.generate(
        [ids],
        _adapters(adapters, format, model, loaded),
        count=count,
        temperature=temperature,
        top_p=top_p,
        key=key,
        eos=ends,
    )
    show(tokenizer.decode(answer).splitlines() or [""])
    return 0


def evaluate(
    model: Base,
    data: RestData,
    /,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    bits: Bits = 16,
    dtype: Dtype = "auto",
    beta: float = 0.1,
    skip_bad: bool = False,
    json: bool = False,
) -> int:
    """Measure a model with examples: the mean loss of the tokens of answers, or DPO's of pairs.

    Example: lora-jax eval SmolLM2-135M-Instruct runs/first/peft held_out.jsonl

    Args:
        model: a folder with config.json, safetensors and tokenizer.json.
        data: the adapters, of HF PEFT, mlx-lm or GGUF, if there are any; and the file of examples.
        max_length: the longest example in tokens; of longer ones the end is cut off.
        batch_tokens: places for tokens that are computed at a time.
        bits: of the frozen weights of linear layers.
        dtype: of what is computed; auto is that of the files.
        beta: of DPO.
        skip_bad: leave out and count lines that are no examples, in place of an error.
        json: print JSON.
    """
    options = recipes.Options(
        bits=bits, dtype=dtype, beta=beta, max_length=max_length, batch_tokens=batch_tokens, skip_bad=skip_bad
    )
    options.check()
    adapters, file = _one_or_two(data, "a file of examples")
    format = _format(adapters)
    tokenizer = load_tokenizer(model)
    tokens = read_tokens(Path(file), tokenizer, options, lambda lines: None if json else show(lines))
    loaded = load(model, options)
    loss = jax.jit(make_loss(loaded, options, isinstance(tokens, TokenizedPairs)))
    found = recipes.evaluate(
        loss, _adapters(adapters, format, model, loaded), loaded.params, make_batches(tokens, options, None)
    )
    if json:
        print_json({"loss": found, "examples": len(tokens)})
    elif isinstance(tokens, TokenizedPairs):
        say(f"Loss {found:.4f} of {len(tokens):,} pairs; without adapters it is {math.log(2):.4f}.")
    else:
        say(f"Loss {found:.4f}, perplexity {_exp(found):.2f}, of {len(tokens):,} examples.")
    return 0


def _exp(x: float) -> float:
    return math.exp(x) if x < MOST_EXPONENT else math.inf


def _one_or_two(given: tuple[str, ...], what: str) -> tuple[str | None, str]:
    """Return the adapters, if they are given, and what comes after them."""
    if len(given) not in (1, 2):
        raise LoraError(f"expected {what}, and before it the adapters if there are any; found {len(given)} arguments.")
    return (given[0] if len(given) == 2 else None), given[-1]


def _format(adapters: str | None) -> str | None:
    """Return the format of adapters, which is asked before the model is read.

    Raises:
        LoraError: it is none whose modules have the names that they have in the model's files.
    """
    if adapters is None:
        return None
    if (found := format_in(Path(adapters), None)) == OWN:
        raise LoraError(
            f"{adapters} is no folder of HF PEFT or mlx-lm, and no GGUF: write adapters of lora_jax.checkpoint as one "
            "of these, by lora-jax convert."
        )
    return found


def _adapters(path: str | None, format: str | None, folder: Path, model: recipes.Model) -> dict[str, Adapter]:
    """Return the adapters of a model, which is of this folder."""
    if path is None or format is None:
        return {}
    if format != PEFT:
        found = read_modules(Path(path), format, About(folder))
        assert found is not None  # PEFT alone has folders that have to be read as a whole
        return for_parameters(found, model.params, model.key_map, Path(path))
    adapters, others = load_peft(path, model.params, model.key_map)
    if others:
        raise LoraError(f"{path} holds {next(iter(others))!r} whole, which is not read here: merge it first.")
    return adapters


# What they share ------------------------------------------------------------------------------------------------------


def load_tokenizer(model: Path, now: datetime | None = None) -> recipes.Tokenizer:
    """Return the tokenizer of a folder, which fits its model: that is asked before any weight is read.

    Raises:
        LoraError: there is no such folder; its tokenizer cannot be read, or has more tokens than the model.
    """
    if not model.is_dir():
        raise LoraError(
            f"{model} is {'a file' if model.exists() else 'not there'}, expected a folder with config.json, "
            "safetensors and tokenizer.json. Nothing is downloaded here: `hf download NAME --local-dir FOLDER`, of the "
            "package huggingface_hub, brings a model of the Hugging Face Hub."
        )
    tokenizer = recipes.Tokenizer.load(model, now)
    tokenizer.check(recipes.read_config(model).vocabulary)
    return tokenizer


def load(model: Path, options: recipes.Options, mesh: Any = None) -> recipes.Model:
    """Return the model of a folder, as the options ask for it."""
    dtype = None if options.dtype == "auto" else jnp.dtype(options.dtype)
    loaded = recipes.load(model, dtype, mesh, None if options.bits == 16 else options.bits)
    if loaded.config.wrapper and jax.process_index() == 0:
        left = " and ".join(UNREAD)
        print(printable(f"{model} is read for texts alone: {left} are left out."), file=sys.stderr)
    return loaded


def read_tokens(
    path: Path, tokenizer: recipes.Tokenizer, options: recipes.Options, show: Callable[[list[str]], None]
) -> Data:
    """Return the examples of a file as tokens, and show how many they are."""
    examples = recipes.read_examples(path, options.skip_bad)
    found: Data
    if is_pairs(path, options):
        found = recipes.tokenized_pairs(examples, tokenizer, options.max_length, skip_bad=options.skip_bad)
        counts = found.chosen.counts
    else:
        found = recipes.tokenized(
            examples, tokenizer, options.max_length, too_long=options.too_long, skip_bad=options.skip_bad
        )
        counts = found.counts
    show([f"{path}:", *str(counts).splitlines()])
    return found


def is_pairs(path: Path, options: recipes.Options) -> bool:
    """Return whether a file has preferences, by its first example."""
    return isinstance(next(iter(recipes.read_examples(path, options.skip_bad))), Preference)


def show(lines: Iterable[str]) -> None:
    """Print lines, which may be a model's or a stranger's: none of them can steer the terminal."""
    for line in lines:
        say(line)
