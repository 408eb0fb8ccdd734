"""SmolLM2, a small Llama, in Flax: its layers are stacked and run by one scan, each recomputed in the backward pass.

Allal et al. 2025, "SmolLM2: When Smol Goes Big", arXiv 2502.02737; Touvron et al. 2023, "LLaMA", arXiv 2302.13971.
The weights come out of a GGUF file, where they are kept in 4 bits. The model knows nothing of LoRA. Its parameters are
named and shaped as `lora_jax.key_maps.LLAMA.stacked()` says, so adapters of it are adapters of the torch model as well.

Axes: B rows, T tokens, S tokens to attend to, V vocabulary, D hidden, H heads, K heads of keys and values, R of a head.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax import LoraError, key_maps
from lora_jax.bases import Stored
from lora_jax.interop.gguf import file as gguf

Params = dict[str, Any]
KEY_MAP = key_maps.LLAMA.stacked()


@dataclass(frozen=True)
class Config:
    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocabulary: int = 49152
    rope_base: float = 100_000.0
    epsilon: float = 1e-5
    dtype: Any = jnp.float32  # of activations and products; the parameters may be kept in another

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


# A model for tests, whose tokens are bytes.
TINY = Config(layers=2, hidden=32, heads=4, kv_heads=2, intermediate=64, vocabulary=259)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in the first `filled` of S slots; and where each of these tokens is."""

    keys: jax.Array  # [layers, B, S, K, R]
    values: jax.Array  # [layers, B, S, K, R]
    positions: jax.Array  # i32 [B, S]
    segments: jax.Array  # i32 [B, S], -1 where a slot is empty
    filled: jax.Array  # i32

    @classmethod
    def empty(cls, config: Config, rows: int, slots: int) -> "Cache":
        zeros = jnp.zeros((config.layers, rows, slots, config.kv_heads, config.head_dim), config.dtype)
        nowhere = jnp.full((rows, slots), -1, jnp.int32)
        return cls(zeros, zeros, nowhere, nowhere, jnp.zeros((), jnp.int32))


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, seen: Any, filled: Any, rotation: jax.Array, mask: jax.Array) -> tuple[Any, Any]:
        c = self.config
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=c.dtype)
        q = rotate(dense((c.heads, c.head_dim), name="q_proj")(x), rotation)
        k = rotate(dense((c.kv_heads, c.head_dim), name="k_proj")(x), rotation)
        v = dense((c.kv_heads, c.head_dim), name="v_proj")(x)
        if seen is not None:
            k, v = seen = tuple(_write(old, new, filled) for old, new in zip(seen, (k, v), strict=True))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])  # H / K heads share one of keys and values
        return dense(c.hidden, axis=(-2, -1), name="o_proj")(y), seen


class Mlp(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate, up = (
            nn.Dense(c.intermediate, use_bias=False, dtype=c.dtype, name=name)(x) for name in ("gate_proj", "up_proj")
        )
        return nn.Dense(c.hidden, use_bias=False, dtype=c.dtype, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, seen: Any, filled: Any, rotation: jax.Array, mask: jax.Array) -> tuple[Any, Any]:
        h = _norm(self.config, "input_layernorm")(x)
        y, seen = Attention(self.config, name="self_attn")(h, seen, filled, rotation, mask)
        x = x + y
        return x + Mlp(self.config, name="mlp")(_norm(self.config, "post_attention_layernorm")(x)), seen


class Body(nn.Module):
    """All of the decoder; as in the torch model, its paths begin with `model/`."""

    config: Config

    @nn.compact
    def __call__(
        self, ids: jax.Array, positions: jax.Array, segments: jax.Array, cache: Cache | None, at: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        embed = nn.Embed(c.vocabulary, c.hidden, dtype=c.dtype, name="embed_tokens")
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, name="layers")

        seen = filled = None
        there, parts = positions, segments  # of the tokens to attend to
        if cache is not None:
            seen, filled = (cache.keys, cache.values), cache.filled
            there, parts = _write(cache.positions, positions, filled), _write(cache.segments, segments, filled)
        mask = (parts[:, None] == segments[:, :, None]) & (there[:, None] <= positions[:, :, None])  # [B, T, S]
        x, seen = layers(embed(ids), seen, filled, rotation(positions, c), mask)
        if cache is not None:
            cache = Cache(seen[0], seen[1], there, parts, cache.filled + ids.shape[1])
        if at is not None:
            x = jnp.take_along_axis(x, at[:, :, None], axis=1)
        return embed.attend(_norm(c, "norm")(x)), cache


class Decoder(nn.Module):
    """Token ids [B, T] -> logits of each next token [B, T, V], and the cache with these tokens added.

    A token attends to those of its own segment whose position is not after its own: several texts in one row have
    segments and positions of their own, and padding is a segment too. Tokens in the cache are among them. Where not
    all logits are wanted, `at` [B, N] says which tokens' are: the head is a fifth of the work.
    """

    config: Config = Config()

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        at: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        if segments is None:
            segments = jnp.ones_like(ids)
        return Body(self.config, name="model")(ids, positions, segments, cache, at)


def rotation(positions: jax.Array, config: Config) -> jax.Array:
    """cos and sin of each position's angles [2, B, T, 1, R / 2]. Su et al. 2021, arXiv 2104.09864."""
    half = config.head_dim // 2
    rates = config.rope_base ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * rates[None, None, None]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """[B, T, H, R] with entry i and entry i + R / 2 as the two coordinates, as in the torch model."""
    (a, b), (cos, sin) = jnp.split(x.astype(jnp.float32), 2, axis=-1), rotation
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _norm(config: Config, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.epsilon, dtype=config.dtype, name=name)


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """[B, S, ...] with the tokens [B, T, ...] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


# Generation -----------------------------------------------------------------------------------------------------------

Forward = Callable[..., tuple[jax.Array, Any]]  # (ids, positions, segments, cache, at) -> (logits, cache)


def generate(forward: Forward, config: Config, ids: jax.Array, mask: jax.Array, count: int, stop: int) -> jax.Array:
    """The likeliest next tokens, one after the other [B, count]; `stop` again and again after the first one.

    Args:
        forward: the decoder with its parameters, and whatever else belongs to them.
        ids: prompts [B, T], padded on the left.
        mask: False at padding [B, T].
    """
    rows, length = ids.shape
    positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    cache = Cache.empty(config, rows, length + count - 1)
    logits, cache = forward(ids, positions, mask.astype(jnp.int32), cache, jnp.full((rows, 1), length - 1))
    token, position = logits[:, -1].argmax(-1).astype(jnp.int32), positions[:, -1] + 1

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        token, position, cache = carry
        logits, cache = forward(token[:, None], position[:, None], jnp.ones_like(token)[:, None], cache, None)
        following = jnp.where(token == stop, stop, logits[:, -1].argmax(-1).astype(jnp.int32))
        return (following, position + 1, cache), following

    _, tokens = jax.lax.scan(step, (token, position, cache), length=count - 1)
    return jnp.concatenate([token[:, None], tokens.T], axis=1)


def pad_prompts(prompts: list[list[int]], multiple: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [B, T] for `generate`, T a multiple: so that few lengths are compiled."""
    length = -(-max(map(len, prompts)) // multiple) * multiple
    ids = np.array([[0] * (length - len(row)) + row for row in prompts], np.int32)
    return ids, np.arange(length) >= np.array([[length - len(row)] for row in prompts])


# Weights and tokenizer out of a GGUF file -----------------------------------------------------------------------------

_SIZES = {
    "layers": "llama.block_count",
    "hidden": "llama.embedding_length",
    "heads": "llama.attention.head_count",
    "kv_heads": "llama.attention.head_count_kv",
    "intermediate": "llama.feed_forward_length",
    "vocabulary": "llama.vocab_size",
    "rope_base": "llama.rope.freq_base",
    "epsilon": "llama.attention.layer_norm_rms_epsilon",
}
_ROTATED = "llama.rope.dimension_count"
_SCALING = "llama.rope.scaling.type"


class File(NamedTuple):
    """A GGUF file: what it says of a model and its tokenizer, and where its tensors are."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.Place]

    def read(self, name: str) -> np.ndarray:
        """A tensor, in fp32."""
        return gguf.read(self.path, self.tensors[name]).astype(np.float32)


def open_gguf(path: Path) -> File:
    header = gguf.header(path, lists=True)
    return File(path, header.facts, gguf.places(path, header))


def config_of(file: File) -> Config:
    """The sizes of a Llama.

    Raises:
        LoraError: another architecture; a size is missing, or is not possible.
    """
    about = file.metadata
    if (found := about.get("general.architecture")) != "llama":
        raise LoraError(f"the architecture is {found!r}, expected 'llama'.")
    if missing := [key for key in (*_SIZES.values(), _ROTATED) if key not in about]:
        raise LoraError(f"the metadata lack {', '.join(missing)}.")
    for ours, key in (*_SIZES.items(), ("", _ROTATED)):
        kind = float if ours in ("rope_base", "epsilon") else int
        if type(about[key]) is not kind or not about[key] > 0:
            raise LoraError(f"{key} is {about[key]!r}, expected a number above 0 ({kind.__name__}).")
    if (scaling := about.get(_SCALING, "none")) != "none":
        raise LoraError(f"{_SCALING} is {scaling!r}; this decoder rotates without any.")
    config = Config(**{ours: about[key] for ours, key in _SIZES.items()})
    if config.hidden % config.heads or config.heads % config.kv_heads or config.head_dim % 2:
        raise LoraError(
            f"{config.heads} heads and {config.kv_heads} of keys and values cannot share {config.hidden} numbers."
        )
    if about[_ROTATED] != config.head_dim:
        raise LoraError(f"{about[_ROTATED]} entries of a head are rotated, expected all {config.head_dim}.")
    if config.layers > len(file.tensors):
        raise LoraError(f"there are {config.layers} layers, but no more than {len(file.tensors)} tensors.")
    return config


def load(file: File, config: Config) -> Params:
    """The decoder's parameters, in fp32.

    Raises:
        LoraError: a tensor is missing, is one that this decoder has no place for, or has another shape.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), stored(file, config))


def stored(file: File, config: Config) -> Params:
    """What `load` gives, each array left in the file until `lora.bases.quantize` reads it.

    The key map says which tensor each is, and how it lies there.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    placed = KEY_MAP.match(shapes)
    expected = [gguf_name(name) for place in placed.values() for name in place.tensors().values()]
    if wrong := sorted(set(expected) ^ set(file.tensors)):
        raise LoraError(
            f"its tensors are not those of this decoder of {config.layers} layers; missing or too many: {wrong[:5]}."
        )

    def read(path: str) -> np.ndarray:
        place = placed[path]
        whole = np.empty(place.shape, np.float32)
        for index, name in place.tensors().items():
            whole[place.where(index)] = place.from_torch(torch_tensor(file, config, name), index)
        return whole

    return unflatten_dict(
        {
            path: Stored(jax.ShapeDtypeStruct(shape, jnp.float32), functools.partial(read, path))
            for path, shape in shapes.items()
        },
        sep="/",
    )


def torch_tensor(file: File, config: Config, name: str) -> np.ndarray:
    """A tensor in fp32 as torch has it, by torch's name."""
    tensor = file.read(gguf_name(name))
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None or len(tensor) != heads * config.head_dim:  # any other shape is refused where it is used
        return tensor
    return split_halves(tensor, heads)


def split_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k [heads * R, in] in torch's order; llama.cpp has the coordinates of a rotation side by side."""
    pairs = tensor.reshape(heads, -1, 2, tensor.shape[-1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def abstract_params(config: Config) -> Any:
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def init(config: Config, key: jax.Array) -> Params:
    """Random parameters."""
    return jax.jit(Decoder(config).init)(key, jnp.zeros((1, 2), jnp.int32))["params"]


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}


def gguf_name(torch: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`"""
    inner = torch.removeprefix("model.").removesuffix(".weight")
    if not inner.startswith("layers."):
        return f"{_NAMES[inner]}.weight"
    _, i, module = inner.split(".", maxsplit=2)
    return f"blk.{i}.{_NAMES[module]}.weight"


START, STOP = "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def load_tokenizer(file: File) -> Tokenizer:
    """The file's own: byte pairs as GPT-2's, with a token for each digit.

    Raises:
        LoraError: the file has another tokenizer, or parts of one that do not fit together.
    """
    about = file.metadata
    kind = (about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise LoraError(f"the tokenizer is {kind}, expected ('gpt2', 'smollm').")
    tokens, merges, kinds = (_list(about, *what) for what in (("tokens", str), ("merges", str), ("token_type", int)))
    known, vocabulary = set(tokens), about.get(_SIZES["vocabulary"])
    if not len(known) == len(tokens) == len(kinds) == vocabulary:
        raise LoraError(
            f"the tokenizer has {len(tokens)} tokens, {len(known)} of them different, and {len(kinds)} kinds of them; "
            f"expected as many as the model has, {vocabulary}."
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not known.issuperset((*pair, "".join(pair))):
            raise LoraError(f"the tokenizer merges {' '.join(pair)!r}, expected two tokens that make a third.")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    if missing := [token for token in (START, STOP) if token not in control]:
        raise LoraError(f"the tokenizer has no control token {missing[0]}, which chats are made of.")
    return make_tokenizer(tokens, pairs, control)


def _list(about: dict[str, Any], name: str, kind: type) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    found = about.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, kind) for entry in found):
        raise LoraError(f"{key} is missing, or is no list of {kind.__name__}.")
    return found


def tiny_tokenizer() -> Tokenizer:
    """A token for each byte, after those of SmolLM2 that chats need."""
    control = ["<|endoftext|>", START, STOP]
    return make_tokenizer([*control, *sorted(pre_tokenizers.ByteLevel.alphabet())], [], control)


def make_tokenizer(tokens: list[str], merges: list[tuple[str, str]], control: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def chat(request: str, system: str = SYSTEM) -> str:
    """What is said to the model, as its chat template has it, up to where its answer begins. STOP ends the answer."""
    return f"{START}system\n{system}{STOP}\n{START}user\n{request}{STOP}\n{START}assistant\n"
