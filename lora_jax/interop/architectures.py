"""Key maps of published architectures.

The parameters are named as the modules of transformers: a path has "/" for each ".", and ends with `kernel`,
`embedding`, `scale` or `bias`. Attention heads may be one axis, or two: their number and their size.

    key_maps.LLAMA                        model/layers/{i}/self_attn/q_proj/kernel  [d, heads, head_dim]
    key_maps.LLAMA.stacked()              model/layers/self_attn/q_proj/kernel      [layers, d, heads, head_dim]
    key_maps.BERT.under(name="bert.")     the same model as a part of another one
"""

from collections.abc import Iterator

from lora_jax.interop.entries import Entry, array, conv, conv1d, embedding, experts, linear
from lora_jax.interop.key_map import KeyMap


def _dense(name: str, axes: str = "in out", bias: str = "out*") -> Iterator[Entry]:
    path = name.replace(".", "/")
    yield linear(f"{path}/kernel", name, axes)
    yield array(f"{path}/bias", f"{name}.bias", bias)


def _norm(name: str) -> Iterator[Entry]:
    path = name.replace(".", "/")
    yield array(f"{path}/scale", f"{name}.weight")
    yield array(f"{path}/bias", f"{name}.bias")


def _table(name: str) -> Entry:
    return embedding(f"{name.replace('.', '/')}/embedding", name)


def _conv1d(name: str) -> Iterator[Entry]:
    path = name.replace(".", "/")
    yield conv1d(f"{path}/kernel", name)
    yield array(f"{path}/bias", f"{name}.bias")


def _map(*groups: Entry | Iterator[Entry]) -> KeyMap:
    return KeyMap(*(entry for group in groups for entry in ([group] if isinstance(group, Entry) else group)))


_ENCODER_LAYER = "encoder.layer.{i}"

#: BERT and its like, such as MiniLM and the encoders of sentence-transformers.
BERT = _map(
    *(_table(f"embeddings.{name}_embeddings") for name in ("word", "position", "token_type")),
    _norm("embeddings.LayerNorm"),
    *(_dense(f"{_ENCODER_LAYER}.attention.self.{name}", "in out*") for name in ("query", "key", "value")),
    _dense(f"{_ENCODER_LAYER}.attention.output.dense", "in* out"),
    _norm(f"{_ENCODER_LAYER}.attention.output.LayerNorm"),
    _dense(f"{_ENCODER_LAYER}.intermediate.dense"),
    _dense(f"{_ENCODER_LAYER}.output.dense"),
    _norm(f"{_ENCODER_LAYER}.output.LayerNorm"),
    _dense("pooler.dense"),
)

#: GPT-2, with query, key and value in one weight `c_attn`, as transformers has it.
GPT2 = _map(
    _table("transformer.wte"),
    _table("transformer.wpe"),
    *(_norm(f"transformer.h.{{i}}.ln_{n}") for n in (1, 2)),
    # c_attn is query, key and value in one. Models with three weights say conv1d(path, name, "in out*", part=0), 1, 2.
    *(_conv1d(f"transformer.h.{{i}}.{name}") for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    _norm("transformer.ln_f"),
    linear("lm_head/kernel", "lm_head"),
)

#: Llama; also Mistral, Qwen 2 and 3, and SmolLM, some of which have biases, norms of heads, or experts.
LLAMA = _map(
    _table("model.embed_tokens"),
    *(_dense(f"model.layers.{{i}}.self_attn.{name}_proj", "in out*") for name in "qkv"),
    _dense("model.layers.{i}.self_attn.o_proj", "in* out"),
    *(_norm(f"model.layers.{{i}}.self_attn.{name}_norm") for name in "qk"),
    *(_dense(f"model.layers.{{i}}.mlp.{name}_proj") for name in ("gate", "up", "down")),
    linear("model/layers/{i}/mlp/gate/kernel", "model.layers.{i}.mlp.gate"),
    # In the order in which transformers registers them: PEFT's names depend on it.
    *(
        experts(f"model/layers/{{i}}/mlp/experts/{name}/kernel", f"model.layers.{{i}}.mlp.experts.{name}")
        for name in ("gate_up_proj", "down_proj")
    ),
    *(_norm(f"model.layers.{{i}}.{name}_layernorm") for name in ("input", "post_attention")),
    _norm("model.norm"),
    linear("lm_head/kernel", "lm_head"),
)

#: Gemma 1 to 3 (text): `LLAMA`, with norms after attention and MLP too.
GEMMA = LLAMA + _map(
    *(_norm(f"model.layers.{{i}}.{name}_feedforward_layernorm") for name in ("pre", "post")),
)

_VIT = _map(
    array("vit/embeddings/cls_token", "vit.embeddings.cls_token", "keep*"),
    array("vit/embeddings/position_embeddings", "vit.embeddings.position_embeddings", "keep*"),
    conv("vit/embeddings/patch_embeddings/projection/kernel", "vit.embeddings.patch_embeddings.projection"),
    array("vit/embeddings/patch_embeddings/projection/bias", "vit.embeddings.patch_embeddings.projection.bias"),
    _norm("vit.layernorm"),
    _dense("vit.pooler.dense"),
    _dense("classifier"),
)
#: Vision transformers, with the names of transformers 5.
VIT = _VIT + _map(
    *(_dense(f"vit.layers.{{i}}.attention.{name}_proj", "in out*") for name in "qkv"),
    _dense("vit.layers.{i}.attention.o_proj", "in* out"),
    *(_dense(f"vit.layers.{{i}}.mlp.fc{n}") for n in (1, 2)),
    *(_norm(f"vit.layers.{{i}}.layernorm_{place}") for place in ("before", "after")),
)
#: Vision transformers, with the names of transformers 4, which the published files have.
VIT_4 = _VIT + _map(
    *(_dense(f"vit.encoder.layer.{{i}}.attention.attention.{name}", "in out*") for name in ("query", "key", "value")),
    _dense("vit.encoder.layer.{i}.attention.output.dense", "in* out"),
    *(_dense(f"vit.encoder.layer.{{i}}.{name}.dense") for name in ("intermediate", "output")),
    *(_norm(f"vit.encoder.layer.{{i}}.layernorm_{place}") for place in ("before", "after")),
)


def _t5_stack(stack: str, sublayers: tuple[str, ...]) -> Iterator[Entry]:
    for n, name in enumerate(sublayers):
        layer = f"{stack}.block.{{i}}.layer.{n}"
        if name == "DenseReluDense":
            for projection in ("wi", "wi_0", "wi_1", "wo"):
                yield from _dense(f"{layer}.{name}.{projection}")
        else:
            for projection in "qkv":
                yield from _dense(f"{layer}.{name}.{projection}", "in out*")
            yield from _dense(f"{layer}.{name}.o", "in* out")
            yield _table(f"{layer}.{name}.relative_attention_bias")
        yield from _norm(f"{layer}.layer_norm")
    yield from _norm(f"{stack}.final_layer_norm")


#: T5 and FLAN-T5, encoder and decoder.
T5 = _map(
    _table("shared"),
    _t5_stack("encoder", ("SelfAttention", "DenseReluDense")),
    _t5_stack("decoder", ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    linear("lm_head/kernel", "lm_head"),
)
