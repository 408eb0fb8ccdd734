"""Key maps from the parameter trees of other JAX libraries to the modules that transformers publishes.

The names and layouts are those of the libraries' own converters: tunix 0.1.7 (`models/*/params*.py`), MaxText at
e591f30 (`checkpoint_conversion/utils/param_mapping.py`), gemma at 7691fd4 (`gm/nn/_modules.py`) and keras-hub 0.32
(`utils/transformers/convert_*.py`).

    key_maps.TUNIX                            layers/{i}/attn/q_proj/w                       [d, heads, size]
    key_maps.MAXTEXT_LLAMA                    decoder/layers_{i}/self_attention/query/kernel [d, heads, size]
    key_maps.MAXTEXT_LLAMA.stacked(axis=1)    decoder/layers/self_attention/query/kernel     [d, layers, heads, size]
    key_maps.GEMMA_FLAX                       layer_{i}/attn/kv_einsum/w                     [2, heads, d, size]
"""

from collections.abc import Iterator

from lora_jax.interop.entries import Entry, array, embedding, experts, linear
from lora_jax.interop.key_map import KeyMap

_LAYER, _ATTENTION, _MLP = "model.layers.{i}", "model.layers.{i}.self_attn", "model.layers.{i}.mlp"


def _norms(names: dict[str, str]) -> Iterator[Entry]:
    """Yield the scales of norms, by their paths and the names of their modules."""
    for path, name in names.items():
        yield array(path, f"{name}.weight")


def _einsums_of_gemma(layer: str) -> Iterator[Entry]:
    """Yield the attention of Gemma: the heads come before the inputs, and keys and values are one parameter."""
    yield linear(f"{layer}/attn/q_einsum/w", f"{_ATTENTION}.q_proj", "out in out")
    yield linear(f"{layer}/attn/kv_einsum/w", f"{_ATTENTION}.{{k|v}}_proj", "k|v out in out")
    yield linear(f"{layer}/attn/qkv_einsum/w", f"{_ATTENTION}.{{q|k|v}}_proj", "q|k|v out in out")
    yield linear(f"{layer}/attn/attn_vec_einsum/w", f"{_ATTENTION}.o_proj", "in in out")


def _norms_of_gemma(layer: str) -> Iterator[Entry]:
    return _norms(
        {
            "final_norm/scale": "model.norm",
            f"{layer}/attn/_query_norm/scale": f"{_ATTENTION}.q_norm",
            f"{layer}/attn/_key_norm/scale": f"{_ATTENTION}.k_norm",
            f"{layer}/pre_attention_norm/scale": f"{_LAYER}.input_layernorm",
            f"{layer}/post_attention_norm/scale": f"{_LAYER}.post_attention_layernorm",
            f"{layer}/post_attn_norm/scale": f"{_LAYER}.post_attention_layernorm",  # as tunix calls it in Gemma 2
            f"{layer}/pre_ffw_norm/scale": f"{_LAYER}.pre_feedforward_layernorm",
            f"{layer}/post_ffw_norm/scale": f"{_LAYER}.post_feedforward_layernorm",
        }
    )


def _experts(block: str, gate: str, up: str, down: str, router: str) -> Iterator[Entry]:
    """Yield the experts of a layer, by their paths: torch has gate and up of all experts in one parameter."""
    gate, up, down, router = (f"{block}/{name}" for name in (gate, up, down, router))
    yield experts(gate, f"{_MLP}.experts.gate_up_proj", part=0)
    yield experts(up, f"{_MLP}.experts.gate_up_proj", part=1)
    yield experts(down, f"{_MLP}.experts.down_proj")
    yield linear(router, f"{_MLP}.gate")


_TUNIX_MLP = [linear(f"layers/{{i}}/mlp/{name}_proj/kernel", f"{_MLP}.{name}_proj") for name in ("gate", "up", "down")]

#: tunix's trees of Llama 3, Qwen 2 and Qwen 3, with experts and without.
TUNIX = KeyMap(
    embedding("embedder/input_embedding", "model.embed_tokens"),
    *(linear(f"layers/{{i}}/attn/{name}_proj/w", f"{_ATTENTION}.{name}_proj", "in out out") for name in "qkv"),
    linear("layers/{i}/attn/o_proj/w", f"{_ATTENTION}.o_proj", "in in out"),
    *(array(f"layers/{{i}}/attn/{name}_bias", f"{_ATTENTION}.{name}_proj.bias") for name in "qkv"),
    *_TUNIX_MLP,
    *_experts("layers/{i}/mlp", "gate_proj", "up_proj", "down_proj", "router/kernel"),
    *_norms(
        {
            "layers/{i}/attn/q_norm/w": f"{_ATTENTION}.q_norm",
            "layers/{i}/attn/k_norm/w": f"{_ATTENTION}.k_norm",
            "layers/{i}/input_layernorm/w": f"{_LAYER}.input_layernorm",
            "layers/{i}/post_attention_layernorm/w": f"{_LAYER}.post_attention_layernorm",
            "final_norm/w": "model.norm",
        }
    ),
    linear("lm_head/w", "lm_head"),
)

#: tunix's trees of Gemma 2 and 3 (text).
TUNIX_GEMMA = KeyMap(
    embedding("embedder/input_embedding", "model.embed_tokens"),
    *_einsums_of_gemma("layers/{i}"),
    *_TUNIX_MLP,
    *_norms_of_gemma("layers/{i}"),
)

#: The gemma library's own tree where `transpose_gating_einsum` is set: Gemma 2 of 9B and 27B, and Gemma 3. Elsewhere
#: the gating is [2, d, hidden]: `KeyMap(linear(path, name, "gate|up in out")) + GEMMA_FLAX`.
GEMMA_FLAX = KeyMap(
    embedding("embedder/input_embedding", "model.embed_tokens"),
    *_einsums_of_gemma("layer_{i}"),
    linear("layer_{i}/mlp/gating_einsum", f"{_MLP}.{{gate|up}}_proj", "gate|up out in"),
    linear("layer_{i}/mlp/linear", f"{_MLP}.down_proj"),
    *_norms_of_gemma("layer_{i}"),
)


def _maxtext(query: Entry, key: Entry, block: str = "moe_block") -> KeyMap:
    """Return the key map of MaxText's decoder with these queries and keys, and experts in a block of this name."""
    layer = "decoder/layers_{i}"
    return KeyMap(
        embedding("token_embedder/embedding", "model.embed_tokens"),
        query,
        key,
        linear(f"{layer}/self_attention/value/kernel", f"{_ATTENTION}.v_proj", "in out out"),
        linear(f"{layer}/self_attention/out/kernel", f"{_ATTENTION}.o_proj", "in in out"),
        *(
            array(f"{layer}/self_attention/{name}/bias", f"{_ATTENTION}.{name[0]}_proj.bias", "out out")
            for name in ("query", "key", "value")
        ),
        linear(f"{layer}/mlp/wi_0/kernel", f"{_MLP}.gate_proj"),
        linear(f"{layer}/mlp/wi_1/kernel", f"{_MLP}.up_proj"),
        linear(f"{layer}/mlp/wo/kernel", f"{_MLP}.down_proj"),
        *_experts(f"{layer}/{block}", "wi_0", "wi_1", "wo", "gate/kernel"),
        *(
            array(f"{path}/scale", f"{name}.weight", "out")
            for path, name in {
                f"{layer}/self_attention/query_norm": f"{_ATTENTION}.q_norm",
                f"{layer}/self_attention/key_norm": f"{_ATTENTION}.k_norm",
                f"{layer}/pre_self_attention_layer_norm": f"{_LAYER}.input_layernorm",
                f"{layer}/post_self_attention_layer_norm": f"{_LAYER}.post_attention_layernorm",
                "decoder/decoder_norm": "model.norm",
            }.items()
        ),
        linear("decoder/logits_dense/kernel", "lm_head"),
    )


_QUERY = ("decoder/layers_{i}/self_attention/query/kernel", f"{_ATTENTION}.q_proj", "in out out")
_KEY = ("decoder/layers_{i}/self_attention/key/kernel", f"{_ATTENTION}.k_proj", "in out out")

#: MaxText's trees of Llama 3.1: rotary pairs lie side by side, and the scale of the scores is in the weights of the
#: queries.
MAXTEXT_LLAMA = _maxtext(
    linear(*_QUERY, interleaved=True, factor="1/sqrt(head_dim)"),
    linear(*_KEY, interleaved=True),
)
#: MaxText's trees of Qwen 2.5 and Qwen 3, with experts and without, whose heads are as in transformers.
MAXTEXT_QWEN = _maxtext(linear(*_QUERY), linear(*_KEY))
#: MaxText's trees of Mixtral, whose heads are in transformers' order, and the scale of the scores in the weights of
#: the queries.
MAXTEXT_MIXTRAL = _maxtext(linear(*_QUERY, factor="1/sqrt(head_dim)"), linear(*_KEY), "MoeBlock_0")


def _keras(path: str, name: str, axes: str) -> Iterator[Entry]:
    """Yield the kernel of an EinsumDense with heads, and its bias."""
    yield linear(f"{path}/kernel", name, axes)
    yield array(f"{path}/bias", f"{name}.bias")


_KERAS_LAYER, _KERAS_BLOCK = "transformer_layer_{i}", "decoder_block_{i}"

#: keras-hub's Llama 3, Mistral, Qwen 2 and dense Qwen 3, by the paths of their variables.
KERAS_LLAMA = KeyMap(
    embedding("token_embedding/embeddings", "model.embed_tokens"),
    linear("token_embedding/reverse_embeddings", "lm_head"),
    *(
        entry
        for name in ("query", "key", "value")
        for entry in _keras(f"{_KERAS_LAYER}/self_attention/{name}", f"{_ATTENTION}.{name[0]}_proj", "in out out")
    ),
    linear(f"{_KERAS_LAYER}/self_attention/attention_output/kernel", f"{_ATTENTION}.o_proj", "in in out"),
    linear(f"{_KERAS_LAYER}/feedforward_gate_dense/kernel", f"{_MLP}.gate_proj"),
    linear(f"{_KERAS_LAYER}/feedforward_intermediate_dense/kernel", f"{_MLP}.up_proj"),
    linear(f"{_KERAS_LAYER}/feedforward_output_dense/kernel", f"{_MLP}.down_proj"),
    *_norms(
        {
            f"{_KERAS_LAYER}/self_attention/query_dense_layernorm/scale": f"{_ATTENTION}.q_norm",
            f"{_KERAS_LAYER}/self_attention/key_dense_layernorm/scale": f"{_ATTENTION}.k_norm",
            f"{_KERAS_LAYER}/self_attention_layernorm/scale": f"{_LAYER}.input_layernorm",
            f"{_KERAS_LAYER}/feedforward_layernorm/scale": f"{_LAYER}.post_attention_layernorm",
            "sequence_output_layernorm/scale": "model.norm",
        }
    ),
)

#: keras-hub's Gemma 3 (text), by the paths of its variables.
KERAS_GEMMA = KeyMap(
    embedding("token_embedding/embeddings", "model.embed_tokens"),
    *(
        linear(f"{_KERAS_BLOCK}/attention/{name}/kernel", f"{_ATTENTION}.{name[0]}_proj", "out in out")
        for name in ("query", "key", "value")
    ),
    linear(f"{_KERAS_BLOCK}/attention/attention_output/kernel", f"{_ATTENTION}.o_proj", "in in out"),
    linear(f"{_KERAS_BLOCK}/ffw_gating/kernel", f"{_MLP}.gate_proj"),
    linear(f"{_KERAS_BLOCK}/ffw_gating_2/kernel", f"{_MLP}.up_proj"),
    linear(f"{_KERAS_BLOCK}/ffw_linear/kernel", f"{_MLP}.down_proj"),
    *_norms(
        {
            f"{_KERAS_BLOCK}/attention/query_norm/scale": f"{_ATTENTION}.q_norm",
            f"{_KERAS_BLOCK}/attention/key_norm/scale": f"{_ATTENTION}.k_norm",
            f"{_KERAS_BLOCK}/pre_attention_norm/scale": f"{_LAYER}.input_layernorm",
            f"{_KERAS_BLOCK}/post_attention_norm/scale": f"{_LAYER}.post_attention_layernorm",
            f"{_KERAS_BLOCK}/pre_ffw_norm/scale": f"{_LAYER}.pre_feedforward_layernorm",
            f"{_KERAS_BLOCK}/post_ffw_norm/scale": f"{_LAYER}.post_feedforward_layernorm",
            "final_normalization/scale": "model.norm",
        }
    ),
)
