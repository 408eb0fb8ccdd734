"""Folders of PEFT by their modules: the same files as `save_peft` writes, one module at a time."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_module_adapters import ADAPTERS, AXES, CALL, MAP

import lora_jax as lora
from lora_jax.interop.module_adapters import Lazy, mapped, module_adapters
from lora_jax.interop.peft.formats.format import Module
from lora_jax.interop.peft_modules import read_peft, write_peft
from lora_jax.interop.safetensors_writer import write_safetensors

FILES = ("adapter_config.json", "adapter_model.safetensors")
OF_MODULES = {path: adapter for path, adapter in ADAPTERS.items() if path != "up"}  # experts need a model to be read


def _dora(path: str) -> lora.DoraAdapter:
    adapter = ADAPTERS[path]
    return lora.DoraAdapter(adapter.a, adapter.b, jnp.ones((2, 3)), AXES[path], 1.0)


@pytest.mark.parametrize("adapters", [OF_MODULES, {"q/kernel": _dora("q/kernel")}], ids=["lora", "dora"])
def test_read_and_written_again_the_files_are_the_same(adapters: dict[str, Any], tmp_path: Path) -> None:
    lora.save_peft(tmp_path / "first", adapters, MAP)
    found = read_peft(tmp_path / "first")
    assert found is not None
    write_peft(tmp_path / "second", found)
    for file in FILES:
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_experts_are_written_as_save_peft_writes_them(tmp_path: Path) -> None:
    lora.save_peft(tmp_path / "first", ADAPTERS, MAP)
    write_peft(tmp_path / "second", module_adapters(CALL, ADAPTERS, MAP))
    for file in FILES:
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


@pytest.mark.parametrize("beside", ["experts", "whole"])
def test_what_is_not_of_modules_alone_is_left_to_load_peft(beside: str, tmp_path: Path) -> None:
    if beside == "experts":
        lora.save_peft(tmp_path / "folder", ADAPTERS, MAP)
    else:
        key_map = MAP + lora.key_maps.KeyMap(lora.key_maps.array("head/bias", "head.bias"))
        lora.save_peft(tmp_path / "folder", OF_MODULES, key_map, others={"head/bias": np.ones(3, np.float32)})
    assert read_peft(tmp_path / "folder") is None


def test_a_folder_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    lora.save_peft(tmp_path / "folder", OF_MODULES, MAP)
    found = read_peft(tmp_path / "folder")
    lora.save_peft(tmp_path / "folder", {"q/kernel": ADAPTERS["q/kernel"]}, MAP)
    assert found is not None
    with pytest.raises(lora.LoraError, match="was replaced while it was read"):
        found.modules["m.q"]


def test_each_module_is_asked_for_once(tmp_path: Path) -> None:
    found = module_adapters(CALL, ADAPTERS, MAP)
    asked = Counter[str]()

    def make(name: str) -> Module:
        asked[name] += 1
        return found.modules[name]

    write_peft(tmp_path / "folder", found._replace(modules=Lazy([*found.modules], make)))
    assert asked == Counter(dict.fromkeys(found.modules, 1))


def test_modules_changed_as_they_are_asked_for() -> None:
    found = module_adapters(CALL, OF_MODULES, MAP)
    doubled = mapped(found, lambda module: found.format.rescaled(module, module.scale / 2))
    for name, module in doubled.modules.items():
        np.testing.assert_array_equal(module.arrays["b"], 2 * found.modules[name].arrays["b"])
        assert (module.scale, doubled.outlines[name].scale) == (0.25, 0.25)
        assert set(doubled.outlines[name].arrays["b"].strides) == {0}


# The writer of safetensors --------------------------------------------------------------------------------------------

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "brain": np.ones((3, 5), jnp.bfloat16),
    "byte": np.array([1, 2, 3], np.uint8),
    "scalar": np.asarray(2.5, np.float16),
    "empty": np.zeros((0, 4), np.float32),
}


def _forms(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_safetensors_itself_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, _forms(TENSORS), TENSORS.__getitem__, {"format": "pt"})
    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(tensor, TENSORS[name])
        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    theirs = tmp_path / "theirs.safetensors"
    save_file({name: np.ascontiguousarray(t).reshape(t.shape) for name, t in TENSORS.items()}, theirs, {"format": "pt"})
    assert path.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("array", "says"),
    [(np.zeros((3, 2), np.float32), r"float32 \[3, 2\], expected float32 \[2, 3\]"), (np.zeros((2, 3)), "float64")],
)
def test_a_tensor_that_is_not_what_was_announced(array: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(lora.LoraError, match=says):
        write_safetensors(tmp_path / "file", _forms({"x": TENSORS["matrix"]}), lambda name: array, {})


def test_a_dtype_that_the_format_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(lora.LoraError, match="complex64"):
        write_safetensors(tmp_path / "file", {"x": ((2,), np.complex64)}, lambda name: np.zeros(2, np.complex64), {})
