"""`lora.compose(compat="peft")` beside the real `add_weighted_adapter`, of every combination type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")

import lora_jax as lora  # noqa: E402
from lora_jax.algebra import peft_results  # noqa: E402
from lora_jax.algebra.sparsify import keyed  # noqa: E402
from lora_jax.core.paths import path_key  # noqa: E402
from lora_jax.interop.peft.load import load_by_module  # noqa: E402

SIZES = {"lin0": (6, 10), "lin1": (10, 4)}
WEIGHTS = {"one": 0.7, "two": -0.3, "three": 1.1}
DENSITY = 0.4
KEY = jax.random.key(11)


def model(names, **more):
    """A small model with several adapters of random factors, and the scales 8 / 4."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in SIZES.items()})
    layers.forward = lambda x: layers["lin1"](torch.tanh(layers["lin0"](x)))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*SIZES], **more)
    wrapped = peft.get_peft_model(layers, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return wrapped


def change(wrapped, name):
    """`{module: [in, out]}`."""
    layers = wrapped.base_model.model
    return {module: layers[module].get_delta_weight(name).detach().numpy().T for module in SIZES}


def ours(wrapped, names, tmp_path):
    wrapped.save_pretrained(tmp_path, selected_adapters=[*names])
    return [(load_by_module(tmp_path / name)[0], WEIGHTS[name]) for name in names]


def dense(adapter):
    return float(adapter.scale) * np.asarray(adapter.a, np.float64) @ np.asarray(adapter.b, np.float64)


def masks(method, count):
    """The masks that are drawn here, in torch's axes, in the order in which PEFT asks for them."""
    for module, (inputs, outputs) in SIZES.items():
        key = jax.random.fold_in(path_key(KEY, module), 0)
        shapes = {1: (inputs, 4), 2: (4, outputs)} if "svd" not in method else {0: (inputs, outputs)}
        for what, shape in shapes.items():
            for i in range(count):
                yield np.asarray(jax.random.bernoulli(keyed(key, i, what), DENSITY, shape)).T


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", peft_results.METHODS)
def test_every_combination_type(method, majority, tmp_path, monkeypatch):
    """The changes that PEFT's new adapter makes; where it draws masks, it is given those that are drawn here."""
    elects = "ties" in method
    if majority == "frequency" and not elects:
        pytest.skip("no signs are elected")
    names = [*WEIGHTS]
    wrapped = model(names)
    parts = ours(wrapped, names, tmp_path)
    drawn = masks(method, len(names))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: torch.tensor(next(drawn)).to(probabilities.dtype))
    sparse = {"density": DENSITY} if elects or "dare" in method or "magnitude" in method else {}
    wrapped.add_weighted_adapter(
        names, [*WEIGHTS.values()], "sum", combination_type=method, majority_sign_method=majority, **sparse
    )
    found = lora.compose(parts, method, compat="peft", majority=majority, key=KEY, **sparse)
    for module, expected in change(wrapped, "sum").items():
        np.testing.assert_allclose(dense(found[module]), expected, rtol=1e-4, atol=1e-4)
        if "svd" not in method:
            layer = wrapped.base_model.model[module]
            np.testing.assert_allclose(found[module].a, layer.lora_A["sum"].weight.detach().numpy().T, atol=1e-5)
    if "dare" in method:
        assert next(drawn, None) is None


def test_one_adapter_and_other_ranks(tmp_path):
    """One adapter is scaled, whatever the method; and a rank may be asked for."""
    wrapped = model(["one", "two"])
    parts = ours(wrapped, ["one", "two"], tmp_path)
    wrapped.add_weighted_adapter(["one"], [-0.7], "alone", combination_type="ties_svd", density=DENSITY)
    found = lora.compose([(parts[0][0], -0.7)], "ties_svd", compat="peft", density=DENSITY)
    wrapped.add_weighted_adapter(["one", "two"], [0.7, -0.3], "small", combination_type="svd", svd_rank=2)
    small = lora.compose(parts, "svd", compat="peft", rank=2)
    for module in SIZES:
        np.testing.assert_allclose(dense(found[module]), change(wrapped, "alone")[module], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dense(small[module]), change(wrapped, "small")[module], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("option", "exact"), [("plain", True), ("rslora", False), ("dora", False)])
def test_where_peft_is_not_exact(option, exact, tmp_path):
    """`cat` is the sum of changes, but of rsLoRA it is too large by the root of the rank. Of DoRA the lengths are left
    out: one adapter alone, with the weight 1, is another one."""
    more = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(option, {})
    wrapped = model(["one", "two"], **more)
    parts = ours(wrapped, ["one", "two"], tmp_path)
    if option == "dora":
        w = {module: np.asarray(wrapped.base_model.model[module].base_layer.weight.detach()).T for module in SIZES}
        params = {module: jnp.asarray(array) for module, array in w.items()}
        sums = lora.combine([(parts[0][0], 1.0)], params=params)
        wanted = lora.merge(params, parts[0][0])
        for module in SIZES:
            np.testing.assert_allclose(lora.merge(params, sums)[module], wanted[module], atol=1e-5)
        wrapped.add_weighted_adapter(["one"], [1.0], "sum", combination_type="linear")
        wrapped.set_adapter("sum")
        merged = wrapped.merge_and_unload()
        kept = {module: np.asarray(merged[module].weight.detach()).T for module in SIZES}
        assert all(np.abs(kept[module] - np.asarray(wanted[module])).max() > 0.05 for module in SIZES)
        with pytest.raises(lora.LoraError, match="is a DoraAdapter, whose change has no entries"):
            lora.compose(parts, "linear", compat="peft")
        return
    wrapped.add_weighted_adapter(["one", "two"], [0.7, -0.3], "sum", combination_type="cat")
    sums, theirs = lora.combine(parts), change(wrapped, "sum")
    by_name = lora.compose(parts, "cat", compat="peft")
    for module in SIZES:
        factor = 1.0 if exact else np.sqrt(8)
        np.testing.assert_allclose(factor * dense(sums[module]), theirs[module], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dense(by_name[module]), dense(sums[module]), rtol=1e-4, atol=1e-4)


def test_a_sum_is_read_by_peft(tmp_path):
    """The folder of an exact sum, compressed to the rank of its parts together, gives PEFT the sum of changes."""
    wrapped = model(["one", "two"])
    parts = ours(wrapped, ["one", "two"], tmp_path)
    key_map = load_by_module(tmp_path / "one")[2]
    small = lora.compress(lora.combine(parts), energy=1.0)
    lora.save_peft(tmp_path / "sum", small, key_map)
    wrapped.load_adapter(tmp_path / "sum", "sum")
    for module, found in change(wrapped, "sum").items():
        expected = sum(weight * change(wrapped, name)[module] for name, weight in list(WEIGHTS.items())[:2])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert {adapter.a.shape[-1] for adapter in small.values()} <= {4, 6, 8}
