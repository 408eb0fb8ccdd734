"""The `.lora.h5` files of keras-hub by their layout; tests/interop_models has Keras itself."""

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_untrusted import assert_harmless

import lora_jax as lora
from lora_jax.interop.keras_lora import load_keras_lora, save_keras_lora

h5py = pytest.importorskip("h5py", reason="needs h5py: pip install 'lora_jax[keras]'")

D, H, S, R = 6, 2, 4, 3
LAYERS = ["norm", "block_0/attention/query", "block_0/attention/output", "block_0/dense", "block_1/attention/query"]
SHAPES = {
    "block_0/attention/query": (D, H, S),
    "block_0/attention/output": (H, S, D),
    "block_0/dense": (D, D),
    "block_1/attention/query": (H, D, S),  # as Gemma has it
}
PARAMS = {f"m/{layer}/kernel": jnp.ones(shape) for layer, shape in SHAPES.items()}


def model(p, x):
    y = jnp.einsum("bd,dhs->bhs", x, p["m/block_0/attention/query/kernel"])
    x = x + jnp.einsum("bhs,hsd->bd", y, p["m/block_0/attention/output/kernel"]) @ p["m/block_0/dense/kernel"]
    return jnp.einsum("bd,hds->bhs", x, p["m/block_1/attention/query/kernel"])


PLAN = lora.plan(model, PARAMS, jnp.ones((1, D)), rules={".*": lora.Lora(rank=R)})


def factors():
    rng = np.random.default_rng(0)
    return {
        layer: tuple(rng.normal(size=s).astype(np.float32) for s in ((*shape[:-1], R), (R, shape[-1])))
        for layer, shape in SHAPES.items()
    }


def write(path, own=None, rank=R):
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = rank
        for layer, (a, b) in (factors() if own is None else own).items():
            file[f"lora/{LAYERS.index(layer)}/vars/lora_kernel_a"] = a
            file[f"lora/{LAYERS.index(layer)}/vars/lora_kernel_b"] = b
    return path


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_changes_are_those_of_keras(alpha, tmp_path):
    adapters = load_keras_lora(write(tmp_path / "x.lora.h5"), PLAN, LAYERS, alpha=alpha)
    merged = lora.merge(PARAMS, adapters)
    for layer, (a, b) in factors().items():
        change = (1.0 if alpha is None else alpha / R) * a @ b
        np.testing.assert_allclose(merged[f"m/{layer}/kernel"] - 1, change, rtol=1e-5, atol=1e-5)
    assert adapters["m/block_0/attention/query/kernel"].a.shape == (D, H * R)
    assert adapters["m/block_0/attention/output/kernel"].a.shape == (H, S, R)


def test_to_a_file_and_back(tmp_path):
    adapters = load_keras_lora(write(tmp_path / "x.lora.h5"), PLAN, LAYERS)
    save_keras_lora(tmp_path / "y.lora.h5", adapters, LAYERS)
    with h5py.File(tmp_path / "y.lora.h5") as file:
        assert int(file["lora/vars/rank"][()]) == R
        for layer, pair in factors().items():
            for x, own in zip("ab", pair, strict=True):
                np.testing.assert_array_equal(file[f"lora/{LAYERS.index(layer)}/vars/lora_kernel_{x}"], own)
    jax.tree.map(np.testing.assert_array_equal, load_keras_lora(tmp_path / "y.lora.h5", PLAN, LAYERS), adapters)
    # Of several ranks and scales: one rank, and scales in B.
    axes = lora.KernelAxes((), (0,), (1,))
    one = lora.LoraAdapter(jnp.ones((D, 1)), jnp.ones((1, D)), axes, 0.5)
    both = adapters | {"m/block_0/dense/kernel": one}
    save_keras_lora(tmp_path / "z.lora.h5", both, LAYERS, alpha=6.0)
    again = load_keras_lora(tmp_path / "z.lora.h5", PLAN, LAYERS, alpha=6.0)
    assert again["m/block_0/dense/kernel"].a.shape == (D, R)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        lora.merge(PARAMS, again),
        lora.merge(PARAMS, both),
    )


def test_bytes_in_the_other_order(tmp_path):
    """HDF5 has numbers of either order, and JAX those of the machine."""
    path = write(tmp_path / "x.lora.h5")
    expected = load_keras_lora(path, PLAN, LAYERS)
    with h5py.File(path, "a") as file:
        for layer in [name for name in file["lora"] if name != "vars"]:
            for name, dataset in list(file[f"lora/{layer}/vars"].items()):
                numbers = dataset[()]
                del file[f"lora/{layer}/vars/{name}"]
                file[f"lora/{layer}/vars/{name}"] = numbers.astype(numbers.dtype.newbyteorder())
    jax.tree.map(np.testing.assert_array_equal, load_keras_lora(path, PLAN, LAYERS), expected)


def test_what_keras_has_no_place_for(tmp_path):
    adapters = load_keras_lora(write(tmp_path / "x.lora.h5"), PLAN, LAYERS)
    query, dense = "m/block_0/attention/query/kernel", "m/block_0/dense/kernel"
    trained = jax.tree.map(lambda leaf: leaf + 0.1, adapters[query])
    for own, layers, says in [
        ({query: trained}, LAYERS, "has 2 outputs beside its last axis"),
        ({"other/kernel": adapters[dense]}, LAYERS, "'other/kernel' is the kernel of 0 of the layers"),
        ({dense: adapters[dense]}, [*LAYERS, "dense", "block_0/dense"], "of 3 of the layers"),
        ({}, LAYERS, "there are no adapters"),
    ]:
        with pytest.raises(lora.LoraError, match=says):
            save_keras_lora(tmp_path / "none.lora.h5", own, layers)
    with pytest.raises(lora.LoraError, match=r"has to end in \.lora\.h5"):
        save_keras_lora(tmp_path / "none.h5", adapters, LAYERS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.lora.h5"]


def test_damaged_files(tmp_path):
    path, dense = tmp_path / "x.lora.h5", "block_0/dense"

    def says(text, **arguments):
        with pytest.raises(lora.LoraError, match=text):
            load_keras_lora(path, PLAN, arguments.pop("layers", LAYERS), **arguments)

    says("No such file")
    path.write_bytes(b"no file of HDF5")
    says("cannot be read")
    write(path, rank=2)
    says(r"lora_kernel_a is float32 \(6, 2, 3\), expected \[6, 2, 2\]")
    write(path, rank=0)
    says("has rank 0")
    write(path)
    says("alpha is -1", alpha=-1)
    says("and the backbone 2 layers", layers=LAYERS[:2])
    says("'other/kernel', which the plan does not have", layers=["norm", "other", *LAYERS[2:]])
    write(path, {dense: factors()[dense]})
    says(r"has no factors of 'm/block_0/attention/.*, and of 2 more of the plan")
    with h5py.File(path, "a") as file:
        file["lora/1/vars/lora_kernel_a"] = h5py.ExternalLink("other.h5", "/x")
    says("has no lora/1/vars/lora_kernel_a, or one that leads elsewhere")
    with h5py.File(path, "a") as file:
        del file["lora/1"]
        file["lora/x/vars/lora_kernel_a"] = 1.0
    says("has adapters of layer 'x'")
    write(path, {dense: tuple(x.astype(np.int32) for x in factors()[dense])})
    says("lora_kernel_a is int32")


def test_a_name_that_is_no_text(tmp_path):
    """h5py has it as bytes. Found by changed files."""
    write(tmp_path / "x.lora.h5")
    with h5py.File(tmp_path / "x.lora.h5", "a") as file:
        file["lora"].create_group(b"\xff")
    with pytest.raises(lora.LoraError, match="adapters of layer"):
        load_keras_lora(tmp_path / "x.lora.h5", PLAN, LAYERS)


def test_mutations(tmp_path):
    """Bytes changed, cut and filled in: adapters or the library's own error."""
    data, random, ends = write(tmp_path / "x.lora.h5").read_bytes(), Random(0), [0, 0]
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(random.choice([1, 1, 2, 20])):
            changed[random.randrange(len(changed))] = random.choice([0, 1, 255, random.randrange(256)])
        size = len(data) if random.random() < 0.8 else random.randrange(len(data))
        (tmp_path / "x.lora.h5").write_bytes(changed[:size])
        try:
            load_keras_lora(tmp_path / "x.lora.h5", PLAN, LAYERS)
            ends[0] += 1
        except lora.LoraError as error:
            assert_harmless(str(error))
            ends[1] += 1
    assert min(ends) > 15
