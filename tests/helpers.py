"""The tables that the laws run over, and the slow, obviously right ways to the same numbers."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax._compat import open_jaxpr

# Sizes are distinct, so that no activation has a weight's shape by chance.
BATCH, TIME, D, K, HEADS, HEAD, EXPERTS, LAYERS = 5, 7, 12, 10, 3, 4, 9, 2


@dataclass(frozen=True)
class Case:
    """A program: `fn(params, x)`, and the weights of it that are adapted."""

    name: str
    fn: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    x: tuple[int, ...] = (BATCH, TIME, D)
    pattern: str = "w.*"
    dtype: Any = jnp.float32

    def params(self) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(self.shapes))
        return {
            name: jax.random.normal(key, shape, self.dtype) / np.sqrt(D).astype(self.dtype)
            for key, (name, shape) in zip(keys, self.shapes.items(), strict=True)
        }

    def input(self) -> jax.Array:
        return jax.random.normal(jax.random.key(1), self.x, self.dtype)

    def plan(self, rule: Any) -> lora.Plan:
        return lora.plan(self.fn, self.params(), self.input(), rules={self.pattern: rule})

    def adapters(self, rule: Any, key: int = 2) -> dict[str, lora.Adapter]:
        return trained(lora.init(jax.random.key(key), self.params(), self.plan(rule)), key)


def trained(adapters: Any, key: int) -> Any:
    """Adapters as training leaves them: nothing zero any more."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return tree.unflatten([a + 0.3 * jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])


MODELS: list[Case] = []


def model(shapes: dict[str, tuple[int, ...]], **rest: Any) -> Callable[..., Any]:
    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        MODELS.append(Case(fn.__name__, fn, shapes, **rest))
        return fn

    return add


@model({"w1": (D, K), "b": (K,), "w2": (K, D)})
def two_layers(p, x):
    return jnp.tanh(x @ p["w1"] + p["b"][None, None]) @ p["w2"]


@model({"w": (K, D)})
def weight_on_the_left(p, x):
    return p["w"] @ x.reshape(-1, D).T


@model({"w": (K, D)})
def weight_on_the_left_of_batched(p, x):
    return jnp.einsum("kd,btd->kbt", p["w"], x)


@model({"w": (K, D)})
def transposed(p, x):
    return x @ p["w"].T


@model({"wq": (D, HEADS, HEAD), "wo": (HEADS, HEAD, K)})
def attention_kernels(p, x):
    h = jnp.einsum("btd,dhk->bthk", x, p["wq"])
    return jnp.einsum("bthk,hkd->btd", jax.nn.gelu(h), p["wo"])


@model({"wq": (D, HEADS, HEAD), "wo": (HEADS, K, HEAD)})
def axes_in_any_order(p, x):
    h = jnp.einsum("dhk,btd->khbt", p["wq"], x)
    return jnp.einsum("khbt,hdk->tdb", h, p["wo"])


@model({"w": (HEAD, D, HEADS)})
def outputs_around_inputs(p, x):
    return jnp.einsum("btd,kdh->bhtk", x, p["w"])


@model({"w": (EXPERTS, D, K)})
def experts(p, x):
    return jnp.einsum("ebd,edk->bek", _per_expert(x), p["w"])


@model({"w": (D, EXPERTS, K)})
def experts_in_the_middle(p, x):
    return jnp.einsum("dek,ebd->ekb", p["w"], _per_expert(x))


def _per_expert(x):
    return jnp.stack([x[:, 0] * (i + 1) for i in range(EXPERTS)])


@model({"w": (D, EXPERTS, K)})
def vmap_over_experts(p, x):
    return jax.vmap(lambda w, x: x @ w, in_axes=(1, None))(p["w"], x)


@model({"w": (D, K), "w2": (K, K)})
def under_jit(p, x):
    inner = jax.jit(lambda w, x: jnp.sin(x @ w))
    return inner(p["w2"], inner(p["w"], x))


@model({"w": (K, D)})
def jit_that_transposes(p, x):
    return x @ jax.jit(jnp.transpose)(p["w"])


@model({"w": (LAYERS, D, D), "b": (LAYERS, D)})
def scan_over_layers(p, x):
    def layer(x, p):
        return jnp.tanh(x @ p["w"] + p["b"][None, None]), jnp.sum(x)

    return jax.lax.scan(layer, x, p)


@model({"w": (LAYERS, D, D)})
def scan_over_remat(p, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
    return jax.lax.scan(layer, x, p["w"], unroll=2, reverse=True)[0]


@model({"w": (EXPERTS, LAYERS, D, D)})
def scan_over_layers_of_experts(p, x):
    def layer(x, w):
        return jnp.tanh(jnp.einsum("ebd,edk->ebk", x, w)), None

    return jax.lax.scan(layer, _per_expert(x), jnp.transpose(p["w"], (1, 0, 2, 3)))[0]


@model({"w": (D, D)})
def scan_with_the_weight_as_constant(p, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, length=3)[0]


@model({"w": (D, D), "w2": (D, K)})
def remat(p, x):
    policy = jax.checkpoint_policies.save_only_these_names("lora_h")
    block = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w2"], policy=policy)
    return block(p, x)


@jax.custom_vjp
def _clipped(x):
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@model({"w": (D, D), "w2": (D, K)})
def custom_jvp_between(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["w2"]


@model({"w": (D, D), "w2": (D, K)})
def custom_vjp_between(p, x):
    return _clipped(x @ p["w"]) @ p["w2"]


@model({"w": (D, K)})
def cast(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)


@model({"w": (D, K)}, dtype=jnp.bfloat16)
def bf16(p, x):
    return jnp.tanh(x @ p["w"])


@model({"w": (D, K)})
def bf16_activations(p, x):
    """JAX computes this product in fp32, the dtype that holds both."""
    return jnp.matmul(x.astype(jnp.bfloat16), p["w"])


@model({"w": (D, K)})
def integer_activations(p, x):
    """A dot_general of uint8 and fp32, as jnp.matmul makes it."""
    return jnp.matmul((8 * jnp.abs(jax.lax.stop_gradient(x))).astype(jnp.uint8), p["w"]) + 0 * x.sum()


@model({"w": (D, K)}, dtype=jnp.float16)
def fp16(p, x):
    return jnp.tanh(x @ p["w"])


@model({"w": (D, K)})
def tied(p, x):
    return (x @ p["w"]) @ p["w"].T


@model({"w": (D, D)})
def used_twice(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


@model({"w": (D, K)})
def high_precision(p, x):
    return jnp.dot(x, p["w"], precision="highest")


@model({"w": (D, K), "v": (3, D)})
def frozen_beside(p, x):
    return (x @ p["w"]).sum() + (x @ p["v"].T).sum()


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.DenseGeneral((HEADS, HEAD), name="split")(x).reshape(*x.shape[:-1], -1))
        x = nn.DenseGeneral(K, axis=(-2, -1), name="join")(x.reshape(*x.shape[:-1], HEADS, HEAD))
        return nn.relu(nn.Dense(D, use_bias=False, name="out")(x))


@model(
    {"split": (D, HEADS, HEAD), "join": (HEADS, HEAD, K), "out": (K, D)},
    pattern="split|join|out",
)
def linen(p, x):
    zeros = {"split": {"bias": jnp.zeros((HEADS, HEAD))}, "join": {"bias": jnp.zeros(K)}, "out": {}}
    variables = {name: {"kernel": p[name], **rest} for name, rest in zeros.items()}
    norm = {"scale": jnp.ones(D), "bias": jnp.zeros(D)}
    return Mlp().apply({"params": {**variables, "LayerNorm_0": norm}}, x)


RULES = {
    "lora": lora.Lora(rank=2, alpha=3),
    "lora of rank 1": lora.Lora(rank=1),
    "gaussian lora": lora.Lora(rank=3, alpha=-0.5, init_a=lora.initializers.gaussian),
}


def eight_devices() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def total(out: Any) -> jax.Array:
    """A scalar that every entry of the output has its own weight in, so that no error can cancel."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(out)]
    return sum((leaf * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)).sum() for leaf in leaves)


def _stack(adapters: Any, n: int = 3) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a * (i + 1) for i in range(n)]), adapters)


def _eager(f, p, a, x):
    return f(p, a, x)


def _jit(f, p, a, x):
    return jax.jit(f)(p, a, x)


def _grad(f, p, a, x):
    return jax.grad(lambda a: total(f(p, a, x)))(a)


def _grad_of_input(f, p, a, x):
    return jax.grad(lambda x: total(f(p, a, x)))(x)


def _vmap_over_adapters(f, p, a, x):
    return jax.vmap(f, in_axes=(None, 0, None))(p, _stack(a), x)


def _vmap_over_inputs(f, p, a, x):
    return jax.vmap(f, in_axes=(None, None, 0))(p, a, jnp.stack([x, 2 * x]))


def _scan(f, p, a, x):
    return jax.lax.scan(lambda c, x: (c + 1, f(p, a, x)), 0, jnp.stack([x, 2 * x]))


def _remat(f, p, a, x):
    return jax.grad(lambda a: total(jax.checkpoint(f)(p, a, x)))(a)


def _jvp(f, p, a, x):
    return jax.jvp(lambda a: f(p, a, x), (a,), (jax.tree.map(jnp.cos, a),))


def _mesh(f, p, a, x):
    """Inputs split over eight devices along time, which is padded to a multiple of them."""
    mesh = eight_devices()
    x = jnp.concatenate([x, x[:, :1]], axis=1)
    x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "data")))
    return jax.jit(jax.grad(lambda a: total(f(p, a, x))))(a)


TRANSFORMS = {
    "eager": _eager,
    "jit": _jit,
    "grad": _grad,
    "grad of the input": _grad_of_input,
    "vmap over adapters": _vmap_over_adapters,
    "vmap over inputs": _vmap_over_inputs,
    "scan": _scan,
    "remat": _remat,
    "jvp": _jvp,
    "mesh": _mesh,
}


def merge_by_hand(w: Any, adapter: lora.LoraAdapter) -> np.ndarray:
    """W' entry by entry: W[...] + scale * sum over r of A[stack, inputs, r] B[stack, r, outputs], in float64."""
    stack, inputs, outputs = adapter.axes
    merged = np.array(w, np.float64)
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    for index in np.ndindex(*merged.shape):
        s, i, o = (tuple(index[axis] for axis in group) for group in (stack, inputs, outputs))
        merged[index] += adapter.scale * sum(a[(*s, *i, r)] * b[(*s, r, *o)] for r in range(a.shape[-1]))
    return merged


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs inside it too."""
    jaxpr, _ = open_jaxpr(jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, list | tuple) else [value]:
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from equations(sub)


MOVES = {
    "transpose",
    "convert_element_type",
    "copy",
    "optimization_barrier",
    "reshape",
    "jit",
    "scan",
    "remat2",
    "squeeze",
}


def formed(jaxpr: Any, shape: tuple[int, ...]) -> list[Any]:
    """Equations that compute a value of this shape, with the axes in any order and any neighbours flattened."""
    size = int(np.prod(shape))
    return [
        eqn
        for eqn in equations(jaxpr)
        if eqn.primitive.name not in MOVES and any(getattr(v.aval, "size", 0) == size for v in eqn.outvars)
    ]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The compilations that happen inside, one entry each."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def assert_trees_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_trees_close(found: Any, expected: Any, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_allclose(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            rtol=rtol,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        )
