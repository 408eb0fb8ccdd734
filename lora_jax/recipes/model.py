"""A model of a published folder: its config, its parameters, and what it computes of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import AxisType, Mesh

from lora_jax.bases.format import Format
from lora_jax.bases.int8_fp8 import Int8
from lora_jax.bases.nf4 import Nf4
from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.patterns import first_match
from lora_jax.core.targets import Plan
from lora_jax.interop.architectures import GEMMA
from lora_jax.interop.key_map import KeyMap
from lora_jax.recipes import decoder, loading
from lora_jax.recipes.config import Config, read_config
from lora_jax.recipes.decoder import Remat
from lora_jax.recipes.generate import generate
from lora_jax.recipes.wrappers import names_of_modules
from lora_jax.transform.apply import lora_apply
from lora_jax.transform.plan import plan

KEY_MAP = GEMMA.stacked()  # the names of Llama, and of all that came after it
LINEARS = r"model/layers/(self_attn|mlp(/experts)?)/\w+_proj/kernel"
_FORMATS: dict[int, dict[str, Format]] = {
    4: {r"model/layers/self_attn/\w+_proj/kernel": Nf4(stack=1), LINEARS: Nf4()},
    # One scale for each output: those of queries, keys and values are heads and their entries.
    8: {
        r"model/layers/self_attn/[qkv]_proj/kernel": Int8(stack=1, inputs=1),
        r"model/layers/self_attn/o_proj/kernel": Int8(stack=1),
        LINEARS: Int8(),
    },
}


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder of a published folder, as functions of its parameters. Made by `lora.recipes.load`.

    Each function takes `params`, which are `model.params` or parameters of the same paths, so that
    `lora.lora_apply(model.logits)(model.params, adapters, ids)` and `jax.grad` are what they are for any function.
    Packed weights are dequantized as they are multiplied by.

    Args:
        config: what it computes.
        params: nested dicts of arrays and packed weights, or of their shapes.
        specs: how each parameter is split over the mesh: the same tree of partition specs.

    >>> import json, tempfile, jax, jax.numpy as jnp, lora_jax as lora
    >>> from pathlib import Path
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     model = lora.recipes.abstract(folder, jnp.float32)
    >>> jax.eval_shape(model.logits, model.params, jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 8)
    >>> model.plan(lora.Lora(rank=2))
    Plan(7 of 12 weights adapted, 832 parameters trained)
    """

    config: Config
    params: Any
    specs: Any

    @property
    def key_map(self) -> KeyMap:
        """Return the key map for `lora.save_peft` and `lora.load_peft`, with the names that HF PEFT has."""
        return names_of_modules(self.config.wrapper).of(KEY_MAP)

    @property
    def linears(self) -> str:
        """Return the pattern of all linear layers but the head and routers: `rules={model.linears: lora.Lora(16)}`."""
        return LINEARS

    def hidden(
        self,
        params: Any,
        ids: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        remat: Remat = True,
    ) -> jax.Array:
        """Return the states after the last norm, for `lora.losses.linear_cross_entropy` with `model.head(params)`.

        Args:
            params: the parameters.
            ids: tokens, i32 [B, T].
            positions: i32 [B, T], from 0 for each text; by default the place in the row.
            segments: i32 [B, T], a number for each text of a row; a token sees those of its own text alone.
            remat: whether each layer is computed again in the backward pass; or a policy of `jax.checkpoint`.

        Returns:
            [B, T, D] in the dtype of the embedding.
        """
        if _has_packed(params):
            return lora_apply(self.hidden)(params, {}, ids, positions, segments, remat)
        return decoder.hidden_states(self.config, params, ids, positions, segments, remat=remat)[0]

    def head(self, params: Any) -> jax.Array:
        """Return the matrix of the head [D, V]: the embedding transposed, where that is the head as well.

        Args:
            params: the parameters.
        """
        return decoder.head(self.config, params)

    def logits(
        self,
        params: Any,
        ids: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        remat: Remat = True,
    ) -> jax.Array:
        """Return the logits of each next token, fp32 [B, T, V], capped where the model does it.

        Args:
            params, ids, positions, segments, remat: as of `hidden`.
        """
        if _has_packed(params):
            return lora_apply(self.logits)(params, {}, ids, positions, segments, remat)
        return decoder.logits_of(self.config, params, self.hidden(params, ids, positions, segments, remat))

    def plan(self, rules: Mapping[str, Rule | None] | Rule, rows: int = 1, tokens: int = 128) -> Plan:
        """Return the plan of adapters, as `lora.plan` does for `model.logits`.

        Args:
            rules: `{pattern: rule}`, or one rule for all linear layers.
            rows, tokens: sizes of the batch that FLOPs are counted for.
        """
        ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        return plan(self.logits, self.params, ids, rules={LINEARS: rules} if isinstance(rules, Rule) else rules)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Mapping[str, Adapter] | None = None,
        *,
        count: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: jax.Array | None = None,
        eos: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return what the model, with its adapters if there are some, writes after each prompt.

        Args:
            prompts: ids of tokens, at least one each.
            adapters: `{path: adapter}`.
            count: how many tokens at most.
            temperature: 0 for the likeliest token each time; else logits are divided by it and tokens are drawn.
            top_p: draw from the likeliest tokens that have this share of the probability together.
            key: for drawing.
            eos: the tokens that end a text, by default the model's own.

        Returns:
            The ids of the new tokens, without that which ended the text.
        """
        ends = self.config.eos if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return generate(
            self.config, self.params, adapters or {}, prompts, count, float(temperature), float(top_p), key, ends
        )

    def replace(self, **changes: Any) -> "Model":
        """Return the model with other parameters, or other fields.

        Args:
            changes: fields by name, such as `params=...`.
        """
        return dataclasses.replace(self, **changes)


def load(
    folder: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    bits: int | None = None,
    *,
    specs: Any = None,
    ignore: Iterable[str] = (),
) -> Model:
    """Return the model of a folder with a config.json and safetensors, as published on the Hugging Face Hub.

    Llama 2 and 3, SmolLM, Mistral, Qwen 2, 2.5 and 3, Qwen 3 MoE and Gemma 1 to 3; of Gemma 3 and Mistral Small 3.1
    with images the text model. One tensor at a time is in memory beside the parameters, which are sharded and packed as
    they are read. Weights that are published in MXFP4, NVFP4, fp8 or integers of few bits, as `quantization_config`
    says (compressed-tensors, DeepSeek's fp8, ModelOpt), are read as the numbers that they stand for.

    Args:
        folder: where the files are.
        dtype: of the parameters, and so of what is computed; by default that of the files, and of weights which they
            hold in few bits, that of the config. Only fp32 holds the numbers of NVFP4 and of most scales exactly.
        mesh: where they are to be; of axes of type Auto.
        bits: 4 packs the linear layers as `lora.bases.Nf4`, 8 as `lora.bases.Int8`; None and 16 leave them as they are.
        specs: a tree of partition specs, one for each parameter; by default `default_specs` of the mesh.
        ignore: names of fields of config.json that change nothing of what the model computes, and are not known here.

    Returns:
        A `Model` with its parameters.

    Raises:
        LoraError: the config asks for something that is not supported, such as weights that GPTQ, AWQ or bitsandbytes
            packed; tensors are missing, or belong to no parameter.

    >>> import json, tempfile, jax, jax.numpy as jnp, lora_jax as lora
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     shapes = lora.recipes.abstract(folder, jnp.float32)
    ...     params = jax.tree.map(lambda like: jnp.ones(like.shape, like.dtype), shapes.params)
    ...     save_file(lora.to_torch(params, shapes.key_map), f"{folder}/model.safetensors")
    ...     model = lora.recipes.load(folder)
    >>> model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
    (1, 32, 32)
    """
    if bits not in (None, 4, 8, 16):
        raise LoraError(f"load(folder, bits=...): bits is {bits!r}, expected 4, 8, 16 or None.")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise LoraError(f"load(folder, dtype=...): dtype is {dtype!r}, expected one of floats, such as jnp.bfloat16.")
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        raise LoraError(
            "load(folder, mesh=...): `mesh` has axes of type Explicit, and the decoder states no shardings of what it "
            "computes: jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))."
        )
    folder = Path(folder).absolute()
    config = read_config(folder, ignore)
    if specs is not None and mesh is None:
        raise LoraError("load(folder, specs=...): `mesh` is missing, which the specs are for.")
    flat = loading.default_specs(config, mesh) if specs is None or mesh is None else _flat_specs(config, mesh, specs)
    files = loading.Folder(folder, config, KEY_MAP)
    params = loading.load_params(files, dtype, mesh, flat, _formats(config, bits))
    return Model(config, loading.nested(params), loading.nested(flat))


def abstract(
    folder: str | Path, dtype: Any = jnp.bfloat16, mesh: Mesh | None = None, ignore: Iterable[str] = ()
) -> Model:
    """Return the model of a folder with shapes in the place of parameters, of which its config.json is enough.

    Plans, `lora.abstract_state` and compilers need no more.

    Args:
        folder: where config.json is.
        dtype: of the parameters.
        mesh: where they would be.
        ignore: as of `load`.

    Returns:
        A `Model` with `jax.ShapeDtypeStruct`s.

    >>> import json, tempfile, lora_jax as lora
    >>> from pathlib import Path
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     model = lora.recipes.abstract(folder)
    >>> model.params["lm_head"]["kernel"]
    ShapeDtypeStruct(shape=(32, 8), dtype=bfloat16)
    """
    config = read_config(folder, ignore)
    specs = loading.default_specs(config, mesh)
    params = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in decoder.shapes(config).items()}
    return Model(config, loading.nested(params), loading.nested(specs))


def _flat_specs(config: Config, mesh: Mesh, specs: Any) -> dict[str, P]:
    names, leaves, _ = flatten_with_names(specs, is_leaf=lambda node: isinstance(node, P))
    return loading.check_specs(config, mesh, dict(zip(names, leaves, strict=True)))


def packing(bits: int | None) -> dict[str, Format]:
    """Return the rules for `lora.bases.quantize` by which `load` packs weights in 4 or 8 bits.

    Args:
        bits: 4, 8, or 16 or None for none.

    Returns:
        `{pattern: format}`.

    >>> import lora_jax as lora
    >>> list(lora.recipes.packing(4).values()), lora.recipes.packing(None)
    ([Nf4(stack=1), Nf4()], {})
    """
    return dict(_FORMATS.get(bits or 16, {}))


def _formats(config: Config, bits: int | None) -> dict[str, Format]:
    """Return the format of each parameter that is packed."""
    rules = packing(bits)
    return first_match(rules, list(decoder.shapes(config))) if rules else {}


def _has_packed(params: Any) -> bool:
    return any(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed)))
