"""MiniLM-L6, a small BERT, in Flax; and its weights, from and to the safetensors file that they are published in.

Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", arXiv 2002.10957; the weights are those of
sentence-transformers/all-MiniLM-L6-v2. The model knows nothing of LoRA.

Axes: B sentences, T tokens, D hidden, H heads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized
from tokenizers import Tokenizer

from lora_jax import key_maps
from lora_jax.checkpoints.atomic_dir import written_file

Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    layers: int = 6
    hidden: int = 384
    heads: int = 12
    intermediate: int = 1536
    vocabulary: int = 30522
    positions: int = 512


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        split = (*x.shape[:2], c.heads, c.hidden // c.heads)
        q, k, v = (nn.Dense(c.hidden, name=name)(x).reshape(split) for name in ("query", "key", "value"))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(split[-1])
        weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9))
        y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        return _norm("norm")(x + nn.Dense(c.hidden, name="output")(y))


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Attention(self.config, name="attention")(x, mask)
        h = nn.gelu(nn.Dense(self.config.intermediate, name="intermediate")(x), approximate=False)
        return _norm("norm")(x + nn.Dense(self.config.hidden, name="output")(h))


class Encoder(nn.Module):
    """Token ids [B, T] and a mask [B, T], False at padding -> the mean of the last layer's states [B, D]."""

    config: Config = Config()

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        x = nn.Embed(c.vocabulary, c.hidden, name="word")(ids)
        x = x + nn.Embed(c.positions, c.hidden, name="position")(jnp.arange(ids.shape[1]))[None]
        x = x + nn.Embed(2, c.hidden, name="token_type")(jnp.zeros_like(ids))
        x = _norm("norm")(x)
        for i in range(c.layers):
            x = Block(c, name=f"layer_{i}")(x, mask)
        kept = mask[:, :, None].astype(x.dtype)
        return (x * kept).sum(1) / kept.sum(1)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


def load(path: Path, config: Config = Config()) -> Params:
    """The encoder's parameters from the published file. Torch keeps linear weights as [out, in]: transposed here."""
    tensors = load_file(path)
    flat = {
        ours: jnp.asarray(tensors[theirs].T if transposed else tensors[theirs])
        for ours, theirs, transposed in _names(config)
    }
    return unflatten_dict(flat)


def save(path: Path, params: Params, original: Path, config: Config = Config()) -> None:
    """Write parameters under the names, shapes and dtypes of the original file; what the encoder does not use stays."""
    tensors, flat = load_file(original), flatten_dict(params)
    for ours, theirs, transposed in _names(config):
        value = np.asarray(flat[ours], tensors[theirs].dtype)
        tensors[theirs] = np.ascontiguousarray(value.T if transposed else value)
    with written_file(path) as new:
        # Written by Python, the file has the rights of a new one; of safetensors' own nobody else could read it.
        new.write_bytes(serialized(tensors, metadata={"format": "pt"}))


def load_tokenizer(path: Path, length: int) -> Tokenizer:
    """The published file pads everything to 128 tokens; here batches decide, and longer sentences are cut."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


# Where the kernels are in torch's `BertModel`, for the files of HF PEFT.
KEY_MAP = key_maps.KeyMap(
    *(
        key_maps.linear(f"layer_{{i}}/attention/{name}/kernel", f"encoder.layer.{{i}}.attention.self.{name}")
        for name in ("query", "key", "value")
    ),
    key_maps.linear("layer_{i}/attention/output/kernel", "encoder.layer.{i}.attention.output.dense"),
    key_maps.linear("layer_{i}/intermediate/kernel", "encoder.layer.{i}.intermediate.dense"),
    key_maps.linear("layer_{i}/output/kernel", "encoder.layer.{i}.output.dense"),
)


def _names(config: Config) -> list[tuple[tuple[str, ...], str, bool]]:
    """(our path, their name, whether transposed) of every parameter."""
    names: list[tuple[tuple[str, ...], str, bool]] = [
        (("word", "embedding"), "embeddings.word_embeddings.weight", False),
        (("position", "embedding"), "embeddings.position_embeddings.weight", False),
        (("token_type", "embedding"), "embeddings.token_type_embeddings.weight", False),
    ]

    def norm(ours: tuple[str, ...], theirs: str) -> None:
        names.append(((*ours, "scale"), f"{theirs}.weight", False))
        names.append(((*ours, "bias"), f"{theirs}.bias", False))

    def dense(ours: tuple[str, ...], theirs: str) -> None:
        names.append(((*ours, "kernel"), f"{theirs}.weight", True))
        names.append(((*ours, "bias"), f"{theirs}.bias", False))

    norm(("norm",), "embeddings.LayerNorm")
    for i in range(config.layers):
        ours, theirs = f"layer_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            dense((ours, "attention", name), f"{theirs}.attention.self.{name}")
        dense((ours, "attention", "output"), f"{theirs}.attention.output.dense")
        norm((ours, "attention", "norm"), f"{theirs}.attention.output.LayerNorm")
        dense((ours, "intermediate"), f"{theirs}.intermediate.dense")
        dense((ours, "output"), f"{theirs}.output.dense")
        norm((ours, "norm"), f"{theirs}.output.LayerNorm")
    return names
