"""Adapters by torch's modules: to them and back, in a model and without one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.interop.module_adapters import (
    ModuleAdapters,
    by_module,
    for_parameters,
    module_adapters,
    of_all_experts,
    of_each_expert,
)
from lora_jax.key_maps import KeyMap, conv, embedding, experts, linear

CALL, SOURCE = "save(path, adapters, key_map)", Path("file")
MAP = KeyMap(
    linear("q/kernel", "m.q", "in out out"),
    experts("up", "m.experts.up"),
    embedding("table/embedding", "m.table"),
    conv("conv/kernel", "m.conv"),
)
SHAPES = {"q/kernel": (4, 2, 3), "up": (3, 4, 5), "table/embedding": (7, 4), "conv/kernel": (3, 3, 4, 6)}
AXES = {
    "q/kernel": lora.KernelAxes((), (0,), (1, 2)),
    "up": lora.KernelAxes((0,), (1,), (2,)),
    "table/embedding": lora.KernelAxes((), (0,), (1,)),
    "conv/kernel": lora.KernelAxes((), (0, 1, 2), (3,)),
}
PARAMS = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}


def _adapter(path: str, rank: int = 2) -> lora.LoraAdapter:
    axes, shape = AXES[path], SHAPES[path]
    stack, inputs, outputs = ([shape[i] for i in group] for group in (axes.stack, axes.inputs, axes.outputs))
    keys = jax.random.split(jax.random.key(len(path)))
    a, b = jax.random.normal(keys[0], (*stack, *inputs, rank)), jax.random.normal(keys[1], (*stack, rank, *outputs))
    return lora.LoraAdapter(a, b, axes, 0.5)


ADAPTERS = {path: _adapter(path) for path in SHAPES}


def _found() -> ModuleAdapters:
    return module_adapters(CALL, ADAPTERS, MAP)


def test_arrays_have_torchs_layout() -> None:
    found = _found()
    a, b = (np.asarray(x) for x in (ADAPTERS["q/kernel"].a, ADAPTERS["q/kernel"].b))
    np.testing.assert_array_equal(found.modules["m.q"].arrays["a"], a.T)
    np.testing.assert_array_equal(found.modules["m.q"].arrays["b"], b.reshape(2, 6).T)
    assert {name: module.scale for name, module in found.modules.items()} == dict.fromkeys(found.modules, 0.5)
    assert dict(found.kinds) == {"m.q": "linear", "m.experts.up": "experts", "m.table": "embedding", "m.conv": "conv"}


def test_outlines_have_the_shapes_and_take_no_memory() -> None:
    found = _found()
    for name, module in found.modules.items():
        for field, array in module.arrays.items():
            outline = found.outlines[name].arrays[field]
            assert (outline.shape, outline.dtype) == (array.shape, array.dtype)
            assert set(outline.strides) == {0}


def test_factors_of_each_expert() -> None:
    found = _found()
    arrays = found.modules["m.experts.up"].arrays
    each = of_each_expert(arrays, found.experts["m.experts.up"])
    np.testing.assert_array_equal(each["a"], np.swapaxes(ADAPTERS["up"].a, 1, 2))
    np.testing.assert_array_equal(each["b"], np.swapaxes(ADAPTERS["up"].b, 1, 2))
    for field, array in of_all_experts(each).items():
        np.testing.assert_array_equal(array, arrays[field])


def test_back_to_the_parameters() -> None:
    back = for_parameters(_found(), PARAMS, MAP, SOURCE)
    assert sorted(back) == sorted(ADAPTERS)
    for path, adapter in ADAPTERS.items():
        np.testing.assert_array_equal(back[path].a, adapter.a)
        np.testing.assert_array_equal(back[path].b, adapter.b)
        assert back[path].scale == adapter.scale


def test_without_a_model_and_back() -> None:
    found = _found()
    again = module_adapters(CALL, *by_module(found))
    assert (again.kinds, again.experts) == (found.kinds, found.experts)
    for name, module in found.modules.items():
        assert again.modules[name].scale == module.scale
        for field, array in module.arrays.items():
            np.testing.assert_array_equal(again.modules[name].arrays[field], array)


def test_a_kind_without_a_place_becomes_the_lora_that_it_is_or_is_refused() -> None:
    lora_of_q = ADAPTERS["q/kernel"]
    dora = lora.DoraAdapter(lora_of_q.a, lora_of_q.b, jnp.ones((2, 3)), AXES["q/kernel"], 1.0)
    assert module_adapters(CALL, {"q/kernel": dora}, MAP, formats=("LORA", "DORA")).format.name == "DORA"
    with pytest.raises(lora.LoraError, match="DoraAdapter"):
        module_adapters(CALL, {"q/kernel": dora}, MAP)


@pytest.mark.parametrize(
    ("adapters", "key_map", "says"),
    [
        ({}, MAP, "there are no adapters"),
        (ADAPTERS, ADAPTERS, "key_map"),
        ({"other/kernel": ADAPTERS["q/kernel"]}, MAP, "no entry for 'other/kernel'"),
    ],
)
def test_mistakes(adapters: dict[str, lora.LoraAdapter], key_map: KeyMap, says: str) -> None:
    with pytest.raises(lora.LoraError, match=says):
        module_adapters(CALL, adapters, key_map)


def test_a_module_that_no_parameter_is() -> None:
    params = {path: shape for path, shape in PARAMS.items() if path != "up"}
    with pytest.raises(lora.LoraError, match=r"experts\.up"):
        for_parameters(_found(), params, MAP, SOURCE)


@pytest.mark.parametrize("order", [("q", "k", "v"), ("k", "q", "v"), ("v", "k", "q"), ("v", "q")])
def test_parts_of_a_module_in_any_order(order: tuple[str, ...]) -> None:
    """Each part's rows of A and columns of B belong together, in whatever order the adapters are given."""
    key_map = KeyMap(*(linear(f"{name}/kernel", "m.qkv", part=i) for i, name in enumerate("qkv")))
    params = {f"{name}/kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32) for name in "qkv"}
    axes, rng = lora.KernelAxes((), (0,), (1,)), np.random.default_rng(0)
    adapters = {}
    for name in order:
        rank = 1 + "qkv".index(name)
        a, b = rng.normal(size=(4, rank)), rng.normal(size=(rank, 3))
        adapters[f"{name}/kernel"] = lora.LoraAdapter(jnp.asarray(a), jnp.asarray(b), axes, 0.5 * rank)
    (arrays, scale) = module_adapters(CALL, adapters, key_map, params=params).modules["m.qkv"]
    found = np.split(scale * arrays["b"] @ arrays["a"], 3)
    for name, change in zip("qkv", found, strict=True):
        own = adapters.get(f"{name}/kernel")
        expected = np.zeros((3, 4)) if own is None else own.scale * np.asarray(own.a @ own.b).T
        np.testing.assert_allclose(change, expected, atol=1e-5)
