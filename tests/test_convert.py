"""`lora-jax convert` between all formats: what comes back is what went out."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_peft import DATA

from lora_jax.cli import main
from lora_jax.interop.conversions import FORMATS, format_of
from lora_jax.interop.peft_modules import read_peft
from lora_jax.key_maps import KeyMap, linear

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# Of the formats that are read: what the output is called, and the one that its files are told to be of.
_LAYER = "model.layers.{i}."
NAMES = KeyMap(
    *(linear(_LAYER + name, _LAYER + name) for name in [f"self_attn.{x}_proj" for x in "qkvo"]),
    *(linear(_LAYER + name, _LAYER + name) for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
)
OUTPUTS = {
    "peft": ("out", "peft"),
    "vllm": ("out", "peft"),
    "vllm-by-expert": ("out", "peft"),
    "sglang": ("out", "peft"),
    "gguf": ("out.gguf", "gguf"),
    "mlx": ("out", "mlx"),
    "kohya": ("out.safetensors", "kohya"),
    "diffusers": ("out.safetensors", "kohya"),
    "orbax": ("out", None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model: a config, and weights of the shapes that the adapters of `llama` are for."""
    folder = tmp_path_factory.mktemp("model")
    found = read_peft(DATA / "llama")
    assert found is not None
    weights = {
        f"{name}.weight": np.zeros((len(arrays["b"]), arrays["a"].shape[1]), np.float16)
        for name, (arrays, _) in found.outlines.items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def deltas(folder: Path) -> dict[str, Any]:
    """The change of each module of a folder of PEFT, in fp64."""
    found = read_peft(folder)
    assert found is not None
    return {
        name: scale * arrays["b"].astype(np.float64) @ arrays["a"].astype(np.float64)
        for name, (arrays, scale) in found.modules.items()
    }


@pytest.mark.parametrize("to", OUTPUTS)
def test_there_and_back(to: str, base: Path, tmp_path: Path) -> None:
    name, told = OUTPUTS[to]
    assert run("convert", DATA / "llama", tmp_path / name, "--to", to, "--base", base) == 0
    assert format_of(tmp_path / name) == told
    assert run("convert", tmp_path / name, tmp_path / "back", "--base", base, *_map(to)) == 0
    there, back = deltas(DATA / "llama"), deltas(tmp_path / "back")
    assert sorted(back) == sorted(there)
    for module, delta in there.items():
        np.testing.assert_allclose(back[module], delta, rtol=1e-6, atol=1e-7)


def _map(to: str) -> tuple[str, ...]:
    """What a folder of orbax does not know: that its paths are torch's names."""
    return ("--key-map", "test_convert:NAMES") if to == "orbax" else ()


@pytest.mark.parametrize("to", [name for name in OUTPUTS if name != "orbax"])
def test_inspect_and_verify(to: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = OUTPUTS[to]
    run("convert", DATA / "llama", tmp_path / name, "--to", to, "--base", base)
    assert run("inspect", tmp_path / name, "--base", base) == 0
    assert "self_attn.q_proj" in capsys.readouterr().out
    assert run("verify", tmp_path / name, "--base", base) == 0


@pytest.mark.parametrize(
    ("kind", "to", "tensor"),
    [
        ("adalora", "mlx", "lin0.lora_a"),
        ("conv_dora", "kohya", "lora_unet_conv.dora_scale"),
        ("loha", "kohya", "lora_unet_lin0.hada_w1_a"),
        ("loha", "diffusers", "unet.lin0.lora_A.weight"),
        ("lokr", "mlx", "lin0.lora_b"),
        ("conv", "vllm", "base_model.model.conv.lora_A.weight"),
    ],
)
def test_a_kind_as_it_is_or_as_the_lora_that_it_is(kind: str, to: str, tensor: str, tmp_path: Path) -> None:
    output = tmp_path / OUTPUTS[to][0]
    assert run("convert", DATA / kind, output, "--to", to) == 0
    assert tensor in load_file(next(output.glob("*.safetensors")) if output.is_dir() else output)


MISTAKES = [
    (["llama", "out.gguf", "--to", "gguf"], "--base"),
    (["llama", "out", "--from", "gguf"], "is a folder, expected a file"),
    (["llama", "out", "--from", "orbax"], "holds adapters of HF PEFT"),
    (["llama", "out", "--to", "kohya"], "write to"),
    (["llama", "out.safetensors", "--to", "gguf"], "whose name ends in .gguf"),
    (["llama/adapter_model.safetensors", "out"], "its scales are in the other one, adapter_config.json"),
    (["llama/adapter_config.json", "out"], "one of the files of a folder of peft"),
    (["llama/none.gguf", "out"], "there is no "),
    (["../../test_convert.py", "out"], "holds no adapters: of files"),
    ([".", "out"], "holds folders of adapters, 'adalora'"),
    (["conv", "out", "--to", "mlx"], "MLX has no LoRA of convolutions"),
    (["conv_dora", "out", "--to", "vllm"], "is a DoraAdapter"),
    (["lora", "out.safetensors", "--to", "diffusers"], "no place for others ('head.bias')"),
    (["qwen3moe", "out", "--to", "mlx"], "adapts mlp.experts.down_proj"),
    (["llama", "out", "--key-map", "llama"], "leave out --key-map"),
    (["llama", "there", "--to", "kohya"], "exists"),
    (["llama", "out", "--step", "3"], "no steps"),
    (["llama_tokens", "out", "--to", "mlx"], "has rows of tables"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_mistakes(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("mine")
    source, output, *options = arguments
    assert run("convert", DATA / source, tmp_path / output, *options) == 1
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


def test_every_format_is_an_option() -> None:
    assert {*FORMATS} <= {*OUTPUTS}


def test_the_dtype_of_factors_is_kept(tmp_path: Path, base: Path) -> None:
    run("convert", DATA / "llama", tmp_path / "out", "--to", "mlx")
    dtypes = {str(array.dtype) for array in load_file(tmp_path / "out" / "adapters.safetensors").values()}
    assert dtypes == {str(array.dtype) for array in load_file(DATA / "llama" / "adapter_model.safetensors").values()}


# What else reads adapters: every command takes all formats ------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "mlx", "kohya", "diffusers"])
def test_merge_and_compose_take_all_formats(to: str, base: Path, tmp_path: Path) -> None:
    """The base of `merge` is also what GGUF and names without dots are read by; `compose` has an option for it."""
    name, _ = OUTPUTS[to]
    assert run("convert", DATA / "llama", tmp_path / name, "--to", to, "--base", base) == 0
    assert run("merge", base, tmp_path / name, tmp_path / "merged") == 0
    there, merged = deltas(DATA / "llama"), load_file(tmp_path / "merged" / "model.safetensors")
    parts = [f"{tmp_path / name}:0.5", f"{DATA / 'llama'}:-2", tmp_path / "sum"]
    assert run("compose", *parts, "--base", base, "--method", "sum") == 0
    for module, total in deltas(tmp_path / "sum").items():
        np.testing.assert_allclose(merged[f"{module}.weight"], there[module], rtol=1e-3, atol=1e-6)  # of fp16
        np.testing.assert_allclose(total, -1.5 * there[module], rtol=1e-5, atol=1e-6)


def test_a_base_that_only_reads(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Methods that take no weights take a base where a format needs it, and refuse it where none does."""
    run("convert", DATA / "llama", tmp_path / "a.gguf", "--to", "gguf", "--base", base)
    ties = ("--method", "ties", "--density", "0.5", "--rank", "2", "--base", base)
    assert run("compose", tmp_path / "a.gguf", DATA / "llama", tmp_path / "out", *ties) == 0
    assert run("compose", DATA / "llama", DATA / "llama", tmp_path / "none", *ties) == 1
    assert "--base is for --method sum" in capsys.readouterr().err


def test_the_folder_of_a_model_of_diffusers(tmp_path: Path) -> None:
    """Its weights have a name of their own, with an index of their own."""
    found = read_peft(DATA / "conv")
    assert found is not None
    shapes = {f"{name}.weight": (len(own["b"]), *own["a"].shape[1:]) for name, (own, _) in found.outlines.items()}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for folder, shards in (
        ("one", ["diffusion_pytorch_model.safetensors"]),
        ("two", ["a.safetensors", "b.safetensors"]),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        for i, shard in enumerate(shards):
            save_file({name: weights[name] for name in sorted(weights)[i :: len(shards)]}, tmp_path / folder / shard)
    index = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(sorted(weights))}
    index_file = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "two" / index_file).write_text(json.dumps({"weight_map": index}))
    assert run("convert", DATA / "conv", tmp_path / "cats.safetensors", "--to", "kohya") == 0
    for folder in ("one", "two"):
        assert run("verify", tmp_path / "cats.safetensors", "--base", tmp_path / folder) == 0
        assert run("merge", tmp_path / folder, tmp_path / "cats.safetensors", tmp_path / f"merged {folder}") == 0
        written = {
            name: array
            for file in sorted((tmp_path / f"merged {folder}").glob("*.safetensors"))
            for name, array in load_file(file).items()
        }
        assert sorted(written) == sorted(weights)
        assert all(array.any() for array in written.values())
    assert (tmp_path / "merged two" / index_file).exists()


# Dtypes that few files have -------------------------------------------------------------------------------------------


def _in_dtypes(folder: Path, a: Any, b: Any) -> Path:
    """The adapters of `llama` with factors of these dtypes."""
    folder.mkdir()
    tensors = load_file(DATA / "llama" / "adapter_model.safetensors")
    save_file(
        {name: x.astype(a if "lora_A" in name else b) for name, x in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_bytes((DATA / "llama" / "adapter_config.json").read_bytes())
    return folder


@pytest.mark.parametrize("to", ["gguf", "mlx", "kohya", "diffusers"])
@pytest.mark.parametrize(("a", "b"), [("float16", "float32"), ("bfloat16", "float16"), ("float64", "float64")])
def test_dtypes_there_and_back(a: str, b: str, to: str, base: Path, tmp_path: Path) -> None:
    source, name = _in_dtypes(tmp_path / "in", jnp.dtype(a), jnp.dtype(b)), OUTPUTS[to][0]
    assert run("convert", source, tmp_path / name, "--to", to, "--base", base) == 0
    assert run("convert", tmp_path / name, tmp_path / "back", "--base", base) == 0
    back = deltas(tmp_path / "back")
    for module, delta in deltas(source).items():
        np.testing.assert_allclose(back[module], delta, rtol=1e-6, atol=1e-6 * np.abs(delta).max())
