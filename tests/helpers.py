"""The tables that the laws run over, and the slow, obviously right ways to the same numbers."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lora
from lora_jax.core._compat import open_jaxpr

# Sizes are distinct, so that no activation has a weight's shape by chance.
BATCH, TIME, D, K, HEADS, HEAD, EXPERTS, LAYERS = 5, 8, 12, 10, 3, 4, 9, 2


@dataclass(frozen=True, eq=False)
class Case:
    """A program: `fn(params, x)`, and the weights of it that are adapted."""

    name: str
    fn: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    x: tuple[int, ...] = (BATCH, TIME, D)
    pattern: str = "w.*"
    dtype: Any = jnp.float32

    @functools.cache  # noqa: B019 (the cases live as long as the tests)
    def params(self) -> dict[str, jax.Array]:
        return {
            name: jnp.asarray(normal((0, i), shape) / np.sqrt(D), self.dtype)
            for i, (name, shape) in enumerate(self.shapes.items())
        }

    @functools.cache  # noqa: B019
    def input(self) -> jax.Array:
        return jnp.asarray(normal((1,), self.x), self.dtype)

    @functools.cache  # noqa: B019
    def plan(self, rule: Any) -> lora.Plan:
        return lora.plan(self.fn, self.params(), self.input(), rules={self.pattern: rule})

    def adapters(self, rule: Any, key: int = 2) -> dict[str, lora.Adapter]:
        return jax.tree.map(lambda a: jnp.array(np.asarray(a)), self._adapters(rule, key))  # a step donates them

    @functools.cache  # noqa: B019
    def _adapters(self, rule: Any, key: int) -> dict[str, lora.Adapter]:
        return trained(lora.init(jax.random.key(key), self.params(), self.plan(rule)), key)


def trained(adapters: Any, key: int, by: float = 0.3) -> Any:
    """Adapters as training leaves them: nothing zero any more, and what is frozen as it was."""
    leaves, tree = jax.tree.flatten(adapters)
    i = itertools.count()
    return tree.unflatten(
        [
            a + jnp.asarray(by * normal((key, next(i)), a.shape), a.dtype) if is_trained else a
            for a, is_trained in zip(leaves, jax.tree.leaves(lora.trainable_mask(adapters)), strict=True)
        ]
    )


def trained_leaves(tree: Any) -> list[Any]:
    """The arrays of adapters, or of their gradients, that are trained."""
    marks = jax.tree.leaves(lora.trainable_mask(tree))
    return [leaf for leaf, is_trained in zip(jax.tree.leaves(tree), marks, strict=True) if is_trained]


def add(number: float, adapters: Any) -> Any:
    """Adapters with a number added to all that is trained."""
    return jax.tree.map(lambda a, is_trained: a + number if is_trained else a, adapters, lora.trainable_mask(adapters))


def normal(seed: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers by numpy: `jax.random` compiles a program for each shape."""
    return np.random.default_rng(seed).normal(size=shape)


def eight_devices() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


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
    block = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w2"], policy=lora.policies.thin)
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


# Structural operations: what a program does to a weight on its way to a product.


@model({"w": (D, 3 * HEADS * HEAD)})
def reshape_of_outputs(p, x):
    q, k, v = jnp.einsum("btd,dchk->cbthk", x, p["w"].reshape(D, 3, HEADS, HEAD))
    return q * jnp.tanh(k) + v


@model({"w": (D, HEADS, HEAD), "w2": (HEADS, HEAD, K)})
def reshape_to_matrices(p, x):
    h = jax.nn.gelu(x @ p["w"].reshape(D, HEADS * HEAD))
    return h @ p["w2"].reshape(-1, K)


@model({"w": (1, D, 1, K), "w2": (K, D)})
def axes_of_size_one(p, x):
    h = x @ jnp.squeeze(p["w"], (0, 2))
    return jnp.einsum("btk,ukd->btd", h, p["w2"][None])


@model({"w": (D, K)})
def broadcast_over_experts(p, x):
    return jnp.einsum("ebd,edk->bek", _per_expert(x), jnp.broadcast_to(p["w"], (EXPERTS, D, K)))


@model({"w": (D, K), "g": ()}, pattern="w")
def scaled(p, x):
    return x @ (2 * p["w"]) + x @ (-p["w"] / 3) + x @ (p["w"] * p["g"])


@model({"w": (D, 11)})
def scaled_by_what_it_computes(p, x):
    """As spectral normalisation does: the factor has a derivative of its own."""
    w = p["w"] / (1 + jnp.tanh(jax.lax.stop_gradient(x) @ p["w"]).max())
    return x @ w + x @ (jnp.exp(x[0, 0, 0]) * w).astype(jnp.float32) - x @ jax.lax.stop_gradient(w)


@model({"w": (D, 3 * K)})
def split_outputs(p, x):
    a, b, c = jnp.split(p["w"], [K, 2 * K + 3], axis=1)
    return (x @ a) ** 2, (x @ b) @ jnp.ones((K + 3, 2)), x @ c[:, ::2]


@model({"w": (2 * D, K)})
def sliced_inputs(p, x):
    return x @ p["w"][:D] + jnp.sin(x) @ jax.lax.dynamic_slice_in_dim(p["w"], x.astype(int)[0, 0, 0] + 3, D)


@model({"w": (LAYERS, D, D)})
def unrolled_layers(p, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ p["w"][i])
    return x


@model({"w": (EXPERTS, D, K)})
def chosen_layer(p, x):
    return x @ p["w"][jnp.argmax(x[0, 0])]


@model({"w": (EXPERTS, D, 7)})
def gathered_experts(p, x):
    """Each example has an expert of its own."""
    chosen = jnp.array([3, 1, 4, 1, 5])
    return jnp.einsum("btd,bdk->btk", x, p["w"][chosen])


@model({"wi": (D, K), "wf": (D, K), "wo": (K, 3 * K), "v": (D, 3)}, pattern="wi|wf|wo")
def concatenated(p, x):
    """As recurrent cells join the kernels of their gates; one of them is frozen."""
    i, v, f = jnp.split(x @ jnp.concatenate([p["wi"], p["v"], p["wf"]], axis=-1), [K, K + 3], axis=-1)
    return jnp.tanh(i) * f @ p["wo"], v


@model({"w1": (D, K), "w2": (D, K)})
def concatenated_inputs(p, x):
    return jnp.concatenate([x, x**2], -1) @ jnp.concatenate([p["w1"], p["w2"]])


@model({"w1": (D, D), "w2": (D, D), "v": (D, D)}, pattern="w1|w2")
def stacked_into_a_scan(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["w1"], p["v"], p["w2"]]))[0]


@model({"w": (D, K)})
def padded_and_flipped(p, x):
    return x @ jnp.pad(jnp.flip(p["w"], 1), ((0, 0), (0, 3)))


@model({"w": (D, K)})
def behind_a_barrier(p, x):
    w, x = jax.lax.optimization_barrier((p["w"], x))
    return x @ jax.lax.with_sharding_constraint(w, jax.NamedSharding(eight_devices(), jax.P()))


@model({"w": (7, 7)}, x=(BATCH, TIME, 7))
def barrier_of_the_weight_alone(p, x):
    """Found by random programs: the derivative of a barrier that held W and its factors had a term of W's shape."""
    return x @ jax.lax.optimization_barrier(p["w"])


@model({"w": (D, K)})
def named_for_a_policy(p, x):
    """A remat that saves what has this name: the weight that is cast or gathered."""
    layer = lambda w, x: jnp.tanh(x @ checkpoint_name(2 * w, "ready"))  # noqa: E731
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("ready"))(p["w"], x)


@model({"w": (D, D)})
def stopped_once(p, x):
    """A target network: no gradient passes its weights."""
    return jnp.tanh(x @ p["w"]) @ p["w"] - x @ jax.lax.stop_gradient(p["w"])


# Embeddings

VOCABULARY = 17
IDS = np.arange(BATCH * TIME).reshape(BATCH, TIME) * 5 % VOCABULARY


@model({"w": (VOCABULARY, D)})
def embedding(p, x):
    return jnp.tanh(p["w"][IDS] + x)


@model({"w": (VOCABULARY, D)})
def tied_embedding(p, x):
    return jnp.tanh(p["w"][IDS] + x) @ p["w"].T


@model({"w": (D, VOCABULARY)})
def take_of_columns(p, x):
    return jnp.take(p["w"], IDS[0], axis=1).T[None] * x


@model({"w": (VOCABULARY, D)})
def out_of_bounds(p, x):
    rows = p["w"].at[IDS[0] + 8].get(mode="fill", fill_value=0.5)
    return rows[None] + p["w"].at[IDS[0] + 8].get(mode="clip")[None] + x


@model({"w": (VOCABULARY, D)})
def one_row(p, x):
    return jnp.tanh(p["w"][jnp.argmax(x[0, 0])][None, None] + x) + p["w"][3][None, None]


@model({"w": (VOCABULARY, D), "w2": (D, K)})
def one_hot(p, x):
    return (jax.nn.one_hot(IDS, VOCABULARY) @ p["w"] + x) @ p["w2"]


@model({"w": (HEADS, VOCABULARY, K)})
def table_for_each_head(p, x):
    ids = np.stack([IDS[0], IDS[1], IDS[2]], axis=1)
    return jax.vmap(lambda table, ids: table[ids], in_axes=(0, 1), out_axes=1)(p["w"], ids) + x.sum()


# Convolutions


def _conv(x, w, dims=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **rest):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dims, **rest)


@model({"w": (3, 2, 4, 10)}, x=(3, 5, 8, 4))
def convolution(p, x):
    return jnp.tanh(_conv(x, p["w"], strides=(2, 1)))


@model({"w": (10, 4, 3, 2)}, x=(3, 4, 8, 6))
def convolution_channels_first(p, x):
    dims = ("NCHW", "OIHW", "NCHW")
    return _conv(x, p["w"], dims, padding=((2, 1), (0, 3)), rhs_dilation=(2, 1), lhs_dilation=(1, 2))


@model({"w": (3, 4, 10)}, x=(3, 9, 8))
def grouped_convolution(p, x):
    return jax.lax.conv_general_dilated(
        x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )


@model({"w": (3, 3, 8, 3)}, x=(3, 5, 8, 8))
def depthwise_convolution(p, x):
    return _conv(x, p["w"].reshape(3, 3, 1, 24), feature_group_count=8)


@model({"w": (3, 3, 10, 4)}, x=(3, 5, 8, 4))
def transposed_convolution(p, x):
    return jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=True)


@model({"w": (3, 3, 4, 10)}, x=(3, 5, 8, 4))
def gradient_of_a_convolution(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(_conv(x, p["w"], strides=(2, 1)))))(x)


# Experts of ragged groups


@model({"w": (3, D, K)})
def ragged(p, x):
    return jax.lax.ragged_dot(x.reshape(-1, D), p["w"], jnp.array([24, 6, 9], jnp.int32))


# Control flow and calls


@model({"w": (D, D)})
def carried_unchanged(p, x):
    def step(carry):
        i, w, x = carry
        w, x = jax.lax.fori_loop(0, 2, lambda _, c: (c[0], jnp.tanh(c[1] @ c[0])), (w, x))
        return i + 1, w, x

    return jax.lax.scan(lambda c, _: (step(c), None), (0, p["w"], x), length=2)[0][2]


@model({"w": (D, D)})
def while_loop(p, x):
    n = x.astype(int)[0, 0, 0] + 2
    return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]


@model({"w": (D, D), "v": (D, D)}, pattern="w")
def condition(p, x):
    y = jax.lax.cond(x.sum() > 0, lambda w: (x @ w, 1), lambda w: (jnp.sin(x) @ w.T, 2), p["w"])
    return jax.lax.switch(1 + jnp.argmax(x[0, 0]) % 2, [lambda: x, lambda: y[0] @ p["w"], lambda: x @ p["v"]])


@model({"w": (D, 16), "w2": (16, K)})
def tensor_parallel(p, x):
    mesh = eight_devices()

    def local(x, w, w2):
        return jax.lax.psum(jax.nn.gelu(x @ w) @ w2, "data")

    specs = (jax.P(), jax.P(None, "data"), jax.P("data"))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P())(x, p["w"], p["w2"])


@model({"w": (D, 16)})
def gathered_in_shard_map(p, x):
    def local(x, w):
        return x @ jax.lax.all_gather(w, "data", axis=1, tiled=True)

    return jax.shard_map(
        local, mesh=eight_devices(), in_specs=(jax.P(), jax.P(None, "data")), out_specs=jax.P(), check_vma=False
    )(x, p["w"])


@model({"w1": (D, K), "w2": (K, 7)})
def gradient_inside(p, x):
    """A force: the derivative of an energy with respect to positions."""
    return jax.grad(lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) ** 2))(x)


@model({"w": (D, D)})
def gradient_of_a_scan_inside(p, x):
    def energy(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, _: (jnp.tanh(x @ p["w"]), None)), x, length=2)[0])

    return jax.grad(energy)(x)


@model({"w": (D, K)})
def vmap_inside(p, x):
    return jax.vmap(jax.vmap(lambda x: p["w"].T @ x))(x)


@model({"w": (D, K), "w2": (K, D)})
def already_adapted(p, x):
    """`lora_apply` on top of `lora_apply`."""
    return _inner(p, {"w": _INNER_ADAPTER}, x)


_inner = lora.lora_apply(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w2"])
_INNER_ADAPTER = lora.LoraAdapter(
    np.linspace(-1, 1, 4 * D, dtype=np.float32).reshape(D, 4),
    np.linspace(1, -1, 4 * K, dtype=np.float32).reshape(4, K),
    lora.KernelAxes((), (0,), (1,)),
    0.5,
)


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

KINDS = {
    "rslora": lora.RsLora(rank=2, alpha=3),
    "lora_fa": lora.LoraFa(rank=2, alpha=3),
    "dora": lora.Dora(rank=2, alpha=3),
    "loha": lora.Loha(rank=2, alpha=3),
    "adalora": lora.AdaLora(rank=2, alpha=3),
    "lokr": lora.Lokr(rank=2, alpha=3),
    "lokr_whole": lora.Lokr(rank=9, alpha=3),
    "vera": lora.Vera(rank=2),
    "ia3": lora.Ia3(),
    "full": lora.Full(),
}


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
    """Inputs split over eight devices, along the first axis that they divide: mostly time."""
    axis = next(i for i, n in enumerate(x.shape) if n % 8 == 0)
    spec = jax.P(*["data" if i == axis else None for i in range(x.ndim)])
    x = jax.lax.with_sharding_constraint(x, jax.NamedSharding(eight_devices(), spec))
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
    "pvary",
    "shard_map",
    "cond",
    "while",
    "sharding_constraint",
    "stop_gradient",
}


def formed(jaxpr: Any, shape: tuple[int, ...]) -> list[str]:
    """The primitives that compute a value of this shape, with the axes in any order and any neighbours flattened."""
    size = int(np.prod(shape))

    def has_it(variables: Any) -> bool:
        return any(getattr(v.aval, "size", 0) == size for v in variables)

    return [
        eqn.primitive.name
        for eqn in equations(jaxpr)
        if has_it(eqn.outvars)
        and eqn.primitive.name not in MOVES
        and not (eqn.primitive.name == "broadcast_in_dim" and has_it(eqn.invars))
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
