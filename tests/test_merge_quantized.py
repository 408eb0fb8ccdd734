"""Merged models in 8 bits, and models of few bits merged into bf16: what compressed-tensors reads."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import twins
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_cli import run
from test_export import METADATA, published
from test_low_bits import F8, FORMATS, e4m3
from test_low_bits import published as in_few_bits
from test_peft import DATA, MLP

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop import merge_rows
from lora_jax.interop.eight_bit_codes import EIGHT_BITS
from lora_jax.interop.merge_quantized import merge_quantized

E4M3 = np.array([e4m3(code) for code in range(256) if code % 128 != 127])
DTYPES = {"F64": np.float64, "F32": np.float32, "BF16": jnp.bfloat16, "F8_E4M3": F8, "I8": np.int8}
GRIDS = {"fp8": E4M3, "fp8_block": E4M3, "int8": np.arange(-127, 128, dtype=np.float64)}


def tensors_in(folder):
    """All tensors of a folder. The reader of `safetensors.numpy` has no dtypes of 8-bit floats."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8:start]).items():
            if name != "__metadata__":
                own = data[start + facts["data_offsets"][0] : start + facts["data_offsets"][1]]
                found[name] = np.frombuffer(own, DTYPES[facts["dtype"]]).reshape(facts["shape"])
    return found


def by_hand(w, to, scale_dtype):
    """The nearest number of the grid, one weight at a time, in fp64; with the scale of its block as it is written."""
    grid, (rows, columns) = GRIDS[to], EIGHT_BITS[to].block
    q, scales = np.zeros(w.shape), {}
    for (i, j), number in np.ndenumerate(w):
        block = i // rows, j // columns
        if block not in scales:
            part = w[block[0] * rows : (block[0] + 1) * rows, block[1] * columns : (block[1] + 1) * columns]
            scales[block] = float(np.float32(np.abs(part).max() / np.float32(grid.max())).astype(scale_dtype))
        q[i, j] = grid[np.abs(grid - np.clip(number / scales[block], grid.min(), grid.max())).argmin()]
    shape = tuple(np.array(list(scales)).max(0) + 1)
    return q, np.array([scales[block] for block in np.ndindex(shape)]).reshape(shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize("to", EIGHT_BITS)
def test_each_number_is_the_nearest_of_its_grid(to, dtype, tmp_path, monkeypatch):
    """Merged in fp32 and rounded once; all but linear layers is as it was, and is named."""
    monkeypatch.setattr(merge_rows, "NUMBERS", 64)  # several parts of each tensor
    monkeypatch.setitem(EIGHT_BITS, "fp8_block", EIGHT_BITS["fp8_block"]._replace(block=(4, 4)))
    base = published(tmp_path / "in", "llama", dtype, shards=3)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    adapters, _ = lora.load_peft(DATA / "llama", twins.from_torch(base), key_maps.LLAMA)
    losses = merge_quantized(tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA, to=to)
    (tmp_path / "wide").mkdir()
    save_file({name: w.astype(np.float32) for name, w in base.items()}, tmp_path / "wide" / "model.safetensors")
    lora.merge_checkpoint(tmp_path / "wide", adapters, tmp_path / "merged", key_maps.LLAMA)
    merged = tensors_in(tmp_path / "merged")
    found = tensors_in(tmp_path / "out")
    linear = [name for name in base if name.endswith("_proj.weight")]
    assert linear
    assert sorted(found) == sorted([*base, *(f"{name}_scale" for name in linear)])
    for name, w in base.items():
        if name not in linear:
            np.testing.assert_array_equal(found[name], w if name not in losses else found[name])
            continue
        q, scales = by_hand(merged[name].astype(np.float64), to, dtype)
        own = found[name].astype(np.float64)
        assert found[f"{name}_scale"].dtype == dtype
        np.testing.assert_allclose(
            found[f"{name}_scale"].astype(np.float64), scales, rtol=1e-6 if dtype == np.float32 else 0
        )
        assert np.mean(own != q) < 0.01, "ties and the last bit of fp32 aside"
        assert np.abs(own - q).max() <= (32 if to != "int8" else 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == EIGHT_BITS[to].format
    assert {"lm_head"} <= set(config["ignore"])
    assert not any(name.removesuffix(".weight") in config["ignore"] for name in linear)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(found)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118
            assert opened.metadata() == METADATA
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("to", EIGHT_BITS)
def test_what_is_written_is_read_again(to, tmp_path):
    """By `lora.bases.open_safetensors`, as q * scale."""
    base = published(tmp_path / "in", "llama", jnp.bfloat16)
    adapters, _ = lora.load_peft(DATA / "llama", twins.from_torch(base), key_maps.LLAMA)
    merge_quantized(tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA, to=to)
    written, found = tensors_in(tmp_path / "out"), lora.bases.open_safetensors(tmp_path / "out")
    assert sorted(found) == sorted(base)
    rows, columns = EIGHT_BITS[to].block
    for name in base:
        w = written[name].astype(np.float64)
        if f"{name}_scale" in written:
            scales = written[f"{name}_scale"].astype(np.float64)
            w = w * scales[np.arange(w.shape[0]) // rows][:, np.arange(w.shape[1]) // columns]
        np.testing.assert_array_equal(np.asarray(found[name].read(), np.float64), w)


def test_what_survives(tmp_path):
    """All of a change of weights beside the grid, on average; nothing of a small change of weights on it."""
    rng, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj"
    axes = lora.KernelAxes((), (0,), (1,))
    a, b = rng.normal(size=(64, 2)), rng.normal(size=(2, 96))
    small = lora.LoraAdapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), axes, 1e-4)
    key_map = key_maps.KeyMap(key_maps.linear("w", name))
    w = rng.normal(size=(96, 64)).astype(np.float32)
    found = {}
    for base in ("beside", "on"):
        folder = tmp_path / base
        folder.mkdir()
        save_file({f"{name}.weight": w}, folder / "model.safetensors")
        found[base] = merge_quantized(folder, {"w": small}, tmp_path / f"{base} out", key_map, to="int8")[
            f"{name}.weight"
        ]
        q, scales = EIGHT_BITS["int8"].rounded(w, np.float32)
        w = EIGHT_BITS["int8"].values(q, scales)
    delta = 1e-4 * (a @ b).T
    assert 0.8 < found["beside"].kept < 1.2
    assert abs(found["on"].kept) < 0.05
    q, scales = EIGHT_BITS["int8"].rounded((w + delta).astype(np.float32), np.float32)
    loss = np.linalg.norm(EIGHT_BITS["int8"].values(q, scales) - (w + delta)) / np.linalg.norm(delta)
    np.testing.assert_allclose(found["on"].loss, loss, rtol=1e-3)
    zero = lora.LoraAdapter(small.a * 0, small.b, axes, 1.0)
    assert merge_quantized(tmp_path / "on", {"w": zero}, tmp_path / "z", key_map)[f"{name}.weight"] == (1.0, 0.0)


@pytest.mark.parametrize("name", ["fp8", "int4, zeros", "NVFP4", "int-quantized, asymmetric"])
def test_models_of_few_bits_are_merged_into_bf16(name, tmp_path):
    rng = np.random.default_rng(0)
    tensors, packing, expected, _ = FORMATS[name](rng)
    [w] = expected.values()
    tensors = {key.replace("m.", "model.layers.0.up_proj.", 1): tensor for key, tensor in tensors.items()}
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    in_few_bits(tmp_path / "in", tensors, packing, model_type="llama")
    a, b = rng.normal(size=(w.shape[1], 2)).astype(np.float32), rng.normal(size=(2, w.shape[0])).astype(np.float32)
    adapter = lora.LoraAdapter(jnp.asarray(a), jnp.asarray(b), lora.KernelAxes((), (0,), (1,)), 0.5)
    key_map = key_maps.KeyMap(key_maps.linear("w", "model.layers.0.up_proj"))
    with pytest.raises(lora.LoraError, match=r"lora.merge_quantized\(source, adapters, target\) unpacks them"):
        lora.merge_checkpoint(tmp_path / "in", {"w": adapter}, tmp_path / "out", key_map)
    losses = merge_quantized(tmp_path / "in", {"w": adapter}, tmp_path / "out", key_map, to="bf16")
    found = tensors_in(tmp_path / "out")
    assert sorted(found) == ["model.layers.0.up_proj.weight", "model.norm.weight"]
    exact = w.astype(np.float32) + 0.5 * (a @ b).T
    own = found["model.layers.0.up_proj.weight"]
    assert own.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(own.astype(np.float32), exact, rtol=2**-8, atol=1e-5)
    np.testing.assert_array_equal(found["model.norm.weight"], np.ones(3, np.float32))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    loss = np.linalg.norm(own.astype(np.float32) - exact) / np.linalg.norm(0.5 * a @ b)
    np.testing.assert_allclose(losses["model.layers.0.up_proj.weight"].loss, loss, rtol=1e-3)
    again = merge_quantized(tmp_path / "in", {"w": adapter}, tmp_path / "fp8", key_map, to="fp8")
    assert again.keys() == losses.keys()
    assert tensors_in(tmp_path / "fp8")["model.layers.0.up_proj.weight"].dtype == F8


@pytest.mark.parametrize("name", ["lora_emb", "conv", "qwen3moe", "pissa", "llama_tokens", "lora_bias_all"])
def test_other_changes_are_those_of_merge_checkpoint(name, tmp_path):
    """With `to="bf16"` and a source in fp32, all is what `lora.merge_checkpoint` writes."""
    if name == "conv":
        (tmp_path / "in").mkdir()
        shapes = {"conv.weight": (8, 3, 3, 3), "conv1.weight": (6, 4, 3)}
        base = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        save_file(base, tmp_path / "in" / "model.safetensors")
    else:
        base = published(tmp_path / "in", name)
    lora.merge_checkpoint(tmp_path / "in", DATA / name, tmp_path / "one")
    losses = merge_quantized(tmp_path / "in", DATA / name, tmp_path / "two", to="bf16")
    one, two = tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two")
    assert one.keys() == two.keys() == base.keys()
    for tensor in one:
        np.testing.assert_allclose(two[tensor], one[tensor], rtol=1e-5, atol=1e-6)
    assert all(survival.loss < 1e-4 for survival in losses.values())


def test_lengths_are_those_of_whole_outputs(tmp_path, monkeypatch):
    """Of DoRA, whatever is merged at a time."""
    monkeypatch.setattr(merge_rows, "NUMBERS", 16)
    params = twins.from_torch(published(tmp_path / "in", "dora"))
    adapters, _ = lora.load_peft(DATA / "dora", params, MLP)
    del adapters[next(path for path in adapters if "emb" in path)]
    lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "one", MLP)
    merge_quantized(tmp_path / "in", adapters, tmp_path / "two", MLP, to="bf16")
    one, two = tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two")
    for tensor in one:
        np.testing.assert_allclose(two[tensor], one[tensor], rtol=1e-5, atol=1e-6)


def test_a_head_of_its_own(tmp_path):
    """As `lora.merge_checkpoint(tied="untie")` writes it."""
    base = {"model.embed_tokens.weight": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
    base["model.layers.0.mlp.up_proj.weight"] = np.ones((4, 4), np.float32)
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    facts = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 8, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(facts))
    axes = lora.KernelAxes((), (0,), (1,))
    table = lora.LoraAdapter(jnp.ones((8, 2)), jnp.ones((2, 4)), axes, 1.0)
    key_map = key_maps.KeyMap(key_maps.embedding("table", "model.embed_tokens"))
    for to in ("fp8", "bf16"):
        merge_quantized(folder, {"table": table}, tmp_path / to, key_map, to=to, tied="untie")
        found = tensors_in(tmp_path / to)
        np.testing.assert_array_equal(found["lm_head.weight"], base["model.embed_tokens.weight"])
        np.testing.assert_allclose(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + 2)
        assert json.loads((tmp_path / to / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_is_refused_leaves_nothing(tmp_path):
    base = published(tmp_path / "in", "llama")
    adapters, _ = lora.load_peft(DATA / "llama", twins.from_torch(base), key_maps.LLAMA)
    where = (tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA)
    for more, says in [
        ({"to": "int4"}, "to='int4'.*expected one of fp8, fp8_block, int8, bf16"),
        ({"modules": "nothing"}, "no linear layers that 'nothing' matches"),
        ({"modules": "("}, "is no regular expression"),
        ({"tied": "maybe"}, "tied"),
    ]:
        with pytest.raises(lora.LoraError, match=f"(?s){says}"):
            merge_quantized(*where, **more)
    name = next(name for name in base if "down_proj" in name)
    broken = load_file(tmp_path / "in" / "model.safetensors")
    broken[name][0, 0] = np.nan
    save_file(broken, tmp_path / "in" / "model.safetensors")
    with pytest.raises(lora.LoraError, match=f"'{name}' holds NaN or infinity once it is merged"):
        merge_quantized(*where)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_command(capsys, tmp_path):
    published(tmp_path / "in", "llama", jnp.bfloat16)
    code, out, _ = run(capsys, "merge", tmp_path / "in", DATA / "llama", tmp_path / "out", "--to", "fp8", "--json")
    assert code == 0
    rows = json.loads(out)
    assert all(set(row) == {"kept", "loss"} for row in rows.values())
    code, out, _ = run(capsys, "merge", tmp_path / "in", DATA / "llama", tmp_path / "again", "--to", "int8")
    assert code == 0
    assert out.splitlines()[0].split("  ")[0] == "least is kept in"
    code, _, err = run(capsys, "merge", tmp_path / "in", DATA / "llama", tmp_path / "out", "--to", "int8")
    assert (code, "out" in err) == (1, True)
