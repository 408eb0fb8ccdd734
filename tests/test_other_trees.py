"""Key maps for the trees of other JAX libraries, against conversions that are written out in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import KernelAxes, key_maps
from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.key_maps import KeyMap, array, experts, linear

LAYERS, D, HEADS, GROUPS, SIZE, HIDDEN, RANK = 2, 12, 3, 2, 4, 10, 2  # 1 / sqrt(SIZE) is exact
ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
SHAPES = {  # of torch's weights, [out, in]
    **{f"{ATTENTION}.{name}_proj": (n * SIZE, D) for name, n in {"q": HEADS, "k": GROUPS, "v": GROUPS}.items()},
    f"{ATTENTION}.o_proj": (D, HEADS * SIZE),
    **{f"{MLP}.{name}_proj": (HIDDEN, D) for name in ("gate", "up")},
    f"{MLP}.down_proj": (D, HIDDEN),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def published():
    """The weights of a model as transformers names them."""
    names = [(name.format(i), shape) for i in range(LAYERS) for name, shape in SHAPES.items()]
    return {f"{name}.weight": normal(n, *shape) for n, (name, shape) in enumerate(names)}


def factors(names=SHAPES, seed=100):
    """A and B of modules, as PEFT has them."""
    found = {}
    for i in range(LAYERS):
        for n, name in enumerate(names):
            out, inputs = SHAPES[name]
            found[name.format(i)] = normal(seed + n + 50 * i, RANK, inputs), normal(seed + n + 50 * i + 1, out, RANK)
    return found


# The conversions, of one layer: from torch's [out, in], or B [out, r], to [in, heads, size] ---------------------------


def heads(w):
    """[out, in] to [in, heads, size]."""
    return w.T.reshape(w.shape[1], -1, SIZE)


def inputs_of_heads(w):
    """[out, heads * size] to [heads, size, out]."""
    return w.T.reshape(-1, SIZE, w.shape[0])


def pairs(w):
    """The two halves of the last axis, one by one in turns."""
    first, second = np.split(w, 2, axis=-1)
    return np.stack([first, second], -1).reshape(w.shape)


def maxtext(w):
    def stacked(name, convert):
        return np.stack([convert(w(name, i)) for i in range(LAYERS)], axis=1)

    return {
        "decoder/layers/self_attention/query/kernel": stacked("q", lambda x: pairs(heads(x)) / np.sqrt(SIZE)),
        "decoder/layers/self_attention/key/kernel": stacked("k", lambda x: pairs(heads(x))),
        "decoder/layers/self_attention/value/kernel": stacked("v", heads),
        "decoder/layers/self_attention/out/kernel": stacked("o", inputs_of_heads),
        "decoder/layers/mlp/wi_0/kernel": stacked("gate", np.transpose),
        "decoder/layers/mlp/wi_1/kernel": stacked("up", np.transpose),
        "decoder/layers/mlp/wo/kernel": stacked("down", np.transpose),
    }


def tunix(w):
    found = {}
    for i in range(LAYERS):
        found |= {f"layers/{i}/attn/{name}_proj/w": heads(w(name, i)) for name in "qkv"}
        found[f"layers/{i}/attn/o_proj/w"] = inputs_of_heads(w("o", i))
        found |= {f"layers/{i}/mlp/{name}_proj/kernel": w(name, i).T for name in ("gate", "up", "down")}
    return found


def einsums(layer, w, i):
    return {
        f"{layer}/attn/q_einsum/w": heads(w("q", i)).swapaxes(0, 1),
        f"{layer}/attn/kv_einsum/w": np.stack([heads(w(name, i)).swapaxes(0, 1) for name in "kv"]),
        f"{layer}/attn/attn_vec_einsum/w": inputs_of_heads(w("o", i)),
    }


def tunix_gemma(w):
    found = {}
    for i in range(LAYERS):
        found |= einsums(f"layers/{i}", w, i)
        found |= {f"layers/{i}/mlp/{name}_proj/kernel": w(name, i).T for name in ("gate", "up", "down")}
    return found


def gemma(w):
    found = {}
    for i in range(LAYERS):
        found |= einsums(f"layer_{i}", w, i)
        found[f"layer_{i}/mlp/gating_einsum"] = np.stack([w("gate", i), w("up", i)])
        found[f"layer_{i}/mlp/linear"] = w("down", i).T
    return found


def keras_llama(w):
    found = {}
    for i in range(LAYERS):
        layer = f"transformer_layer_{i}"
        found |= {f"{layer}/self_attention/{name}/kernel": heads(w(name[0], i)) for name in ("query", "key", "value")}
        found[f"{layer}/self_attention/attention_output/kernel"] = inputs_of_heads(w("o", i))
        for name, own in {"gate": "gate", "up": "intermediate", "down": "output"}.items():
            found[f"{layer}/feedforward_{own}_dense/kernel"] = w(name, i).T
    return found


TREES = {
    "maxtext": (maxtext, key_maps.MAXTEXT_LLAMA.stacked(axis=1)),
    "tunix": (tunix, key_maps.TUNIX),
    "tunix_gemma": (tunix_gemma, key_maps.TUNIX_GEMMA),
    "gemma": (gemma, key_maps.GEMMA_FLAX),
    "keras": (keras_llama, key_maps.KERAS_LLAMA),
}
trees = pytest.mark.parametrize("tree", TREES)
some_trees = pytest.mark.parametrize("tree", ["maxtext", "gemma"])  # all that an entry can say is in one of them


def converted(tree, tensors):
    """The tree of these tensors of torch, by the conversion written out."""

    def weight(name, i):
        where = ATTENTION if len(name) == 1 else MLP
        return tensors[f"{where.format(i)}.{name}_proj.weight"]

    return {path: jnp.asarray(leaf) for path, leaf in TREES[tree][0](weight).items()}


def peft_file(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def write_peft(folder, pairs_of_modules):
    """A folder of these factors as PEFT writes it, by way of a map that changes nothing."""
    same = KeyMap(*(linear(name, name) for name in pairs_of_modules))
    adapters = {
        name: LoraAdapter(jnp.asarray(a.T), jnp.asarray(b.T), KernelAxes((), (0,), (1,)), 2.0)
        for name, (a, b) in pairs_of_modules.items()
    }
    lora.save_peft(folder, adapters, same)


@trees
def test_weights_are_those_of_the_conversion(tree):
    tensors = published()
    params = converted(tree, tensors)
    found = lora.to_torch(params, TREES[tree][1])
    assert {*found} == {*tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    stored = lora.bases.from_torch(tensors, params, TREES[tree][1])
    for path, leaf in params.items():
        np.testing.assert_array_equal(np.asarray(stored[path].read()), leaf, err_msg=path)


@some_trees
def test_adapters_come_back_and_change_what_they_change_in_torch(tree, tmp_path):
    own = factors()
    write_peft(tmp_path / "theirs", own)
    tensors = published()
    params = converted(tree, tensors)
    adapters, others = lora.load_peft(tmp_path / "theirs", params, TREES[tree][1])
    assert not others
    assert {*adapters} == {*params}
    # W' = W + 2 B A in torch, converted, is the merged parameter.
    changed = {f"{name}.weight": tensors[f"{name}.weight"] + 2 * b @ a for name, (a, b) in own.items()}
    expected = converted(tree, changed)
    merged = lora.merge(params, adapters)
    for path, leaf in expected.items():
        np.testing.assert_allclose(merged[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)
    # Written again, all tensors are the same bits, and so are the factors that are read from these.
    lora.save_peft(tmp_path / "ours", adapters, TREES[tree][1])
    theirs, ours = peft_file(tmp_path / "theirs"), peft_file(tmp_path / "ours")
    assert {*theirs} == {*ours}
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    again, _ = lora.load_peft(tmp_path / "ours", params, TREES[tree][1])
    for path, adapter in adapters.items():
        np.testing.assert_array_equal(again[path].a, adapter.a)
        np.testing.assert_array_equal(again[path].b, adapter.b)


@some_trees
def test_merged_files_are_the_merged_tree_converted(tree, tmp_path):
    tensors = published()
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    write_peft(tmp_path / "peft", factors())
    params = converted(tree, tensors)
    adapters, _ = lora.load_peft(tmp_path / "peft", params, TREES[tree][1])
    lora.merge_checkpoint(tmp_path / "model", adapters, tmp_path / "merged", TREES[tree][1])
    expected = lora.to_torch(lora.merge(params, adapters), TREES[tree][1])
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)


# Experts --------------------------------------------------------------------------------------------------------------

EXPERTS = 3
OF_EXPERTS = {"gate_up_proj": (EXPERTS, 2 * HIDDEN, D), "down_proj": (EXPERTS, D, HIDDEN)}
MOE_TREES = {
    "tunix": (key_maps.TUNIX, "layers/{i}/mlp/{name}_proj", "layers/{i}/mlp/router/kernel"),
    "maxtext": (key_maps.MAXTEXT_QWEN, "decoder/layers_{i}/moe_block/{wi}", "decoder/layers_{i}/moe_block/gate/kernel"),
    "mixtral": (
        key_maps.MAXTEXT_MIXTRAL.stacked(axis=1),
        "decoder/layers/MoeBlock_0/{wi}",
        "decoder/layers/MoeBlock_0/gate/kernel",
    ),
}


def with_experts(tree, tensors):
    """The tree of these tensors of torch: experts [E, in, out], of scanned layers [E, layers, in, out]."""
    key_map, path, router = MOE_TREES[tree]
    found = {}
    for i in range(LAYERS):
        gate, up = np.split(tensors[f"{MLP.format(i)}.experts.gate_up_proj"], 2, axis=1)
        own = {"gate": gate, "up": up, "down": tensors[f"{MLP.format(i)}.experts.down_proj"]}
        names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        for name, w in own.items():
            found.setdefault(path.format(i=i, name=name, wi=names[name]), []).append(w.swapaxes(1, 2))
        found.setdefault(router.format(i=i), []).append(tensors[f"{MLP.format(i)}.gate.weight"].T)
    return key_map, {
        leaf: jnp.asarray(np.stack(layers, 1) if len(layers) > 1 else layers[0]) for leaf, layers in found.items()
    }


@pytest.mark.parametrize("tree", MOE_TREES)
def test_experts_are_those_of_the_conversion(tree, tmp_path):
    tensors = {
        f"{MLP.format(i)}.experts.{name}": normal(10 * i + n, *shape)
        for i in range(LAYERS)
        for n, (name, shape) in enumerate(OF_EXPERTS.items())
    }
    tensors |= {f"{MLP.format(i)}.gate.weight": normal(90 + i, EXPERTS, D) for i in range(LAYERS)}
    key_map, params = with_experts(tree, tensors)
    found = lora.to_torch(params, key_map)
    assert {*found} == {*tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    for path, stored in lora.bases.from_torch(tensors, params, key_map).items():
        np.testing.assert_array_equal(np.asarray(stored.read()), params[path], err_msg=path)

    # Adapters of all experts go to PEFT and come back as the same change, and are merged into files of single experts.
    matches = key_map.match({path: leaf.shape for path, leaf in params.items() if leaf.ndim > 2})
    adapters = {}
    for n, (path, match) in enumerate(matches.items()):
        both = 2 if match.entry.part is None else 1  # PEFT has one rank for all: that of gate and up together
        fresh = lora.Lora(both * RANK, both * 4).factors(jax.random.key(n), match.shape, match.axes)
        adapters[path] = dataclasses.replace(fresh, b=jax.random.normal(jax.random.key(n + 50), fresh.b.shape))
    merged = lora.merge(params, adapters)
    lora.save_peft(tmp_path / "peft", adapters, key_map)
    again, _ = lora.load_peft(tmp_path / "peft", params, key_map)
    for path, leaf in lora.merge(params, again).items():
        np.testing.assert_allclose(leaf, merged[path], rtol=1e-5, atol=1e-5, err_msg=path)
    expected = lora.to_torch(merged, key_map)
    apart = {name: tensor for name, tensor in tensors.items() if name.endswith("gate.weight")}
    for i in range(LAYERS):
        gate, up = np.split(tensors[f"{MLP.format(i)}.experts.gate_up_proj"], 2, axis=1)
        down = tensors[f"{MLP.format(i)}.experts.down_proj"]
        for name, w in {"gate": gate, "up": up, "down": down}.items():
            apart |= {f"{MLP.format(i)}.experts.{e}.{name}_proj.weight": w[e].copy() for e in range(EXPERTS)}
    (tmp_path / "model").mkdir()
    save_file(apart, tmp_path / "model" / "model.safetensors")
    lora.merge_checkpoint(tmp_path / "model", adapters, tmp_path / "merged", key_map)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for i in range(LAYERS):
        both = [
            np.concatenate([written[f"{MLP.format(i)}.experts.{e}.{name}_proj.weight"] for name in ("gate", "up")])
            for e in range(EXPERTS)
        ]
        name = f"{MLP.format(i)}.experts.gate_up_proj"
        np.testing.assert_allclose(np.stack(both), expected[name], rtol=1e-5, atol=1e-5)


# Keys and values in one parameter -------------------------------------------------------------------------------------

KV = "layers/0/attn/kv_einsum/w"


def project(params, x):
    return jnp.einsum("bsd,ckdh->cbskh", x, params[KV])


def kv_plan(stack=None):
    params = {KV: jnp.asarray(normal(1, 2, GROUPS, D, SIZE))}
    rule = lora.Lora(rank=RANK) if stack is None else lora.Lora(rank=RANK, stack=stack)
    return params, lora.plan(project, params, jnp.asarray(normal(2, 1, 3, D)), rules={".*": rule})


def test_an_a_that_keys_and_values_share_is_written_to_both(tmp_path):
    params, plan = kv_plan()
    assert plan[KV].axes == KernelAxes((), (2,), (0, 1, 3))
    a, b = normal(3, D, RANK), normal(4, RANK, 2, GROUPS, SIZE)
    adapters = {KV: LoraAdapter(jnp.asarray(a), jnp.asarray(b), plan[KV].axes, 1.0)}
    lora.save_peft(tmp_path / "peft", adapters, key_maps.TUNIX_GEMMA)
    tensors = peft_file(tmp_path / "peft")
    for i, name in enumerate("kv"):
        module = f"model.layers.0.self_attn.{name}_proj"
        np.testing.assert_array_equal(tensors[f"{module}.lora_A.weight"], a.T)
        np.testing.assert_array_equal(tensors[f"{module}.lora_B.weight"], b[:, i].reshape(RANK, -1).T)
    shared, _ = lora.load_peft(tmp_path / "peft", plan, key_maps.TUNIX_GEMMA)
    assert shared[KV].axes == plan[KV].axes
    np.testing.assert_array_equal(shared[KV].a, a)
    np.testing.assert_array_equal(shared[KV].b, b)
    apart, _ = lora.load_peft(tmp_path / "peft", params, key_maps.TUNIX_GEMMA)
    assert apart[KV].axes == KernelAxes((0,), (2,), (1, 3))
    x = jnp.asarray(normal(5, 1, 3, D))
    expected = lora.lora_apply(project)(params, adapters, x)
    np.testing.assert_allclose(lora.lora_apply(project)(params, apart, x), expected, rtol=1e-5, atol=1e-5)


def test_different_a_of_keys_and_values_do_not_fit_one(tmp_path):
    _, plan = kv_plan()
    own = {
        name: pair for name, pair in factors().items() if name.endswith(("0.self_attn.k_proj", "0.self_attn.v_proj"))
    }
    write_peft(tmp_path / "peft", own)
    mend = r"'layers/0/attn/kv_einsum/w' .*the A of its matrices differ: plan it .*lora.Lora\(rank=8, stack=0\)"
    with pytest.raises(lora.LoraError, match=mend):
        lora.load_peft(tmp_path / "peft", plan, key_maps.TUNIX_GEMMA)
    apart, _ = lora.load_peft(tmp_path / "peft", kv_plan(stack=0)[1], key_maps.TUNIX_GEMMA)
    for i, (a, b) in enumerate(own.values()):
        np.testing.assert_array_equal(apart[KV].a[i], a.T)
        np.testing.assert_array_equal(apart[KV].b[i], b.T.reshape(RANK, GROUPS, SIZE))


def test_values_alone_fit_a_shared_a(tmp_path):
    _, plan = kv_plan()
    own = {name: pair for name, pair in factors().items() if name.endswith("0.self_attn.v_proj")}
    write_peft(tmp_path / "peft", own)
    [(a, b)] = own.values()
    shared, _ = lora.load_peft(tmp_path / "peft", plan, key_maps.TUNIX_GEMMA)
    np.testing.assert_array_equal(shared[KV].a, a.T)
    assert not np.any(shared[KV].b[:, 0])
    np.testing.assert_array_equal(shared[KV].b[:, 1], b.T.reshape(RANK, GROUPS, SIZE))


def test_an_a_that_experts_share_is_merged_into_each(tmp_path):
    key_map = KeyMap(experts("up", "mlp.experts.up_proj"))
    w, a, b = normal(0, 3, D, HIDDEN), normal(1, D, RANK), normal(2, RANK, 3, HIDDEN)
    adapters = {"up": LoraAdapter(jnp.asarray(a), jnp.asarray(b), KernelAxes((), (1,), (0, 2)), 2.0)}
    (tmp_path / "model").mkdir()
    save_file({"mlp.experts.up_proj": w.swapaxes(1, 2).copy()}, tmp_path / "model" / "model.safetensors")
    lora.merge_checkpoint(tmp_path / "model", adapters, tmp_path / "merged", key_map)
    found = load_file(tmp_path / "merged" / "model.safetensors")["mlp.experts.up_proj"]
    expected = w + 2 * np.einsum("dr,reh->edh", a, b)
    np.testing.assert_allclose(found, expected.swapaxes(1, 2), rtol=1e-5, atol=1e-5)


def test_three_modules_in_one_parameter():
    tensors = {f"model.layers.0.self_attn.{name}_proj.weight": normal(n, 8, D) for n, name in enumerate("qkv")}
    params = {"layer_0/attn/qkv_einsum/w": np.stack([heads(w).swapaxes(0, 1) for w in tensors.values()])}
    found = lora.to_torch(params, key_maps.GEMMA_FLAX)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


# Order and size of heads ----------------------------------------------------------------------------------------------

QUERY = KeyMap(
    linear("query", "q", "in out out", interleaved=True, factor="1/sqrt(head_dim)"),
    array("bias", "q.bias", "out out"),
)


@pytest.mark.parametrize("size", [8, 64, 128])
def test_the_factor_is_that_of_the_size_of_a_head(size):
    w = normal(0, 2 * size, D)
    ours = w.T.reshape(D, 2, size)
    first, second = np.split(ours, 2, axis=-1)
    ours = np.stack([first, second], -1).reshape(ours.shape) * np.float32(1 / np.sqrt(size))
    stored = lora.bases.from_torch({"q.weight": w}, {"query": ours}, QUERY)
    np.testing.assert_array_equal(np.asarray(stored["query"].read()), ours)
    tolerance = 0 if size == 64 else 2e-7  # the root of the others is no number of the computer's
    np.testing.assert_allclose(lora.to_torch({"query": ours}, QUERY)["q.weight"], w, rtol=tolerance, atol=0)


def test_lengths_of_dora_have_order_and_size_of_the_outputs(tmp_path):
    w = normal(0, HEADS * SIZE, D)
    lengths = np.abs(normal(1, HEADS * SIZE))
    a, b = normal(2, D, RANK), normal(3, RANK, HEADS, SIZE)
    m = pairs(lengths.reshape(HEADS, SIZE)) / np.sqrt(SIZE)
    axes = KernelAxes((), (0,), (1, 2))
    adapters = {"query": DoraAdapter(jnp.asarray(a), jnp.asarray(b), jnp.asarray(m), axes, 1.0)}
    params = {"query": jnp.asarray(pairs(heads(w)) / np.sqrt(SIZE))}
    lora.save_peft(tmp_path / "peft", adapters, QUERY)
    tensors = peft_file(tmp_path / "peft")
    np.testing.assert_array_equal(tensors["q.lora_magnitude_vector"].reshape(-1), lengths)
    b_of_torch = tensors["q.lora_B.weight"]
    np.testing.assert_array_equal(pairs(heads(b_of_torch)) / np.sqrt(SIZE), b)
    v = w + b_of_torch @ a.T
    expected = lengths[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    merged = lora.to_torch(lora.merge(params, adapters), QUERY)["q.weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    again, _ = lora.load_peft(tmp_path / "peft", params, QUERY)
    for name in ("a", "b", "m"):
        np.testing.assert_array_equal(getattr(again["query"], name), getattr(adapters["query"], name))


@pytest.mark.parametrize("rule", [lora.Loha(rank=2), lora.AdaLora(rank=2), lora.Lokr(rank=2)])
def test_other_kinds_have_order_and_size_once(rule, tmp_path):
    params = {"query": jnp.asarray(normal(0, D, HEADS, SIZE))}
    x = jnp.asarray(normal(1, 3, D))
    plan = lora.plan(lambda params, x: jnp.einsum("bd,dhk->bhk", x, params["query"]), params, x, rules={".*": rule})
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, lora.init(jax.random.key(0), params, plan))
    expected = lora.to_torch(lora.merge(params, adapters), QUERY)["q.weight"]
    lora.save_peft(tmp_path / "peft", adapters, QUERY)
    same = KeyMap(linear("q", "q"))
    base = {"q": jnp.asarray(lora.to_torch(params, QUERY)["q.weight"].T)}
    theirs, _ = lora.load_peft(tmp_path / "peft", base, same)
    np.testing.assert_allclose(lora.merge(base, theirs)["q"].T, expected, rtol=1e-5, atol=1e-5)
    again, _ = lora.load_peft(tmp_path / "peft", params, QUERY)
    np.testing.assert_allclose(
        lora.merge(params, again)["query"], lora.merge(params, adapters)["query"], rtol=1e-5, atol=1e-5
    )


# What a key map cannot say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear("{k|v}/w", "{k|v}_proj"), r"'\{k\|v\}/w' has \{k\|v\}, which stands for the names"),
        (lambda: linear("w", "q", factor="sqrt"), "the factor of 'w' is 'sqrt', expected a number or '1/sqrt"),
        (lambda: linear("w", "q", factor=0), "the factor of 'w' is 0"),
        (lambda: key_maps.LLAMA.stacked(axis=2), r"stacked\(axis=2\): .* do not say where that is"),
    ],
)
def test_entries_that_say_nothing(make, message):
    with pytest.raises(lora.LoraError, match=message):
        make()


def test_an_axis_of_modules_has_one_index_for_each():
    with pytest.raises(lora.LoraError, match=r"its axis 0 holds the modules 'k\|v': mend that entry"):
        lora.to_torch({KV: np.zeros((3, GROUPS, D, SIZE))}, key_maps.TUNIX_GEMMA)


def test_what_is_packed_keeps_its_order():
    w = lora.bases.quantize({"q": jnp.asarray(normal(0, 64, 64))}, {"q": lora.bases.Int8()})["q"]
    stored = lora.bases.Stored(jax.eval_shape(lambda: w), lambda: w)
    with pytest.raises(lora.LoraError, match="which what is packed cannot be given"):
        lora.bases.from_torch({"q.weight": stored}, {"query": jnp.zeros((64, 16, 4))}, QUERY)


def test_a_kind_whose_files_have_no_outputs_of_their_own_is_refused(tmp_path):
    params = {"q": jnp.asarray(normal(0, D, 12))}
    x = jnp.asarray(normal(1, 3, D))
    plan = lora.plan(lambda params, x: x @ params["q"], params, x, rules={".*": lora.Lokr(rank=2)})
    lora.save_peft(tmp_path / "peft", lora.init(jax.random.key(0), params, plan), KeyMap(linear("q", "q")))
    with pytest.raises(lora.LoraError, match="'query' is not a whole linear layer by the key map, and LOKR is read"):
        lora.load_peft(tmp_path / "peft", {"query": jnp.zeros((D, 3, SIZE))}, QUERY)
