"""The lines of a key map: which module of torch a parameter is, and what its axes are there."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_jax.core.errors import LoraError
from lora_jax.interop.name_templates import placeholders


class ModuleKind(NamedTuple):
    """How torch stores the weight of one kind of module."""

    axes: str  # the weight's axes in torch's order
    suffix: str  # what the tensor's name has after the module's


MODULE_KINDS = {
    "linear": ModuleKind("out in", ".weight"),
    "conv1d": ModuleKind("in out", ".weight"),  # transformers' Conv1D, of GPT-2
    "embedding": ModuleKind("in out", ".weight"),
    "conv": ModuleKind("out in window", ".weight"),
    "experts": ModuleKind("expert out in", ""),  # one parameter for all experts
    "experts_transposed": ModuleKind("expert in out", ""),
    "array": ModuleKind("keep out", ""),
}


HEAD_FACTOR = "1/sqrt(head_dim)"
Factor = float | Literal["1/sqrt(head_dim)"]  # head_dim is the size of the last axis of outputs


@dataclass(frozen=True)
class Entry:
    """One line of a key map. Made by `linear`, `embedding`, `conv`, `conv1d`, `experts` or `array`.

    Attributes:
        path: of the parameter, such as "layer_{i}/query/kernel".
        name: of the module, such as "encoder.layer.{i}.attention.self.query"; of arrays and experts, of the tensor.
        axes: a word for each axis of the JAX array.
        kind: of the module: "linear", "conv1d", "embedding", "conv", "experts", "experts_transposed" or "array".
        part: which part of the module's outputs it is, if torch joins several parameters in one module.
        interleaved: whether the last axis of outputs holds pairs, which torch keeps as two halves.
        factor: what torch's numbers are times this.

    Raises:
        LoraError: the axes are no words of this kind, or do not fit the names; the factor is no number.

    >>> import lora_jax as lora
    >>> lora.key_maps.Entry("up/kernel", "mlp.up", "in out", "linear") == lora.key_maps.linear("up/kernel", "mlp.up")
    True
    """

    path: str  # of the parameter, such as "layer_{i}/query/kernel"
    name: str  # of the module, such as "encoder.layer.{i}.attention.self.query"; of arrays and experts, of the tensor
    axes: str  # a word for each axis of the JAX array
    kind: str  # of the module, a key of MODULE_KINDS
    part: int | None = None  # which part of the module's outputs it is, if torch joins several parameters in one module
    interleaved: bool = False  # the last axis of outputs holds pairs, which torch keeps as two halves
    factor: Factor = 1.0  # what torch's numbers are times this

    def __post_init__(self) -> None:
        words, known = self.axes.split(), placeholders(self.path)
        if named := [word for word in known if "|" in word]:
            raise LoraError(
                f"{self.path!r} has {{{named[0]}}}, which stands for the names of modules along an axis of a parameter."
            )
        if self.factor != HEAD_FACTOR and (isinstance(self.factor, str) or not 0 < abs(self.factor) < math.inf):
            raise LoraError(f"the factor of {self.path!r} is {self.factor!r}, expected a number or {HEAD_FACTOR!r}.")
        unknown = [name for name in placeholders(self.name) if name not in known and name not in words]
        unknown += [name for i, name in enumerate(known) if name in known[:i]]  # which of the two numbers it would be
        plain = [word.removesuffix("*") for word in words]
        foreign = [w for w in plain if w not in ("in", "out", "window", "expert", "keep", *placeholders(self.name))]
        if not words or sum(word.endswith("*") for word in words) > 1 or unknown or foreign:
            found = f"unknown are {', '.join([*unknown, *foreign])}" if unknown or foreign else "one * at most"
            raise LoraError(
                f"the axes {self.axes!r} of {self.path!r} for {self.name!r}: {found}. Expected words such as 'in out', "
                "with a {name} of the module that is not in the path as an axis."
            )

    @property
    def suffix(self) -> str:
        """Return what the name of the weight has after that of the module."""
        return MODULE_KINDS[self.kind].suffix

    @property
    def moves_outputs(self) -> bool:
        """Return whether the outputs have another order or size than torch's."""
        return self.interleaved or self.factor != 1

    def factor_of(self, head_dim: int, inverse: bool = False) -> float:
        """Return what torch's numbers are times, or with `inverse` what ours are times to be torch's.

        Args:
            head_dim: the size of the last axis of outputs.
            inverse: the other way round.
        """
        if self.factor == HEAD_FACTOR:
            return math.sqrt(head_dim) if inverse else 1 / math.sqrt(head_dim)
        return 1 / float(self.factor) if inverse else float(self.factor)

    @property
    def is_of_experts(self) -> bool:
        """Return whether torch keeps the weights of all experts in one parameter."""
        return self.kind.startswith("experts")

    def words(self, ndim: int) -> tuple[str, ...] | None:
        """Return a word for each of `ndim` axes, or None if there cannot be that many.

        Args:
            ndim: the number of axes of a parameter.
        """
        words = self.axes.split()
        more = ndim - len(words)
        starred = next((i for i, word in enumerate(words) if word.endswith("*")), None)
        if more < 0 or (more and starred is None):
            return None
        if starred is not None:
            words[starred : starred + 1] = [words[starred][:-1]] * (more + 1)
        return tuple(words)


def linear(
    path: str,
    name: str,
    axes: str = "in out",
    part: int | None = None,
    *,
    interleaved: bool = False,
    factor: Factor = 1.0,
) -> Entry:
    """Describe a weight of `torch.nn.Linear`, which torch keeps as [out, in].

    Args:
        path: of the parameter.
        name: of the module; with `{k|v}`, of several, which an axis `k|v` of the parameter holds one after the other.
        axes: a word for each axis of the parameter.
        part: which part of the module's outputs it is, if torch joins several parameters in one module.
        interleaved: the last axis of outputs, of the size of a head, is x0 y0 x1 y1 ..., where torch has x0 x1 ... y0
            y1 ...: the two orders of rotary embeddings.
        factor: what torch's numbers are times here; "1/sqrt(head_dim)" for queries whose scale is in their weights.

    Returns:
        An entry for a `KeyMap`.

    Raises:
        LoraError: as of `Entry`.

    >>> import lora_jax as lora
    >>> query = lora.key_maps.linear("layer_{i}/query/kernel", "encoder.layer.{i}.attention.self.query", "in out*")
    >>> lora.key_maps.KeyMap(query).match({"layer_3/query/kernel": (8, 2, 4)})["layer_3/query/kernel"].names[()]
    'encoder.layer.3.attention.self.query'
    """
    return Entry(path, name, axes, "linear", part, interleaved, factor)


def conv1d(path: str, name: str, axes: str = "in out", part: int | None = None) -> Entry:
    """Describe a weight of transformers' `Conv1D`, kept as [in, out] (GPT-2).

    Args:
        path, name, axes, part: as of `linear`.

    Returns:
        An entry for a `KeyMap`.

    Raises:
        LoraError: as of `Entry`.

    >>> import lora_jax as lora
    >>> lora.key_maps.conv1d("h/{i}/c_proj/kernel", "transformer.h.{i}.attn.c_proj", "in* out").kind
    'conv1d'
    """
    return Entry(path, name, axes, "conv1d", part)


def embedding(path: str, name: str, axes: str = "in out") -> Entry:
    """Describe a table of `torch.nn.Embedding`, [entries, features] in JAX and in torch.

    Args:
        path, name, axes: as of `linear`.

    Returns:
        An entry for a `KeyMap`.

    Raises:
        LoraError: as of `Entry`.

    >>> import lora_jax as lora
    >>> lora.key_maps.embedding("embedder/table", "model.embed_tokens").suffix
    '.weight'
    """
    return Entry(path, name, axes, "embedding")


def conv(path: str, name: str, axes: str = "window* in out") -> Entry:
    """Describe a kernel of a convolution, [out, in, *window] in torch.

    Args:
        path, name, axes: as of `linear`.

    Returns:
        An entry for a `KeyMap`.

    Raises:
        LoraError: as of `Entry`.

    >>> import lora_jax as lora
    >>> lora.key_maps.conv("stem/kernel", "stem.conv").words(4)
    ('window', 'window', 'in', 'out')
    """
    return Entry(path, name, axes, "conv")


def experts(
    path: str, name: str, axes: str = "expert in out", part: int | None = None, transposed: bool = False
) -> Entry:
    """Describe one parameter for all experts, [experts, out, in] in torch, or [experts, in, out] if transposed.

    Args:
        path: of the parameter.
        name: of torch's parameter, which has no module of its own.
        axes, part: as of `linear`.
        transposed: whether torch has the inputs before the outputs.

    Returns:
        An entry for a `KeyMap`.

    Raises:
        LoraError: as of `Entry`.

    >>> import lora_jax as lora
    >>> lora.key_maps.experts("layers/{i}/experts/down", "model.layers.{i}.mlp.experts.down_proj").is_of_experts
    True
    """
    return Entry(path, name, axes, "experts_transposed" if transposed else "experts", part)


def array(path: str, name: str, axes: str = "out*", part: int | None = None) -> Entry:
    """Describe an array that has no factors, such as a bias or a scale.

    Args:
        path: of the parameter.
        name: of the tensor.
        axes: a word for each axis; "keep*" keeps its shape as it is.
        part: as of `linear`.

    Returns:
        An entry for a `KeyMap`.

    Raises:
        LoraError: as of `Entry`.

    >>> import lora_jax as lora
    >>> lora.key_maps.array("layer_{i}/norm/scale", "encoder.layer.{i}.output.LayerNorm.weight").words(1)
    ('out',)
    """
    return Entry(path, name, axes, "array", part)
