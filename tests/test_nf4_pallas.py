"""Kernels that unpack NF4 tile by tile, interpreted: W by hand is the oracle. And which programs have them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding

from lora_jax.bases import nf4, nf4_kernels, nf4_pallas

INTERPRETED = ("interpreted tpu", "interpreted gpu")
HIGHEST = jax.lax.Precision.HIGHEST


def matrix(d, k, seed=0):
    """Random codes and scales, and W by hand."""
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(0, 16, (d, k), np.uint8), rng.random((d // 64, k), np.float32)
    w = nf4.CODE[codes] * np.repeat(scales, 64, axis=0)
    return jnp.asarray(codes).astype(jnp.uint4), jnp.asarray(scales), w


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain(x, codes, scales, *, dtypes=(jnp.float32,), transposed=False):
    """The product by dequantizing."""
    w = jnp.asarray(nf4.CODE)[codes.astype(jnp.int32)] * jnp.repeat(scales, 64, axis=0)
    w = functools.reduce(lambda w, dtype: w.astype(dtype), dtypes, w)
    return jnp.matmul(x, w.T if transposed else w, precision=None if x.dtype == jnp.bfloat16 else HIGHEST)


def product(x, codes, scales, *, dtypes=(jnp.float32,), precision=HIGHEST, kernel=True, transposed=False):
    by_hand = functools.partial(plain, dtypes=dtypes, transposed=transposed)
    how = {"dtypes": dtypes, "precision": precision, "kernel": kernel, "transposed": transposed}
    return nf4_pallas.product(x, codes, scales, by_hand, **how)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)


# The kernels ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 64, 64), (5, 128, 512), (70, 256, 192), (300, 1024, 256), (17, 576, 128), (9, 1280, 128), (3, 1152, 64)]


@pytest.mark.parametrize("platform", INTERPRETED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.sampled(5)
def test_both_products(platform, shape):
    """Several tiles along every axis, rows that fill none, axes that are one tile, scales of less than 8 rows."""
    rows, d, k = shape
    codes, scales, w = matrix(d, k)
    for transposed, x, dense in ((False, normal(rows, d), w), (True, normal(rows, k), w.T)):
        how = {"dtypes": (jnp.float32,), "precision": HIGHEST, "transposed": transposed, "platform": platform}
        found = jax.jit(functools.partial(nf4_kernels.run, **how))(x, codes, scales)
        np.testing.assert_allclose(found, x @ dense, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("platform", [*INTERPRETED, "interpreted tpu v4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_narrow_products(platform, transposed):
    """Values are rounded to each of W's dtypes, sums are not."""
    codes, scales, w = matrix(128, 128)
    x = jnp.asarray(normal(8, 128)).astype(jnp.bfloat16)
    how = {"dtypes": (jnp.float32, jnp.bfloat16), "precision": None, "transposed": transposed, "platform": platform}
    found = nf4_kernels.run(x, codes, scales, **how)
    assert found.dtype == jnp.bfloat16
    narrow = np.asarray(jnp.asarray(w.T if transposed else w).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(found, jnp.asarray(np.asarray(x, np.float32) @ narrow).astype(jnp.bfloat16))


def test_the_largest_tiles_have_few_rows_too_many():
    """As few tiles as can be, of one size; what is computed for nothing is less than 16 rows of each."""
    for rows, tiles, height in ((1, 1, 16), (300, 1, 304), (1024, 1, 1024), (1025, 2, 528), (5000, 5, 1008)):
        found, *_ = nf4_kernels.tile(rows, 4096, 14336, "tpu")
        assert (-(-rows // found), found) == (tiles, height)


def test_values_are_rounded_as_the_program_rounds_them():
    """W of one dtype, cast to others on its way: each rounds. So identity matrices return W's own values."""
    codes, scales, w = matrix(64, 64)
    for dtypes, transposed in (((jnp.bfloat16, jnp.float32), False), ((jnp.float16, jnp.bfloat16, jnp.float32), True)):
        rounded = functools.reduce(lambda w, dtype: w.astype(dtype), dtypes, jnp.asarray(w))
        found = product(jnp.eye(64), codes, scales, dtypes=dtypes, transposed=transposed)
        np.testing.assert_array_equal(found, rounded.T if transposed else rounded)


# The product as an operation of JAX -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision", nf4_pallas.PRECISIONS)
@pytest.mark.sampled(5)
def test_derivatives(transposed, precision):
    """Of both modes, and of one after the other; the residual is the packed matrix."""
    codes, scales, w = matrix(128, 64)
    dense = w.T if transposed else w
    x, ct = normal(5, dense.shape[0]), normal(5, dense.shape[1], seed=2)
    run = functools.partial(product, codes=codes, scales=scales, precision=precision, transposed=transposed)
    found, vjp = jax.vjp(run, x)
    close(found, x @ dense)
    close(vjp(ct)[0], ct @ dense.T)
    assert {leaf.shape for leaf in jax.tree.leaves(vjp)} == {codes.shape, scales.shape}
    close(jax.jvp(run, (x,), (2 * x,))[1], 2 * x @ dense)

    def curvature(run):
        return jax.jvp(jax.grad(lambda x: jnp.sum(jnp.tanh(run(x)) * ct)), (x,), (x,))[1]

    close(curvature(run), curvature(lambda x: jnp.matmul(x, dense, precision=HIGHEST)))


def test_what_jax_does_to_programs():
    """jit, scan and rematerialisation, with derivatives of both modes."""
    codes, scales, w = matrix(64, 64)
    packed, x = (jnp.stack([codes, codes]), jnp.stack([scales, scales])), normal(3, 64) / 8

    def scanned(x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, *w), None), x, packed)[0])

    def layer(x, codes, scales):
        return x + jnp.tanh(product(x, codes, scales))

    def by_hand(x):
        for _ in range(2):
            x = x + jnp.tanh(jnp.matmul(x, w, precision=HIGHEST))
        return jnp.sum(x)

    close(jax.jit(jax.grad(scanned))(x), jax.grad(by_hand)(x))
    close(jax.jvp(jax.jit(scanned), (x,), (x,))[1], jax.jvp(by_hand, (x,), (x,))[1])


def test_vmap():
    """Over x it makes more rows, also around and inside of a derivative; over matrices it takes the plain product."""
    codes, scales, w = matrix(64, 128)
    xs, ct = normal(3, 5, 64), normal(5, 128, seed=2)
    run = functools.partial(product, codes=codes, scales=scales)
    programs = {
        "first axis": jax.vmap(run),
        "last axis": jax.vmap(run, in_axes=2, out_axes=1),
        "derivative inside": jax.vmap(jax.grad(lambda x: jnp.sum(run(x) * ct))),
        "derivative outside": jax.grad(lambda xs: jnp.sum(jax.vmap(lambda x: run(x) * ct)(xs))),
    }
    expected = (xs @ w, np.moveaxis(xs @ w, 0, 1), np.stack([ct @ w.T] * 3), np.stack([ct @ w.T] * 3))
    given = (xs, np.moveaxis(xs, 0, 2), xs, xs)
    found = jax.jit(lambda given: [f(x) for f, x in zip(programs.values(), given, strict=True)])(given)
    for name, one, other in zip(programs, found, expected, strict=True):
        close(one, other, err_msg=name)
    text = str(jax.make_jaxpr(jax.vmap(run))(xs))
    assert "f32[15,128] = nf4_product[" in text
    matrices = jnp.stack([codes, codes[::-1]]), jnp.stack([scales, 2 * scales])
    close(jax.vmap(functools.partial(product, xs[0]))(*matrices), np.stack([xs[0] @ w, 2 * xs[0] @ w[::-1]]))


def test_scales_have_derivatives_too():
    """Which are those of the plain product."""
    codes, scales, w = matrix(128, 64)
    x, ct = normal(5, 128), normal(5, 64, seed=2)

    def derivatives(of):
        run = functools.partial(of, codes=codes)
        gradients = jax.grad(lambda x, scales: jnp.sum(run(x, scales=scales) * ct), (0, 1))(x, scales)
        return *gradients, jax.jvp(lambda x, scales: run(x, scales=scales), (x, scales), (x, scales))[1]

    found, expected = jax.jit(lambda: (derivatives(product), derivatives(plain)))()
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    close(found[2], 2 * x @ w)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("split", ["rows", "columns"])
@pytest.mark.sampled(5)
def test_inside_shard_map(checked, split):
    """On each device's shard, with gradients; types that vary are kept right."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    codes, scales, w = matrix(64, 128)
    x, ct = normal(4, 64), normal(4, 128, seed=2)
    rows, columns = (jax.P("data"), jax.P()) if split == "rows" else (jax.P(), jax.P(None, "data"))
    out = rows if split == "rows" else columns
    run = functools.partial(product, kernel=None if checked else True)
    split_up = jax.shard_map(run, mesh=mesh, in_specs=(rows, columns, columns), out_specs=out, check_vma=checked)
    run = jax.jit(lambda x: split_up(x, codes, scales))
    assert "nf4_product[" in str(jax.make_jaxpr(run)(x))
    found, vjp = jax.vjp(run, x)
    close(found, x @ w)
    close(vjp(ct)[0], ct @ w.T)
    close(jax.jvp(run, (x,), (x,))[1], x @ w)


def test_over_a_mesh_outside_of_shard_map():
    """The partitioner splits the plain product; the interpreted kernel, a loop, is for one device."""
    codes, scales, w = matrix(64, 128)
    x = normal(16, 64)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = NamedSharding(mesh, jax.P("data")), NamedSharding(mesh, jax.P())
    run = jax.jit(product)
    spread = [jax.device_put(a, where) for a, where in zip((x, codes, scales), (rows, whole, whole), strict=True)]
    assert "stablehlo.while" in run.lower(x, codes, scales).as_text()
    assert "stablehlo.while" not in run.lower(*spread).as_text()
    close(run(*spread), x @ w)
    assert run(*spread).sharding.spec == jax.P("data")
    with jax.set_mesh(mesh):
        assert product(x, codes, scales, kernel=None) is None, "known when it is traced"
    with jax.set_mesh(Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))):
        assert product(x, codes, scales) is None
    assert product(x, codes, scales, kernel=None) is None, "these are several devices"


# Which of them is used ------------------------------------------------------------------------------------------------


def test_what_they_are_not_for():
    """Other dtypes and precisions, what tiles do not cut evenly: the plain product, without a word."""
    assert nf4_kernels.tile(8, 64, 72, "gpu") is None
    assert nf4_kernels.tile(8, 1088, 64, "tpu") is None
    assert nf4_kernels.tile(8, 960, 960, "tpu") is None, "more than fits"
    assert nf4_kernels.tile(8, 4096, 11008, "tpu") == (16, 512, 256)
    codes, scales, _ = matrix(64, 64)
    x = jnp.ones((3, 64))
    assert product(x, codes, scales) is not None
    assert product(x, codes, scales, kernel=False) is None
    assert product(x, codes, scales, precision=jax.lax.Precision.HIGH) is None
    assert product(x[:0], codes, scales) is None
    assert product(x.astype(jnp.bfloat16), codes, scales) is None
    assert product(x.astype(jnp.float16), codes, scales, dtypes=(jnp.float16,)) is None
    assert product(x.astype(jnp.bfloat16), codes, scales, dtypes=(jnp.bfloat16,), precision=HIGHEST) is not None
    odd, wide, _ = matrix(64, 24)
    assert product(x, odd, wide) is None


H100, V5E = ("NVIDIA H100 80GB HBM3", "cuda"), ("TPU v5 lite", "tpu")
KINDS = {"TPU v4": "tpu", "TPU v5 lite": "tpu", "TPU v6 lite": "tpu", "TPU v5": "tpu", H100[0]: "cuda"}

# From JAX 0.12 on.
without_warning = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@contextlib.contextmanager
def on(kind, platform):
    """A mesh of one device that is not there."""
    device = AbstractDevice(kind, 1, platform)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    ):
        yield


def shapes(rows, d, k, dtype=jnp.float32, transposed=False):
    of = [((rows, k if transposed else d), dtype), ((d, k), jnp.uint4), ((d // 64, k), jnp.float32)]
    return [jax.ShapeDtypeStruct(*shape) for shape in of]


def lowered(rows, platform, **how):
    """The kernels in a product that is lowered for a platform."""
    run = jax.jit(functools.partial(product, **how)).trace(*shapes(rows, 64, 128))
    return named(run.lower(lowering_platforms=(platform,)).as_text())


def named(text):
    """The kernels in a lowered program."""
    return [name for name in ("tpu_custom_call", "triton") if name in text]


@without_warning
def test_the_machine_that_a_program_is_lowered_for_decides():
    """Not the one at hand. Where it is not known which TPU or GPU that is, Pallas lowers nothing."""
    for platform in ("cpu", "tpu", "cuda", "rocm"):
        assert lowered(16, platform) == []
    with on("TPU v3", "tpu"):
        assert lowered(16, "tpu") == [], "Mosaic does not take them for so old ones"
    for machine, own, most, name in ((V5E, "tpu", 1024, "tpu_custom_call"), (H100, "cuda", 64, "triton")):
        with on(*machine):
            for platform in ("cpu", "tpu", "cuda"):
                assert lowered(16, platform, kernel=None) == ([name] if platform == own else [])
            assert lowered(most, own, kernel=None) == [name]
            assert lowered(most + 1, own, kernel=None) == []
            assert lowered(most + 1, own, kernel=True) == [name]


@without_warning
def test_exported_programs():
    """For a TPU with its kernel; for a GPU without, since its kernels cannot be exported; for several platforms."""

    def exported(*platforms, kernel=None):
        run = jax.jit(functools.partial(product, kernel=kernel))
        return jax.export.export(run, platforms=platforms)(*shapes(16, 64, 128))

    with on(*V5E):
        assert named(exported("tpu").mlir_module()) == ["tpu_custom_call"]
        several = exported("cpu", "tpu", "cuda")
        assert named(several.mlir_module()) == ["tpu_custom_call"]
    with on(*H100):
        assert named(exported("cuda").mlir_module()) == []
        with pytest.raises(ValueError, match="no compatibility guarantees"):
            exported("cuda", kernel=True)
    codes, scales, w = matrix(64, 128)
    x = normal(16, 64)
    close(several.call(x, codes, scales), x @ w)


SIZES = [(300, 1024, 768), (2048, 4096, 11008), (40, 576, 192), (16, 11008, 256)]


@without_warning
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(5)
def test_accelerators_compilers_take_them(kind, dtype):
    """What Pallas hands to Mosaic and Triton is made without a device: both products, sizes of real models."""
    platform = KINDS[kind]
    for rows, d, k in SIZES:
        for transposed in (False, True):
            run = jax.jit(functools.partial(product, dtypes=(dtype,), precision=None, transposed=transposed))
            with on(kind, platform):
                text = run.trace(*shapes(rows, d, k, dtype, transposed)).lower(lowering_platforms=(platform,)).as_text()
            assert named(text) == ["tpu_custom_call" if platform == "tpu" else "triton"]


@without_warning
@pytest.mark.parametrize("kind", ["TPU v5 lite", H100[0]])
def test_shards_on_accelerators(kind):
    """Each device of a mesh takes a kernel for its own columns, forward and backward."""
    platform = KINDS[kind]
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(kind, 1, platform))
    columns = jax.P(None, "data")
    run = functools.partial(product, kernel=None)
    run = jax.shard_map(run, mesh=mesh, in_specs=(jax.P(), columns, columns), out_specs=columns)
    gradient = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.tanh(run(*args)))))
    text = gradient.trace(*shapes(16, 64, 512)).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call(" if platform == "tpu" else "triton(") == 2
