"""`lora-jax convert` between all formats: what comes back is what went out."""

import json
from pathlib import Path
from typing import Any

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
    (["conv", "out", "--to", "mlx"], "MLX has no LoRA of convolutions"),
    (["conv_dora", "out", "--to", "vllm"], "is a DoraAdapter"),
    (["lora", "out", "--to", "diffusers"], "no place for others ('head.bias')"),
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
