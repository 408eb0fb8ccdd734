"""The weights of a published folder, read into the parameters of the decoder, one tensor after the other.

A parameter of stacked layers is made on the devices, where each layer is written into its place once it is read, and
packed if it is to be. So beside the parameters only what belongs to one layer of one of them is in memory.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import Mesh, NamedSharding

from lora_jax.bases.format import Format
from lora_jax.bases.quantize import quantize
from lora_jax.core.errors import LoraError, short
from lora_jax.core.partition import check_divisible, full_spec
from lora_jax.core.paths import nearest
from lora_jax.core.text import listed
from lora_jax.interop.key_map import KeyMap, ParameterMatch
from lora_jax.interop.low_bits.config import packing_of
from lora_jax.interop.low_bits.files import LowBit, read_weight, weights_of
from lora_jax.interop.model_config import model_facts
from lora_jax.interop.safetensors_index import DTYPES, tensors_in
from lora_jax.recipes.config import Config
from lora_jax.recipes.decoder import shapes
from lora_jax.recipes.wrappers import is_unread, names_in_files

Array = np.ndarray[Any, Any]
_COMPUTED = re.compile(r".*layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # what files of Llama 2 have beside
_FLOATS = ("F64", "F32", "F16", "BF16")
_DENSE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# For each tensor of torch's parameters, the tensors of the files that it is made of: expert by expert, the projections.
Parts = tuple[tuple[str, ...], ...]


class Folder:
    """The tensors of a published model, each matched with the parameter that it belongs to.

    Args:
        folder: of `model.safetensors`, or of an index and its shards.
        config: what the decoder computes.
        key_map: from its parameters to torch's names, of a text model by itself.

    Raises:
        LoraError: a file is missing or damaged; tensors are missing, belong to no parameter, or have another shape or
            numbers that are no floats.
    """

    def __init__(self, folder: Path, config: Config, key_map: KeyMap) -> None:
        self.folder, self.config, self.dense = folder, config, _dtype_of_config(model_facts(folder))
        tensors = weights_of(folder, tensors_in(folder)[0], packing_of(folder))
        self.tensors = {name: at for name, at in tensors.items() if not is_unread(config.wrapper, name)}
        names = names_in_files(config.wrapper, self.tensors)
        self.head, self.table = f"{names.head}.weight", f"{names.body}embed_tokens.weight"
        self.matches = names.of(key_map).match(shapes(config))
        self.parts: dict[str, Parts] = {}
        for match in self.matches.values():
            for name in match.tensors().values():
                apart = match.entry.is_of_experts and name not in self.tensors
                self.parts[name] = _apart(name, config.experts) if apart else ((name,),)
        self._check_names()
        for name, tensor in self.tensors.items():
            if tensor.dtype not in _FLOATS and not _COMPUTED.fullmatch(name):
                raise LoraError(
                    f"{short(name)} in {folder} is of {tensor.dtype}, expected one of {', '.join(_FLOATS)}."
                )
        for match in self.matches.values():
            for index, name in match.tensors().items():
                shape = jax.ShapeDtypeStruct(self._shape(name, match), np.uint8)  # the axes count, not the numbers
                jax.eval_shape(functools.partial(match.from_torch, index=index), shape)

    def dtype_of(self, match: ParameterMatch) -> Any:
        """Return the dtype that holds what the files have of a parameter; no wider than fp32.

        That of weights which are packed in few bits is the model's own, as its config says, by default bf16.
        """
        names = {tensor for name in match.tensors().values() for own in self.parts[name] for tensor in own}
        weights = [self.tensors[name] for name in sorted(names)]
        found = jnp.result_type(*(self.dense if isinstance(w, LowBit) else DTYPES[w.dtype] for w in weights))
        return jnp.dtype(jnp.float32) if found == np.float64 else found

    def read(self, match: ParameterMatch, index: tuple[int, ...], dtype: Any) -> Array:
        """Return the part of a parameter with this index, of one layer, in our layout."""
        name = match.tensors()[index]
        if self.parts[name] == ((name,),):
            tensor = self._tensor(name, dtype)
        else:
            tensor = np.empty(self._shape(name, match), dtype)
            for expert, own in enumerate(self.parts[name]):
                start = 0
                for part in own:
                    outputs = self.tensors[part].shape[0]
                    tensor[expert, start : start + outputs] = self._tensor(part, dtype)
                    start += outputs
        return match.from_torch(tensor, index)

    def check_tied_head(self) -> None:
        """Raise if the files have a head of their own where the config says that it is the embedding."""
        head = self.tensors.get(self.head)
        if self.config.tied and head is not None:
            table = self._tensor(self.table, DTYPES[self.tensors[self.table].dtype])
            if head.shape != table.shape or not _equal(self._tensor(self.head, table.dtype), table):
                raise LoraError(
                    f"{self.folder}: tie_word_embeddings is true, but {self.head!r} is not {self.table!r}. Say which "
                    "it is in config.json: with false, the head of the files is used."
                )

    def _tensor(self, name: str, dtype: Any) -> Array:
        return read_weight(self.folder, self.tensors[name], dtype)

    def _shape(self, name: str, match: ParameterMatch) -> tuple[int, ...]:
        """Return the shape of torch's tensor, made of those that the files have."""
        parts = self.parts[name]
        if parts == ((name,),):
            return self.tensors[name].shape
        expected = (match.shape[-1] // len(parts[0]), match.shape[-2])
        for tensor in (tensor for own in parts for tensor in own):
            if self.tensors[tensor].shape != expected:
                found = list(self.tensors[tensor].shape)
                raise LoraError(f"{short(tensor)} in {self.folder} has shape {found}, expected {list(expected)}.")
        return (len(parts), match.shape[-1], match.shape[-2])

    def _check_names(self) -> None:
        """Raise if tensors are missing, or belong to no parameter."""
        expected = dict.fromkeys(tensor for parts in self.parts.values() for own in parts for tensor in own)
        if missing := [name for name in expected if name not in self.tensors]:
            near = ", ".join(map(short, nearest(missing[0], self.tensors, n=3))) or "none"
            raise LoraError(
                f"{self.folder} lacks {len(missing)} tensor(s) that its config.json asks for; near the first one are "
                f"{near}:\n{listed(missing)}"
            )
        extra = [name for name in self.tensors if name not in expected and not _COMPUTED.fullmatch(name)]
        if self.config.tied and self.head in extra:
            extra.remove(self.head)
        if extra:
            raise LoraError(
                f"{self.folder} has {len(extra)} tensor(s) that nothing reads, so that the decoder would compute "
                f"something else than the model:\n{listed(extra)}"
            )


def _dtype_of_config(facts: Mapping[str, Any]) -> Any:
    """Return the dtype that a model was published in before it was packed; by default bf16."""
    text = facts.get("text_config")
    for own in (facts, text if isinstance(text, dict) else {}):
        for name in ("dtype", "torch_dtype"):
            if own.get(name) in _DENSE:
                return _DENSE[own[name]]
    return jnp.bfloat16


def _equal(one: Array, other: Array, rows: int = 1024) -> bool:
    """Return whether two matrices are equal, without an answer for each number in memory."""
    return all(np.array_equal(one[n : n + rows], other[n : n + rows]) for n in range(0, len(one), rows))


def _apart(name: str, experts: int) -> Parts:
    """Return the tensors of single experts that torch's parameter for all experts is made of."""
    module, _, last = name.rpartition(".")
    projections = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    return tuple(tuple(f"{module}.{e}.{own}.weight" for own in projections) for e in range(experts))


def load_params(
    folder: Folder, dtype: Any, mesh: Mesh | None, specs: Mapping[str, P], formats: Mapping[str, Format]
) -> dict[str, Any]:
    """Return the parameters by their paths.

    Args:
        folder: the tensors.
        dtype: of the parameters; None for that of the files.
        mesh: where they are to be; None for the default device.
        specs: how each is split over the mesh, by its path.
        formats: what weights are packed in, by their paths.
    """
    folder.check_tied_head()
    found = {}
    for path, match in folder.matches.items():
        own = folder.dtype_of(match) if dtype is None else jnp.dtype(dtype)
        sharding = None if mesh is None else NamedSharding(mesh, specs[path])
        found[path] = _load(folder, match, own, sharding, formats.get(path))
    return found


def _load(folder: Folder, match: ParameterMatch, dtype: Any, sharding: Any, format: Format | None) -> Any:
    """Read one parameter, layer by layer if it is of stacked layers."""
    if not match.unstacked:
        return _packed(match.path, _put(folder.read(match, (), dtype), sharding), format)
    whole = None
    layers = match.shape[0]
    for index in match.tensors():
        # [1, ...]: the stack axis stays, so that a packed layer is a slice of the packed parameter
        own = None if sharding is None else NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))
        piece = _packed(match.path, _put(folder.read(match, index, dtype)[None], own), format)
        whole = _empty(piece, layers) if whole is None else whole
        whole = jax.block_until_ready(_write(whole, piece, index[0]))  # only then is the next one read
        del piece
    return whole


def _packed(path: str, w: jax.Array, format: Format | None) -> Any:
    """Return a weight, packed if it is to be."""
    return w if format is None else quantize({path: w}, {re.escape(path): format}, donate=True)[path]


def _put(array: Array, sharding: NamedSharding | None) -> jax.Array:
    """Bring an array to the devices, of each host those parts that its own devices have.

    What was read stays no longer than it takes: beside the array on the devices, one of its size is in memory.
    """
    array = np.ascontiguousarray(array)  # one that is transposed would be copied beside what was read
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _empty(piece: Any, layers: int) -> Any:
    """Return zeros for a stack of layers, each like `piece` [1, ...], where that is."""

    def zeros(array: jax.Array) -> jax.Array:
        return jnp.zeros((layers, *array.shape[1:]), array.dtype, device=array.sharding)

    return jax.tree.map(zeros, piece)


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: Any, piece: Any, layer: jax.Array) -> Any:
    """Write a layer [1, ...] into its place."""
    return jax.tree.map(lambda w, own: jax.lax.dynamic_update_slice_in_dim(w, own, layer, 0), whole, piece)


# Places on a mesh -----------------------------------------------------------------------------------------------------

_SPECS: dict[str, Sequence[str | None]] = {
    r".*/(q|k|v)_proj/kernel": (None, "fsdp", "tensor", None),
    r".*/o_proj/kernel": (None, "tensor", None, "fsdp"),
    r".*/(gate|up)_proj/kernel": (None, "fsdp", "tensor"),
    r".*/mlp/down_proj/kernel": (None, "tensor", "fsdp"),
    r".*/experts/gate_up_proj/kernel": (None, "expert", "fsdp", None),
    r".*/experts/down_proj/kernel": (None, "expert", None, "fsdp"),
    r".*/embedding": ("tensor", "fsdp"),
    r"lm_head/kernel": ("fsdp", "tensor"),
}


def default_specs(config: Config, mesh: Mesh | None) -> dict[str, P]:
    """Return how each parameter is split, by its path: over "fsdp", over "tensor" as Megatron does, and "expert".

    Axes that the mesh does not have, or that do not divide a parameter evenly, leave it whole.

    Args:
        config: of the model.
        mesh: the devices; None leaves all whole.

    Returns:
        `{path: spec}`, with an entry for each axis.

    >>> import json, tempfile, jax, lora_jax as lora
    >>> from pathlib import Path
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     config = lora.recipes.read_config(folder)
    >>> specs = lora.recipes.default_specs(config, jax.make_mesh((1, 1), ("fsdp", "tensor")))
    >>> specs["model/layers/mlp/up_proj/kernel"] == jax.P(None, "fsdp", "tensor")
    True
    """
    found = {}
    for path, shape in shapes(config).items():
        axes = next((axes for pattern, axes in _SPECS.items() if re.fullmatch(pattern, path)), ())
        kept = [
            name if mesh is not None and name in mesh.shape and shape[axis] % mesh.shape[name] == 0 else None
            for axis, name in enumerate(axes)
        ]
        found[path] = P(*kept, *[None] * (len(shape) - len(kept)))
    return found


def check_specs(config: Config, mesh: Mesh, specs: Mapping[str, P]) -> dict[str, P]:
    """Return the specs of all parameters, with an entry for each axis.

    Raises:
        LoraError: a parameter has no spec, or one that does not fit it; a spec is of no parameter.
    """
    own = shapes(config)
    if wrong := [path for path in (*own, *specs) if path not in own or path not in specs]:
        raise LoraError(f"specs and parameters have different paths: {listed(wrong)}\nis in one of them alone.")
    found = {path: full_spec(path, specs[path], len(shape), mesh) for path, shape in own.items()}
    for path, spec in found.items():
        check_divisible(f"{path!r} of shape {list(own[path])}", own[path], spec, mesh, "or leave it whole")
        if path.startswith("model/layers/") and spec[0] is not None:
            raise LoraError(f"the spec of {path!r} is {spec}, expected None first: layers are run by a scan.")
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of dicts, of leaves by their paths.

    >>> nested({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
