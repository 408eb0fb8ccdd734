"""Weights that come from files, one at a time; those that bitsandbytes has packed; and packed bases on disk."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins
from helpers import assert_trees_close, assert_trees_equal, eight_devices, total, trained
from safetensors.numpy import load_file, save_file
from test_export import published

import lora_jax as lora
from lora_jax import bases, key_maps
from lora_jax.bases import Stored
from lora_jax.bases.nf4_layouts import to_bytes

DATA = Path(__file__).parent / "data"
FIXTURE = load_file(DATA / "nf4.safetensors")
W = "layers.0.proj.weight"


# Files, one weight at a time ------------------------------------------------------------------------------------------


def shapes(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("name", "key_map"), [("llama", key_maps.LLAMA), ("gpt2", key_maps.GPT2)])
def test_a_model_in_files_is_the_model(name, key_map, shards, tmp_path):
    base = published(tmp_path / "in", name, jnp.bfloat16, shards)
    tensors = bases.open_safetensors(tmp_path / "in")
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert_trees_equal({name: tensor.read() for name, tensor in tensors.items()}, base)
    params = twins.from_torch(base, conv1d=name == "gpt2")
    stored = bases.from_torch(tensors, shapes(params), key_map)
    rules = {".*0.*_proj/kernel": None, ".*_proj/kernel|.*c_fc/kernel": bases.Nf4()}
    assert_trees_equal(bases.quantize(stored, rules), bases.quantize(params, rules))
    one = bases.open_safetensors(next((tmp_path / "in").glob("*.safetensors")))
    assert_trees_equal({n: t.read() for n, t in one.items()}, {n: base[n] for n in one})


def test_layers_are_stacked_and_heads_split(tmp_path):
    base = published(tmp_path / "in", "llama")
    flat = twins.from_torch(base)
    layers = [
        {p[len(f"model/layers/{i}/") :]: w for p, w in flat.items() if p.startswith(f"model/layers/{i}/")}
        for i in (0, 1)
    ]
    expected = {p: w for p, w in flat.items() if "/layers/" not in p}
    expected |= {f"model/layers/{path}": jnp.stack([layer[path] for layer in layers]) for path in layers[0]}
    q = "model/layers/self_attn/q_proj/kernel"
    expected[q] = expected[q].reshape(*expected[q].shape[:2], -1, 4).astype(jnp.bfloat16)
    stored = bases.from_torch(bases.open_safetensors(tmp_path / "in"), shapes(expected), key_maps.LLAMA.stacked())
    assert_trees_equal(jax.tree.map(lambda leaf: leaf.read(), stored), expected)
    assert_trees_equal(jax.tree.map(lambda leaf: leaf.like, stored), shapes(expected))


SPLIT = key_maps.KeyMap(*(key_maps.conv1d(f"{name}/kernel", "attn", "in out*", part=i) for i, name in enumerate("qkv")))


def test_parts_of_one_tensor():
    tensor = np.arange(6 * 12, dtype=np.float32).reshape(6, 12)
    params = {f"{name}/kernel": jnp.zeros((6, 2, 2)) for name in "qkv"}
    stored = bases.from_torch({"attn.weight": tensor}, params, SPLIT)
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(stored[f"{name}/kernel"].read(), tensor[:, 4 * i : 4 * i + 4].reshape(6, 2, 2))
    del params["v/kernel"]
    with pytest.raises(lora.LoraError, match=r"'k/kernel' is one of several .* those given have 8 outputs together"):
        bases.from_torch({"attn.weight": tensor}, params, SPLIT)


class Reader:
    """Gives arrays, and knows how many of them there are at once."""

    def __init__(self):
        self.refs, self.most, self.order = [], 0, []

    def stored(self, name, shape):
        def read():
            gc.collect()
            array = np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
            self.refs.append(weakref.ref(array))
            self.order.append(name)
            self.most = max(self.most, sum(ref() is not None for ref in self.refs))
            return array

        return Stored(jax.ShapeDtypeStruct(shape, np.float32), read)


@pytest.mark.parametrize("format", [bases.Nf4(), bases.Int8(), bases.Fp8()])
def test_one_weight_at_a_time(format):
    """Of a whole model, no more than one weight is in memory before it is packed; and only when its turn comes."""
    reader = Reader()
    params = {f"w{i}": reader.stored(f"w{i}", (64, 128)) for i in range(6)}
    packed = bases.quantize(params, {"w.*": format})
    assert reader.order == list(params)
    assert reader.most == 1
    expected = np.random.default_rng(2).normal(size=(64, 128)).astype(np.float32)
    assert_trees_equal(packed["w3"], bases.quantize({"w": expected}, {"w": format})["w"])


def test_one_layer_at_a_time():
    """A stack is filled layer by layer."""
    reader = Reader()
    key_map = key_maps.KeyMap(key_maps.linear("layers/{i}/up/kernel", "layers.{i}.up")).stacked()
    tensors = {f"layers.{i}.up.weight": reader.stored(str(i), (128, 64)) for i in range(5)}
    stored = bases.from_torch(tensors, {"layers/up/kernel": jax.ShapeDtypeStruct((5, 64, 128), jnp.bfloat16)}, key_map)
    assert not reader.order
    w = stored["layers/up/kernel"].read()
    assert (reader.order, reader.most) == (list("01234"), 1)
    assert (w.shape, w.dtype) == ((5, 64, 128), jnp.bfloat16)


def bad_read(array):
    return {"w": Stored(jax.ShapeDtypeStruct((4, 4), np.float32), lambda: array)}


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((4, 5), np.float32), r"'w' was read as float32\[4, 5\], expected float32\[4, 4\]"),
        (np.ones((4, 4), np.float16), r"'w' was read as float16\[4, 4\], expected"),
        (None, "'w' was read as NoneType"),
        (np.full((4, 4), np.nan, np.float32), "'w' holds NaN"),
    ],
)
def test_what_is_read_is_what_was_said(array, says):
    with pytest.raises(lora.LoraError, match=says):
        bases.quantize(bad_read(array), {"w": bases.Nf4()})


def test_nothing_is_read_before_all_is_checked():
    reader = Reader()
    params = {"a": reader.stored("a", (4, 4)), "b": reader.stored("b", (4,))}
    with pytest.raises(lora.LoraError, match="'b' is float32"):
        bases.quantize(params, {".*": bases.Nf4()})
    assert not reader.order
    with pytest.raises(lora.LoraError, match=r"m.weight has shape \[4, 4\], but 'k' of shape \[4, 5\]"):
        bases.from_torch(
            {"m.weight": params["a"]}, {"k": jnp.zeros((4, 5))}, key_maps.KeyMap(key_maps.linear("k", "m"))
        )
    assert not reader.order


ONE = key_maps.KeyMap(key_maps.linear("k", "m"))


@pytest.mark.parametrize(
    ("tensors", "params", "ignore", "says"),
    [
        (
            {"x.weight": (4, 4)},
            {"k": (4, 4)},
            "",
            "'k' is 'm.weight' by the key map, but there is no such tensor; the near",
        ),
        ({"m.weight": (4, 4), "a[0]": (1,)}, {"k": (4, 4)}, "", r"no parameter is 'a\[0\]', .*ignore='a\\\\\[0\\\\\]'"),
        ({"m.weight": (4, 4), "a": (1,)}, {"k": (4, 4)}, "(", "is not a regular expression"),
        ({"m.weight": (5, 4)}, {"k": (5, 4)}, "", r"m.weight has shape \[5, 4\]"),
        ({"m.weight": (4, 4)}, {"z": (4, 4)}, "", "no entry for 'z'"),
    ],
)
def test_models_and_files_that_do_not_fit(tensors, params, ignore, says):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    params = {name: jnp.zeros(shape) for name, shape in params.items()}
    with pytest.raises(lora.LoraError, match=says):
        bases.from_torch(tensors, params, ONE, ignore=ignore)


def test_more_that_does_not_fit():
    assert list(
        bases.from_torch({"m.weight": np.ones((2, 2)), "b": np.ones(1)}, {"k": jnp.ones((2, 2))}, ONE, ignore="b")
    )
    with pytest.raises(lora.LoraError, match="'k' is a str, expected an array"):
        bases.from_torch({}, {"k": "x"}, ONE)
    with pytest.raises(lora.LoraError, match=r"'m.weight' is int32\[2, 2\], but 'k' has numbers of float32"):
        bases.from_torch({"m.weight": np.ones((2, 2), np.int32)}, {"k": jnp.ones((2, 2))}, ONE)


# What bitsandbytes has packed -----------------------------------------------------------------------------------------


def state_of(**facts):
    return np.frombuffer(json.dumps({k: v for k, v in facts.items() if v is not None}).encode(), np.uint8)


def packed_by_bitsandbytes(name, shape=(96, 200), double=True, dtype="float32", backwards=False, **facts):
    """The tensors of one weight in a file, from real bytes; backwards, another weight. Numbers as many as the shape."""
    case, n = f"cs{int(double)}", int(np.prod(shape))
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape)}
    step = -1 if backwards else 1
    tensors = {
        name: FIXTURE[f"{case}.packed"][::step][: -(-n // 2)],
        f"{name}.absmax": FIXTURE[f"{case}.absmax"][::step][: -(-n // 64)],
        f"{name}.quant_map": FIXTURE[f"{case}.code"],
    }
    if double:
        known |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(FIXTURE["cs1.offset"][0])}
        tensors |= {
            f"{name}.nested_absmax": FIXTURE["cs1.state2.absmax"][: -(-n // 64 // 256)],
            f"{name}.nested_quant_map": FIXTURE["cs1.state2.code"],
        }
    return tensors | {f"{name}.quant_state.bitsandbytes__nf4": state_of(**known | facts)}


def unpacked_by_hand(tensors, name, shape):
    """Number by number."""
    scales = tensors[f"{name}.absmax"]
    if scales.dtype == np.uint8:
        code, outer = tensors[f"{name}.nested_quant_map"], tensors[f"{name}.nested_absmax"]
        scales = [code[q] * outer[i // 256] + FIXTURE["cs1.offset"][0] for i, q in enumerate(scales)]
    codes = [code for byte in tensors[name].reshape(-1) for code in (byte >> 4, byte & 15)][: int(np.prod(shape))]
    values = [tensors[f"{name}.quant_map"][code] * scales[i // 64] for i, code in enumerate(codes)]
    return np.array(values, np.float32).reshape(shape)


def written(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((96, 200), "float32"), ((7, 9), "bfloat16"), ((13, 64), "float16"), ((1, 1), "float32")]
)
def test_values_and_bytes_are_those_of_bitsandbytes(double, dtype, shape, tmp_path):
    tensors = packed_by_bitsandbytes("m.weight", shape, double, dtype)
    found = bases.open_safetensors(written(tmp_path, tensors))
    assert list(found) == ["m.weight"]
    weight = found["m.weight"].read()
    assert jax.tree.structure(weight) == jax.tree.structure(found["m.weight"].like)
    assert (found["m.weight"].shape, found["m.weight"].dtype) == (shape, jnp.dtype(dtype))
    expected = unpacked_by_hand(tensors, "m.weight", shape)
    np.testing.assert_array_equal(weight.dense(), expected.astype(dtype))
    pairs = to_bytes(weight.codes).T.reshape(-1)[: -(-expected.size // 2)]
    np.testing.assert_array_equal(pairs, tensors["m.weight"][:, 0])
    np.testing.assert_array_equal(weight.scales.T.reshape(-1), tensors["m.weight.absmax"])
    if shape == (96, 200):
        np.testing.assert_array_equal(expected, FIXTURE[f"cs{int(double)}.deq"])
    base = bases.quantize(found, {"m.weight": None})
    assert isinstance(base["m.weight"].codes, jax.Array)
    with pytest.raises(lora.LoraError, match=r"'m.weight' is packed already"):
        bases.quantize(found, {"m.weight": bases.Nf4()})


DECODER = key_maps.KeyMap(
    key_maps.linear("layers/{i}/q/kernel", "layers.{i}.q", "in out*"),
    key_maps.linear("layers/{i}/o/kernel", "layers.{i}.o", "in* out"),
    key_maps.array("norm/scale", "norm.weight"),
    key_maps.linear("head/kernel", "head"),
).stacked()
SHAPES = {
    "layers": {"q": {"kernel": (2, 200, 4, 24)}, "o": {"kernel": (2, 4, 24, 200)}},
    "norm": {"scale": (200,)},
    "head": {"kernel": (200, 96)},
}


def decoder(params, x):
    def layer(x, w):
        h = jnp.tanh(jnp.einsum("td,dhk->thk", x, w["q"]["kernel"]))
        return x + jnp.einsum("thk,hkd->td", h, w["o"]["kernel"]), None

    x = jax.lax.scan(layer, x, params["layers"])[0]
    return (x * params["norm"]["scale"][None]) @ params["head"]["kernel"]


def decoder_in_files(folder, double=True, dtype="float32"):
    """A model that bitsandbytes has packed: its tree of what is stored, and its values."""
    tensors = {"norm.weight": np.linspace(1, 2, 200, dtype=np.float32)}
    dense = {"norm.weight": tensors["norm.weight"]}
    weights = {"layers.0.q": (96, 200), "layers.1.q": (96, 200), "layers.0.o": (200, 96), "layers.1.o": (200, 96)}
    for name, shape in {**weights, "head": (96, 200)}.items():
        own = packed_by_bitsandbytes(f"{name}.weight", shape, double, dtype, backwards=".1." in name)
        dense[f"{name}.weight"] = unpacked_by_hand(own, f"{name}.weight", shape).astype(dtype).astype(np.float32)
        tensors |= own
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
    stored = bases.from_torch(bases.open_safetensors(written(folder, tensors)), params, DECODER)
    expected = {
        "layers": {
            "q": {"kernel": np.stack([dense[f"layers.{i}.q.weight"].T.reshape(200, 4, 24) for i in (0, 1)])},
            "o": {"kernel": np.stack([dense[f"layers.{i}.o.weight"].T.reshape(4, 24, 200) for i in (0, 1)])},
        },
        "norm": {"scale": dense["norm.weight"]},
        "head": {"kernel": dense["head.weight"].T},
    }
    return stored, jax.tree.map(jnp.asarray, expected)


@pytest.mark.parametrize(
    ("double", "dtype"), [(True, "float32"), pytest.param(False, "bfloat16", marks=pytest.mark.slow)]
)
def test_a_model_of_bitsandbytes_is_a_base(double, dtype, tmp_path):
    """Adapted and not, stacked, and seen with other axes than those that it was packed with."""
    stored, expected = decoder_in_files(tmp_path, double, dtype)
    base = bases.quantize(stored, {"head/kernel": None})
    assert_trees_equal(bases.dense(base), expected)
    assert base["head"]["kernel"].inner == (200, 96), "as the program has it, with nothing deferred but a cast"
    assert [name for name, _ in base["head"]["kernel"].deferred] == (["cast"] if dtype != "float32" else [])
    x = jax.random.normal(jax.random.key(1), (5, 200))
    rules = {"layers/.*": lora.Lora(rank=2)}
    plan = lora.plan(decoder, base, x, rules=rules)
    assert str(plan) == str(lora.plan(decoder, expected, x, rules=rules))
    adapters = trained(lora.init(jax.random.key(0), base, plan), 1)
    run = jax.jit(jax.value_and_grad(lambda a, p, x: total(lora.lora_apply(decoder)(p, a, x))))
    assert_trees_close(run(adapters, base, x), run(adapters, expected, x), rtol=1e-4, atol=1e-4)
    plain = jax.jit(lora.lora_apply(decoder))(base, {}, x)
    assert_trees_close(plain, jax.jit(decoder)(expected, x), rtol=1e-4, atol=1e-4)
    merged = lora.merge(base, adapters)
    assert isinstance(merged["head"]["kernel"], bases.Packed)
    assert_trees_close(bases.dense(merged), lora.merge(expected, adapters), rtol=1e-6, atol=1e-6)


def test_layers_that_are_packed_in_different_ways(tmp_path):
    key_map = key_maps.KeyMap(key_maps.linear("kernel", "{i}", "i in out"))
    params = {"kernel": jnp.zeros((2, 200, 96))}
    for other in (packed_by_bitsandbytes("1.weight", double=False), {"1.weight": np.zeros((96, 200), np.float32)}):
        tensors = bases.open_safetensors(written(tmp_path, packed_by_bitsandbytes("0.weight") | other))
        with pytest.raises(lora.LoraError, match=r"'kernel' is a stack of '1.weight' and others, .* in another way"):
            bases.from_torch(tensors, params, key_map)
    tensors = bases.open_safetensors(written(tmp_path, packed_by_bitsandbytes("attn.weight", (48, 200))))
    with pytest.raises(lora.LoraError, match="what is packed cannot be cut"):
        bases.from_torch(tensors, {f"{name}/kernel": jnp.zeros((48, 200, 1)) for name in "qkv"}, SPLIT)


def bad(**facts):
    return packed_by_bitsandbytes("m.weight", **facts)


def cut(part):
    return lambda: {name: t[:-1] if name == f"m.weight{part}" else t for name, t in bad().items()}


def without(part):
    return lambda: {name: t for name, t in bad().items() if name != f"m.weight{part}"}


def instead(part, change):
    return lambda: {name: change(t) if name == f"m.weight{part}" else t for name, t in bad().items()}


STATE = ".quant_state.bitsandbytes__nf4"
WRONG = [
    (cut(""), "has 9599 bytes, expected 9600"),
    (cut(".absmax"), r"has absmax U8\[299\], expected U8\[300\]"),
    (cut(".nested_absmax"), r"has nested_absmax F32\[1\], expected F32\[2\]"),
    (cut(".quant_map"), r"has quant_map F32\[15\], expected F32\[16\]"),
    (cut(STATE), "is no JSON"),
    (without(""), "says how 'm.weight' is packed, but has no such tensor"),
    (without(".absmax"), "has quant_map, nested_absmax, nested_quant_map beside it, expected absmax, quant_map"),
    (without(".nested_absmax"), "beside it, expected absmax, quant_map, nested_absmax, nested_quant_map"),
    (instead(".absmax", lambda t: t.astype(np.float32)), r"has absmax F32\[300\], expected U8"),
    (instead(".quant_map", lambda t: t + np.float32(1e-3)), "has a quant_map of its own, expected the codes of NF4"),
    (instead(".nested_quant_map", lambda t: t * np.nan), "has a nested_quant_map of its own"),
    (instead(STATE, lambda t: np.frombuffer(b"[1]", np.uint8)), "is a list, expected a dict"),
    (instead(STATE, lambda t: np.frombuffer(b"[" * 99999, np.uint8)), "is no JSON"),
    (instead(STATE, lambda t: np.frombuffer(b"\xff", np.uint8)), "is no JSON"),
    (lambda: bad(nested_offset=float("nan")), "with nested_offset nan, expected a finite number"),
    (lambda: bad(nested_offset=1e39), r"with nested_offset 1e\+39"),
    (lambda: bad(nested_offset="1"), "with nested_offset '1'"),
    (lambda: bad(blocksize=128), "with blocksize 128, expected 64"),
    (lambda: bad(nested_blocksize=64), "with nested_blocksize 64, expected 256"),
    (lambda: bad(quant_type="fp4"), "with quant_type 'fp4', expected 'nf4'"),
    (lambda: bad(dtype="int8"), "with the dtype 'int8', expected one of float32"),
    (lambda: bad(shape=[96, 0]), r"with the shape \[96, 0\], expected numbers above 0"),
    (lambda: bad(shape=[96, 2.0]), "with the shape"),
    (lambda: bad(shape=[96, True]), "with the shape"),
    (
        instead(STATE, lambda t: np.frombuffer(t.tobytes().replace(b"[96, 200]", b'"96"'), np.uint8)),
        "with the shape '96'",
    ),
    (lambda: bad(shape=[2**30] * 9), "has absmax"),
    (lambda: {"m.weight.quant_state.bitsandbytes__fp4": np.zeros(2, np.uint8)}, "by bitsandbytes as fp4, expected nf4"),
    (
        lambda: {"m.weight": np.zeros((2, 2), np.int8), "m.SCB": np.ones(2)},
        "'m' in .* by bitsandbytes as int8, expected",
    ),
]


@pytest.mark.parametrize(("tensors", "says"), WRONG)
def test_files_of_bitsandbytes_that_are_wrong(tensors, says, tmp_path):
    with pytest.raises(lora.LoraError, match=says):
        bases.open_safetensors(written(tmp_path, tensors()))


def test_scales_that_are_no_numbers(tmp_path):
    tensors = bad(double=False) | {"m.weight.absmax": np.full(300, np.inf, np.float32)}
    with pytest.raises(lora.LoraError, match="has scales of NaN or infinity"):
        bases.open_safetensors(written(tmp_path, tensors))["m.weight"].read()


def test_files_that_are_missing_or_damaged(tmp_path):
    published(tmp_path / "in", "lora", shards=2)
    index = tmp_path / "in" / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    index.write_text(
        json.dumps({"weight_map": facts["weight_map"] | {"gone": next(iter(facts["weight_map"].values()))}})
    )
    with pytest.raises(lora.LoraError, match="names 'gone', which none of its shards has, and 0 more"):
        bases.open_safetensors(tmp_path / "in")
    index.write_text(json.dumps(facts))
    tensors = bases.open_safetensors(tmp_path / "in")
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(lora.LoraError, match="cannot be read"):
        bases.open_safetensors(tmp_path / "in")
    with pytest.raises(lora.LoraError, match="became shorter while it was read"):
        [tensor.read() for tensor in tensors.values()]
    shard.unlink()
    with pytest.raises(lora.LoraError, match=r"there is no .*00002-of-00002.safetensors"):
        bases.open_safetensors(tmp_path / "in")
    with pytest.raises(lora.LoraError, match="there is no folder"):
        bases.open_safetensors(tmp_path / "nothing")


def mutated(random, tensors):
    """One tensor cut, gone, of another dtype or shape, or some of its bytes changed."""
    name = random.choice(list(tensors))
    tensor = np.ascontiguousarray(tensors[name]).reshape(-1)
    changed = tensor.copy()
    view = changed.view(np.uint8)
    for _ in range(random.randrange(1, 4)):
        view[random.randrange(view.size)] = random.randrange(256)
    options = [
        tensor[: random.randrange(tensor.size)],
        np.concatenate([tensor, tensor]),
        tensor.view(np.uint8) if random.random() < 0.5 else tensor[None],
        changed,
        changed,
    ]
    return (
        {**tensors, name: random.choice(options)}
        if random.random() < 0.9
        else {k: t for k, t in tensors.items() if k != name}
    )


def check_mutated(cases, tmp_path):
    """Read as it is, or refused; never something else than was said."""
    random, ends = Random(cases), [0, 0]
    for i in range(cases):
        tensors = mutated(random, bad(shape=(96, 200), double=bool(i % 2)))
        try:
            found = bases.open_safetensors(written(tmp_path, tensors))
            base = bases.quantize(found, {".*": None})
            assert all(base[name].shape == leaf.shape for name, leaf in found.items())
            ends[0] += 1
        except lora.LoraError:
            ends[1] += 1
    assert min(ends) > cases / 20


def test_mutated_files_of_bitsandbytes(tmp_path):
    check_mutated(150, tmp_path)


@pytest.mark.slow
def test_many_mutated_files_of_bitsandbytes(tmp_path, share):
    check_mutated(share(4000), tmp_path)


# Packed bases on disk -------------------------------------------------------------------------------------------------


def a_base():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": {"up": {"kernel": jax.random.normal(keys[0], (3, 32, 64))}, "norm": jnp.ones(3, jnp.bfloat16)},
        "odd/path.x": jax.random.normal(keys[1], (5, 7)),
        "eight": jax.random.normal(keys[2], (64, 7)).astype(jnp.bfloat16),
        "wide": jax.random.normal(keys[3], (16, 128)),
        "ids": jnp.arange(3),
        "scalar": jnp.float32(2),
        "small": jnp.ones(3, jnp.float8_e5m2),
    }
    rules = {
        "layers/.*kernel": bases.Nf4(),
        "odd.*": bases.Int8(),
        "eight": bases.Fp8(),
        "wide": bases.Nf4(double=False),
    }
    base = bases.quantize(params, rules)
    return base | {
        "wide": base["wide"]
        .with_deferred("transpose", (1, 0))
        .with_deferred("reshape", (128, 4, 4))
        .with_deferred("cast", jnp.bfloat16)
    }


def assert_same(found, expected):
    """Bit by bit, and of the same kinds."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (b.shape, b.dtype, np.asarray(b).tobytes())


def test_a_base_comes_back_bit_by_bit(tmp_path):
    base = a_base()
    bases.save(tmp_path / "base", base)
    found = bases.load(tmp_path / "base")
    assert_same(found, base)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found))
    stored, _ = decoder_in_files(tmp_path / "in")
    base = bases.quantize(stored, {".*": None})
    bases.save(tmp_path / "base", base)
    assert_same(bases.load(tmp_path / "base"), base)


def folder_of_format_1(to, **renamed):
    """A copy of a folder that was written when blocks of NF4 ran along the last axes; fields have other names."""
    shutil.copytree(DATA / "base_format_1", to)
    metadata = to / "base" / "metadata"
    text = metadata.read_text()
    for name, other in renamed.items():
        text = text.replace(f'"{name}"', f'"{other}"')
    metadata.write_text(text)
    return to


@pytest.mark.slow
def test_folders_of_format_1_are_read(tmp_path):
    """Bit by bit the values that the version which wrote them had; saved again, they are of this version."""
    base, expected = bases.load(folder_of_format_1(tmp_path / "1")), load_file(DATA / "base_format_1.safetensors")
    assert base["deferred"].dtype == base["two"].dtype == jnp.bfloat16
    assert {type(w).__name__ for w in base.values()} == {"Nf4Weight", "EightBits", "ArrayImpl"}
    for name, dense in bases.dense(base).items():
        np.testing.assert_array_equal(dense.astype(jnp.float32), expected[name], err_msg=name)
    bases.save(tmp_path / "2", base)
    assert_same(bases.load(tmp_path / "2"), base)


def test_what_is_the_same_in_both_layouts():
    """A kernel that was packed with blocks along its outputs is the transpose of one with blocks along its inputs."""
    base, expected = bases.load(DATA / "base_format_1"), load_file(DATA / "base_format_1.safetensors")
    w = base["kernel"]
    again = bases.quantize({"w": jnp.asarray(expected["kernel"].T)}, {"w": bases.Nf4(double=False)})["w"]
    assert (w.inner, w.deferred, again.deferred) == ((128, 4), (("transpose", (1, 0)),), ())
    np.testing.assert_array_equal(again.codes, w.codes)
    assert base["deferred"].deferred[0] == ("reshape", (64, 2, 2)), "two transposes are none"


def test_folders_of_earlier_versions_are_read(tmp_path):
    """Two fields of packed weights had other names."""
    folder = folder_of_format_1(tmp_path / "base", value_dtype="unpacked", deferred="view")
    metadata = folder / "base" / "metadata"
    metadata.write_text(metadata.read_text().replace('"view": [', '"deferred": [', 1))  # a weight of this name
    assert_same(bases.load(folder), bases.load(DATA / "base_format_1"))


def test_what_is_saved_takes_half_a_byte_a_number(tmp_path):
    w = jax.random.bits(jax.random.key(0), (2, 64, 256), jnp.uint8).view(jnp.int8).astype(jnp.float32)
    base = bases.quantize({"w": w}, {"w": bases.Nf4(double=False)})
    bases.save(tmp_path / "base", base)
    described = json.loads((tmp_path / "base" / "base" / "metadata").read_text())["params"]["w"][2]
    assert described == {"codes": "uint8[2, 32, 256]", "scales": "float32[2, 1, 256]"}


def test_a_base_comes_back_onto_a_mesh(tmp_path):
    base = {"w": bases.quantize({"w": jnp.ones((64, 128))}, {"w": bases.Nf4()})["w"], "b": jnp.arange(8.0)}
    mesh = eight_devices()
    there = {"w": jax.NamedSharding(mesh, jax.P("data")), "b": jax.NamedSharding(mesh, jax.P("data"))}
    placed = bases.place(base, there)
    bases.save(tmp_path / "base", placed)
    assert_same(bases.load(tmp_path / "base"), base)
    found = bases.load(tmp_path / "base", there)
    assert_same(found, placed)
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, placed)


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    base = a_base()
    bases.save(tmp_path / "base", base)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(lora.LoraError, match="disk full"):
        bases.save(tmp_path / "base", {"ids": base["ids"] + 1})
    monkeypatch.undo()
    assert_same(bases.load(tmp_path / "base"), base)
    (tmp_path / ".base.lora_jax-00000000").mkdir()
    (tmp_path / "base").rename(tmp_path / ".base.lora_jax-00000000" / "old0")
    with pytest.raises(lora.LoraError, match=r"interrupted: rename .*\.base\.lora_jax-00000000/old0 to"):
        bases.load(tmp_path / "base")
    bases.save(tmp_path / "base", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_bases_and_adapters_do_not_replace_one_another(tmp_path):
    lora.checkpoint.save(tmp_path / "adapters", {})
    bases.save(tmp_path / "base", {"w": jnp.ones(2)})
    with pytest.raises(lora.LoraError, match="holds no saved base; it is left as it is"):
        bases.save(tmp_path / "adapters", {"w": jnp.ones(2)})
    with pytest.raises(lora.LoraError, match="holds no saved adapters; it is left as it is"):
        lora.checkpoint.save(tmp_path / "base", {})
    with pytest.raises(lora.LoraError, match=r"holds no base saved by lora\.bases\.save"):
        bases.load(tmp_path / "adapters")
    with pytest.raises(lora.LoraError, match="which was to hold base saved by"):
        bases.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"w": 3.0}, "w is a float: only dicts of arrays of numbers are saved"),
        ([jnp.ones(2)], "is a list: only dicts"),
        ({"w": {0: jnp.ones(2)}}, "w: the key 0 is a int"),
        ({"w": jnp.ones((0, 2))}, "is empty, and cannot be saved"),
    ],
)
def test_what_cannot_be_saved(params, says, tmp_path):
    with pytest.raises(lora.LoraError, match=says):
        bases.save(tmp_path / "base", params)
    assert not (tmp_path / "base").exists()


def edited(change):
    def edit(folder):
        file = folder / "base" / "metadata"
        description = json.loads(file.read_text())
        change(description, description["params"])
        file.write_text(json.dumps(description))

    return edit


def cut_files(folder):
    for path in sorted((folder / "arrays").rglob("*")):
        if path.is_file() and path.stat().st_size > 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited(lambda d, p: d.update(format=3)), "format 3, this version reads 1 and 2: update lora_jax"),
        (edited(lambda d, p: p["eight"].__setitem__(0, "int3")), "'eight' is packed as 'int3'; .* update lora_jax"),
        (
            edited(lambda d, p: p["eight"][1].update(more=1)),
            r"'eight' is packed as 'eight_bits' with more; .* update lora_jax",
        ),
        (
            edited(lambda d, p: p["eight"][1].update(inner=[3, 3, 3])),
            "cannot be loaded: ValueError: the arrays of .eight. do not fit.* If it is damaged, save it again",
        ),
        (edited(lambda d, p: p["eight"][1].update(value_dtype={"dtype": "os.system"})), "is damaged"),
        (edited(lambda d, p: p.update(ids="int32[4]")), "is damaged"),
        (edited(lambda d, p: p.update(other="int32[3]")), "is damaged"),
        (edited(lambda d, p: p.update(eight=[])), "is damaged"),
        (lambda folder: (folder / "base" / "metadata").write_text("{"), "is damaged"),
        (cut_files, "is damaged"),
    ],
)
def test_what_cannot_be_loaded(change, says, tmp_path):
    bases.save(tmp_path / "base", a_base())
    change(tmp_path / "base")
    with pytest.raises(lora.LoraError, match=says):
        bases.load(tmp_path / "base")


def test_a_run_on_a_packed_base_goes_on(tmp_path):
    """The base is told from another one, and the adapters that were trained beside it come back."""
    stored, _ = decoder_in_files(tmp_path / "in")
    base, x = bases.quantize(stored, {".*": None}), jax.random.normal(jax.random.key(1), (5, 200))
    plan, optimizer = lora.plan(decoder, base, x, rules={"head.*": lora.Lora(rank=2)}), optax.adam(1e-2)
    step = lora.jit_step(lambda a, p, x: jnp.square(lora.lora_apply(decoder)(p, a, x)).mean(), optimizer)
    new = lora.TrainState.create(lora.init(jax.random.key(0), base, plan), optimizer)
    with lora.Checkpoints(tmp_path / "run", base, plan, every=1) as checkpoints:
        state, _ = step(jax.tree.map(jnp.copy, new), base, x)
        checkpoints.save(state)
    bases.save(tmp_path / "base", base)
    again = bases.load(tmp_path / "base")
    with lora.Checkpoints(tmp_path / "run", again, plan, every=1) as checkpoints:
        assert_trees_equal(checkpoints.restore(new)[0], state)
    other = again | {"head": {"kernel": jax.tree.map(lambda a: a + 1, again["head"]["kernel"])}}
    with (
        lora.Checkpoints(tmp_path / "run", other, plan, every=1) as checkpoints,
        pytest.raises(lora.LoraError, match=r"trained on another base:\n  head/kernel/codes: .* with other contents"),
    ):
        checkpoints.restore(new)
