import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.checkpoints.fingerprint import SAMPLES, checksums, differences, fingerprint

KEY = jax.random.key(0)
TREE = {
    "kernel": jax.random.normal(KEY, (16, 24, 40)),
    "bf16": jax.random.normal(KEY, (104,)).astype(jnp.bfloat16),
    "fp8": jax.random.normal(KEY, (8, 16)).astype(jnp.float8_e4m3fn),
    "fp4": jnp.array([0.5, -1, 6]).astype(jnp.float4_e2m1fn),
    "int4": jnp.arange(-8, 8).astype(jnp.int4),
    "ids": jnp.arange(12).reshape(3, 4),
    "mask": jnp.array([True, False]),
    "complex": jnp.array([1 + 2j, 3j]),
    "odd": jnp.array([-0.0, np.nan, np.inf]),
    "scalar": jnp.float32(2.5),
    "keys": jax.random.split(KEY, 4),
    "empty": jnp.zeros((0, 3)),
}
SPREAD = {
    "kernel": jax.P("a", None, "b"),
    "bf16": jax.P(("a", "b")),
    "fp8": jax.P("b", "a"),
    "int4": jax.P("b"),
    "keys": jax.P("a"),
}


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_the_same_on_any_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    moved = {k: jax.device_put(v, jax.NamedSharding(mesh, SPREAD.get(k, jax.P()))) for k, v in TREE.items()}
    assert fingerprint(moved) == fingerprint(TREE)
    assert checksums(moved) == checksums(TREE)


def test_the_same_for_numpy():
    on_host = {name: np.asarray(leaf) for name, leaf in TREE.items() if name != "keys"}
    expected = fingerprint(TREE)
    assert fingerprint(on_host) == {name: expected[name] for name in on_host}


def test_what_is_told_of_leaves_without_content():
    tree = {"shape": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "flag": True, "name": "gelu", "fn": jnp.tanh}
    assert fingerprint(tree) == {
        "flag": "bool(True)",
        "fn": type(jnp.tanh).__name__,
        "name": "str('gelu')",
        "shape": "bfloat16[3, 4]",
    }
    abstract = jax.eval_shape(lambda: TREE)
    assert differences(fingerprint(TREE), fingerprint(abstract)) == [], "nothing is known to differ"


@pytest.mark.parametrize("name", sorted(set(TREE) - {"empty", "keys", "mask"}))
def test_other_contents_are_seen(name):
    other = TREE | {name: (TREE[name][..., ::-1] if TREE[name].ndim else 2 * TREE[name])}
    [line] = differences(fingerprint(TREE), fingerprint(other))
    assert line == f"{name}: {TREE[name].dtype}{list(TREE[name].shape)} with other contents"
    assert differences(checksums(TREE), checksums(other)) == [line]


def test_few_entries_are_read():
    """The samples of a large array are few; a sampled entry that changed is seen."""
    large = np.zeros((SAMPLES, 4 * SAMPLES), np.float32)
    seen = fingerprint({"w": large})
    large[1:, 1:] = 7
    large[::16, ::64] = 0
    assert fingerprint({"w": large}) == seen
    large[16, 64] = 1
    assert fingerprint({"w": large}) != seen


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e5m2, jnp.int16, jnp.complex64])
def test_no_flipped_bit_escapes_a_checksum(dtype):
    array = np.array(jnp.arange(6).astype(dtype).reshape(2, 3))
    before, raw = checksums({"w": jnp.asarray(array)}), array.reshape(-1).view(np.uint8)
    for byte in range(raw.size):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert checksums({"w": jnp.array(array)}) != before
            raw[byte] ^= 1 << bit


def test_swapped_entries_change_a_checksum():
    assert checksums({"w": jnp.array([1.0, 2.0])}) != checksums({"w": jnp.array([2.0, 1.0])})
