"""Starts of LoRA that look at the weight, at a gradient or at the data, in the place of a random A and a zero B.

Each takes fresh adapters `{path: LoraAdapter}`, as `lora.init` makes them for rules of `lora.Lora`, and gives them back
with other factors. Where A B is not zero, s A B is taken off the base, so that starting changes nothing:
`merge(new_params, new_adapters)` is `merge(params, adapters)` up to the rounding of W's dtype, or of its packing.

    start                 A                       B                       base
    pissa                 U_r sqrt(S_r / |s|)     sqrt(S_r / |s|) V_r^T   W - s A B      U S V^T = W
    olora                 R[:r]^T                 Q[:, :r]^T              W - s A B      Q R = W^T
    corda                 C^-1 U sqrt(S / |s|)    sqrt(S / |s|) V^T       W - s A B      U S V^T = C W
    lora_ga               U_r                     S_2r V_2r^T times c     W - s A B      U S V^T = dL/dW
    eva                   V_r                     0                       W              U S V^T = X
    orthogonal            random, with A B = 0    random                  W
    loftq                 U_r sqrt(S_r / |s|)     sqrt(S_r / |s|) V_r^T   Q, packed      U S V^T = W - Q

W is here the matrix [d, k] that multiplies from the right, x @ W, and s the scale of the adapter. A weight with stacked
matrices is started matrix by matrix, and one with several inputs or outputs as the matrix that these make.

An adapter trained on a changed base belongs to that base. It becomes a plain adapter of the ORIGINAL one, of twice the
rank, by taking off what it started with:

>>> import jax, lora_jax as lora
>>> from lora_jax import starts
>>> params = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
>>> plan = lora.plan(lambda p, x: x @ p["w"], params, jax.numpy.ones((1, 6)), rules={"w": lora.Lora(rank=2)})
>>> base, start = starts.pissa(params, lora.init(jax.random.key(1), params, plan))
>>> trained = jax.tree.map(lambda array: 1.1 * array, start)  # by a training step on `base`
>>> plain = lora.combine([(trained, 1.0), (start, -1.0)])
>>> bool(abs(lora.merge(params, plain)["w"] - lora.merge(base, trained)["w"]).max() < 1e-5)
True

A packed weight is unpacked for its start, one after the other, and what is left of it is packed again, which loses
something once more. Where W is at hand, start from W and pack the new base.

Starts look at numbers, so they run outside `jax.jit`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.bases.format import Format, check_weight
from lora_jax.bases.merge import repacked
from lora_jax.core.arrays import placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, as_given, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names, path_key
from lora_jax.initialization.checks import check_data, check_fresh, check_weights
from lora_jax.initialization.rank_allocation import allot
from lora_jax.initialization.svd import Factors, matmul, matrices, principal, randomised_svd, shared, svd, wide

Adapters = Mapping[str, LoraAdapter]

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd_scale", "weight_svd", "unit")
MODES = ("instruction", "knowledge")


def pissa(
    params: Any, adapters: Adapters, *, iterations: int | None = None, key: jax.Array | None = None
) -> tuple[Any, dict[str, LoraAdapter]]:
    """A B is the nearest to W of its rank: A = U_r sqrt(S_r / |s|), B = sign(s) sqrt(S_r / |s|) V_r^T, W = U S V^T.

    Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", arXiv
    2404.02948.

    For a packed base (the paper's QPiSSA), start from W, then pack what is left with `lora.bases.quantize`: the
    residual is smaller than W where few singular values are large, and so is what packing it loses. A weight that is
    packed already keeps what it has lost, and loses as much as the residual does besides.

    Args:
        iterations: None for the exact SVD. Otherwise a randomised one with so many steps of subspace iteration, which
            is much faster for large weights and near the exact one after a few (Halko et al. 2009, arXiv 0909.4061).
        key: of the random numbers of the randomised SVD.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite; a key
            is missing.
    """
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0):
        raise LoraError(f"pissa(iterations={iterations!r}): expected a whole number such as 4, or None for exact SVD.")
    if iterations is not None and key is None:
        raise LoraError(f"pissa(iterations={iterations}) draws random numbers: give it key=jax.random.key(0).")
    weights = check_weights(params, adapters)

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        rank = adapter.a.shape[-1]
        if key is None or iterations is None:
            return shared(*svd(w, np.arange(rank)), adapter.scale)
        return shared(*randomised_svd(path_key(key, path), w, rank, iterations), adapter.scale)

    return _rebase(params, weights, adapters, factors)


def olora(params: Any, adapters: Adapters) -> tuple[Any, dict[str, LoraAdapter]]:
    """The rows of B are an orthonormal basis of the first r rows of W: A = R[:r]^T, B = Q[:, :r]^T, with W^T = Q R.

    W^T [k, d] is the weight as the paper and HF PEFT have it. As in PEFT the factors are not divided by the scale: the
    base becomes W - s A B.
    Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite.
    """
    weights = check_weights(params, adapters)

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        rank = adapter.a.shape[-1]
        q, r = jnp.linalg.qr(w.mT)  # [n, k, m] and [n, m, d], with m = min(d, k)
        return r[:, :rank].mT, q[:, :, :rank].mT

    return _rebase(params, weights, adapters, factors)


def loftq(
    params: Any, adapters: Adapters, format: Format, *, iterations: int = 1
) -> tuple[Any, dict[str, LoraAdapter]]:
    """A packed base Q, and A B that makes up for what packing loses: s A B is the nearest to W - Q of its rank.

    Q is W packed; with more iterations, Q is W - s A B of the one before, packed.
    Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659. HF PEFT
    leaves the scale out, so that its A B makes up for s times too much.

    Args:
        format: of the base's adapted weights, such as `lora.bases.Nf4()`. `lora.bases.quantize` packs others.
        iterations: at least 1.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite, or
            packed already; no such format; iterations below 1.
    """
    if not isinstance(format, Format):
        raise LoraError(f"loftq(format={format!r}): expected a format such as lora.bases.Nf4().")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise LoraError(f"loftq(iterations={iterations!r}): expected a whole number of at least 1.")
    weights = check_weights(params, adapters)
    if packed_already := [path for path, w in weights.items() if is_packed(w)]:
        raise LoraError(
            f"{packed_already[0]!r} is packed already, and LoftQ makes up for what packing loses, of which that has no "
            "trace: start from the parameters as they were before they were packed."
        )
    stacks = {path: check_weight(path, w, format.stack) for path, w in weights.items()}
    started: dict[str, LoraAdapter] = {}
    packed: dict[str, Packed] = {}
    for path, adapter in adapters.items():
        w, axes, rank = weights[path], adapter.axes, np.arange(adapter.a.shape[-1])
        rest = w
        for _ in range(iterations):
            packed[path] = format.pack(rest, stacks[path], jnp.dtype(format.dtype or w.dtype))
            lost = matrices(w, axes) - matrices(packed[path].dense(), axes)
            started[path] = new = _with(path, adapter, *shared(*svd(lost, rank), adapter.scale))
            rest = dataclasses.replace(new, scale=-new.scale).merge(wide(w)).astype(w.dtype)
    return _with_weights(params, packed), started


def orthogonal(key: jax.Array, adapters: Adapters) -> dict[str, LoraAdapter]:
    """Neither factor is zero, and yet A B = 0: A = X Q_even / 10, B = Q_odd^T Y / 10, on an unchanged base.

    X [d, r/2] and Y [r/2, k] are of N(0, 1), and Q_even and Q_odd [r/2, r] every second row of one random orthogonal
    matrix. Both factors have a gradient from the first step on, where with a zero B only B has one.
    No paper; the start is that of HF PEFT (`init_lora_weights="orthogonal"`).

    Args:
        key: of the random numbers; each path has its own from it, as in `lora.init`.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA; a rank is odd.
    """
    check_fresh(adapters)
    for path, adapter in adapters.items():
        if (rank := adapter.a.shape[-1]) % 2:
            raise LoraError(
                f"{path!r} has rank {rank}, expected an even one, each factor has half of it: take rank {rank + 1}."
            )

    def start(path: str, adapter: LoraAdapter) -> LoraAdapter:
        n, d, k = adapter.axes.fans(adapter.kernel_shape())
        rank = adapter.a.shape[-1]
        for_q, for_x, for_y = jax.random.split(path_key(key, path), 3)
        q, _ = jnp.linalg.qr(jax.random.normal(for_q, (n, rank, rank)))
        x, y = jax.random.normal(for_x, (n, d, rank // 2)), jax.random.normal(for_y, (n, rank // 2, k))
        return _with(path, adapter, matmul(x, q[:, ::2]) / 10, matmul(q[:, 1::2].mT, y) / 10)

    return {path: start(path, adapter) for path, adapter in adapters.items()}


def eva(adapters: Adapters, inputs: Any, *, rho: float = 2.0) -> dict[str, LoraAdapter]:
    """A spans the directions in which x varies most, and ranks go to where these explain most: A = V_r, B = 0.

    X = U S V^T has rows x. Component i of a weight explains S_i^2 / sum S^2 of its x. Every weight gets the first one,
    and the rest of the sum of all ranks goes to the components that explain most, wherever they are. The scale of each
    adapter stays the same, that is alpha changes along with the rank. The base is unchanged.
    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv
    2410.07170.

    A weight with stacked matrices has one rank for all of them, which counts once; the mean of their shares decides.
    HF PEFT takes the mean off X first, as in PCA, and may leave a weight without adapter. For the former give X - mean.

    Args:
        inputs: `{path: X [*stack, n, d]}`, n rows of what each weight is multiplied with, at least as many as its rank;
            several inputs flattened to d.
        rho: no rank grows beyond rho times what it was, or beyond min(d, k, n). 1 leaves the ranks as they are.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA; inputs are missing, too few, not finite or of another
            shape; rho is not a finite number of at least 1.
    """
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 1 <= rho < math.inf:
        raise LoraError(f"eva(rho={rho!r}): expected a finite number of at least 1, for example 2.0.")
    check_fresh(adapters)
    expected: dict[str, tuple[int | None, ...]] = {}
    for path, adapter in adapters.items():
        stack, _, _ = adapter.axes.sizes(adapter.kernel_shape())
        expected[path] = (*stack, None, math.prod(adapter.a.shape[len(stack) : -1]))
    xs = check_data("inputs", inputs, expected)
    for path, adapter in adapters.items():
        if (rows := xs[path].shape[-2]) < (rank := adapter.a.shape[-1]):
            raise LoraError(f"inputs[{path!r}] has {rows} rows, expected at least {rank}, its rank: give more of them.")

    bases: dict[str, jax.Array] = {}  # [n, d, most]
    shares: dict[str, np.ndarray] = {}  # [most]
    for path, adapter in adapters.items():
        _, d, k = adapter.axes.fans(adapter.kernel_shape())
        x = wide(xs[path].reshape(-1, *xs[path].shape[-2:]))
        most = round(min(rho * adapter.a.shape[-1], d, k, x.shape[1]))
        bases[path], shares[path] = principal(x, most)
    ranks = allot(shares, sum(adapter.a.shape[-1] for adapter in adapters.values()))

    def start(path: str, adapter: LoraAdapter) -> LoraAdapter:
        n, _, k = adapter.axes.fans(adapter.kernel_shape())
        return _with(path, adapter, bases[path][:, :, : ranks[path]], jnp.zeros((n, ranks[path], k)))

    return {path: start(path, adapter) for path, adapter in adapters.items()}


def lora_ga(
    params: Any,
    adapters: Adapters,
    gradients: Any,
    *,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, LoraAdapter]]:
    """The first steps of A and B together move W as its own gradient would: A = U_r, B = c S_2r V_2r^T.

    dL/dW = U S V^T; U_r are the first r columns, S_2r V_2r^T the r rows after the first r. The base becomes W - s A B.
    Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000.

    The singular values in B are from HF PEFT, as are the names of directions and scales. With them B is as large as the
    gradient is, and so depends on how the loss is scaled; with "weight_svd" it does not.

    Args:
        gradients: dL/dW of the full weights, each in the weight's own axes, averaged over some batches:
            `{path: dL/dW}` or a tree like `params`.
        gamma: of "stable".
        direction: which singular vectors A and B have. "ArB2r": A the first r and B the next r; "A2rBr": the other way
            round; "ArBr": A every second one from the second on, and B the others of the first 2r; "random": the same
            random r of the first 2r, which needs a key.
        scale: c. "stable": k^(1/4) / sqrt(gamma); "weight_svd": what makes the largest singular value of B that of W;
            "gd_scale": 1 / s, and A is divided by s too; "unit": 1.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a gradient is missing, not
            finite or of another shape than its weight; a weight has fewer than 2r singular values; a name is unknown.
    """
    _check_name("lora_ga", "direction", direction, DIRECTIONS)
    _check_name("lora_ga", "scale", scale, SCALES)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma < math.inf:
        raise LoraError(f"lora_ga(gamma={gamma!r}): expected a finite number above 0, for example 16.0.")
    if direction == "random" and key is None:
        raise LoraError("lora_ga(direction='random') draws random numbers: give it key=jax.random.key(0).")
    weights = check_weights(params, adapters)
    grads = check_data("gradients", gradients, {path: weights[path].shape for path in adapters})
    for path, adapter in adapters.items():
        _, d, k = adapter.axes.fans(weights[path].shape)
        if 2 * (rank := adapter.a.shape[-1]) > min(d, k):
            raise LoraError(
                f"{path!r} has rank {rank}, and LoRA-GA takes twice as many singular vectors of a gradient that has "
                f"min({d}, {k}): take a rank of at most {min(d, k) // 2}."
            )

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        rank = adapter.a.shape[-1]
        for_a, for_b = _directions(direction, rank, None if key is None else path_key(key, path))
        u, values, vt = svd(matrices(grads[path], adapter.axes), np.arange(2 * rank))
        a, b, values = u[:, :, for_a], vt[:, for_b], values[:, for_b]
        b = values[:, :, None] * b
        if scale == "stable":
            return a, b * (w.shape[-1] ** 0.25 / gamma**0.5)
        if scale == "weight_svd":
            top, own = jnp.linalg.norm(w, 2, axis=(-2, -1)), values.max(-1)
            return a, b * jnp.where(own > 0, top / jnp.where(own > 0, own, 1), 1)[:, None, None]
        return (a / adapter.scale, b / adapter.scale) if scale == "gd_scale" else (a, b)

    return _rebase(params, weights, adapters, factors)


def corda(
    params: Any, adapters: Adapters, covariances: Any, *, mode: str = "instruction"
) -> tuple[Any, dict[str, LoraAdapter]]:
    """A B is a part of W chosen by what W does to data: A = C^-1 U sqrt(S / |s|), B = sign(s) sqrt(S / |s|) V^T.

    C W = U S V^T, and C [d, d] is the covariance X^T X of what W is multiplied with. It is damped until it can be
    inverted: C + t mean(diag C) I, with t = 0.01 doubled until |C C^-1 - I| < 0.05. The base becomes W - s A B.
    Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning", arXiv 2406.05223.

    The unit of C has no influence on A B: it moves size from A to B. HF PEFT divides the x of each batch by their
    largest entry, and takes the mean of X^T X over batches.

    Args:
        covariances: `{path: C [*stack, d, d]}`, several inputs flattened to d.
        mode: "instruction" trains the largest r of the singular values, for data of the new task; "knowledge" the
            smallest r, for data of what is to be kept.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a covariance is missing, not
            finite, not symmetric, zero or of another shape; the mode is unknown.
    """
    _check_name("corda", "mode", mode, MODES)
    weights = check_weights(params, adapters)
    expected: dict[str, tuple[int | None, ...]] = {}
    for path, adapter in adapters.items():
        stack, _, _ = adapter.axes.sizes(weights[path].shape)
        _, d, _ = adapter.axes.fans(weights[path].shape)
        expected[path] = (*stack, d, d)
    found = check_data("covariances", covariances, expected)
    cs = {path: wide(c.reshape(-1, *c.shape[-2:])) for path, c in found.items()}
    for path, c in cs.items():
        _check_covariance(path, c)

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        c, inverse = _damped(path, cs[path])
        rank, count = adapter.a.shape[-1], min(w.shape[1:])
        which = np.arange(rank) if mode == "instruction" else np.arange(count - rank, count)
        u, values, vt = svd(matmul(c, w), which)
        return shared(matmul(inverse, u), values, vt, adapter.scale)

    return _rebase(params, weights, adapters, factors)


# From factors to adapters


def _rebase(
    params: Any,
    weights: Mapping[str, Any],
    adapters: Adapters,
    factors: Callable[[str, LoraAdapter, jax.Array], Factors],
) -> tuple[Any, dict[str, LoraAdapter]]:
    """The adapters with the factors for each weight, and the parameters without what these add."""
    started: dict[str, LoraAdapter] = {}
    rest: dict[str, Any] = {}
    for path, adapter in adapters.items():
        weight = weights[path]
        w = unpacked(weight)
        started[path] = new = _with(path, adapter, *factors(path, adapter, matrices(w, adapter.axes)))
        # With the factors as they are stored: what rounding them loses stays in the base.
        without = dataclasses.replace(new, scale=-new.scale).merge(wide(w))
        if is_packed(weight):
            rest[path] = repacked(weight, _check_result(path, without))
        else:
            rest[path] = placed(_check_result(path, without.astype(w.dtype)), w)
    return _with_weights(params, rest), started


def _with_weights(params: Any, weights: Mapping[str, Any]) -> Any:
    """The parameters with other weights at these paths."""
    names, leaves, treedef = flatten_with_names(params)
    return treedef.unflatten([as_given(weights.get(name, leaf)) for name, leaf in zip(names, leaves, strict=True)])


def _with(path: str, adapter: LoraAdapter, a: jax.Array, b: jax.Array) -> LoraAdapter:
    """The adapter with A [n, d, r] and B [n, r, k] in its own shapes, dtypes and places; r may be another one."""
    stack, inputs, outputs = adapter.axes.sizes(adapter.kernel_shape())
    rank = a.shape[-1]
    a = _check_result(path, a.reshape(*stack, *inputs, rank).astype(adapter.a.dtype))
    b = _check_result(path, b.reshape(*stack, rank, *outputs).astype(adapter.b.dtype))
    return dataclasses.replace(adapter, a=placed(a, adapter.a), b=placed(b, adapter.b))


def _directions(direction: str, rank: int, key: jax.Array | None) -> tuple[Any, Any]:
    """Which of the first 2r singular vectors A has, and which B."""
    both = np.arange(2 * rank)
    if key is not None and direction == "random":
        some = jax.random.permutation(key, both)[:rank]
        return some, some
    first, second = both[:rank], both[rank:]
    return {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (both[1::2], both[::2])}[direction]


def _damped(path: str, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """C [n, d, d] with as much added to each diagonal as its inverse needs, and the inverses."""
    eye = jnp.eye(c.shape[-1], dtype=c.dtype)[None]
    mean = jnp.trace(c, axis1=-2, axis2=-1) / c.shape[-1]
    damping = jnp.full_like(mean, 0.01)
    for _ in range(64):  # by then what is added is all that counts
        damped = c + (damping * mean)[:, None, None] * eye
        inverse = jnp.linalg.inv(damped)
        inverted = jnp.linalg.norm(matmul(damped, inverse) - eye, axis=(-2, -1)) < 0.05
        if inverted.all():
            return damped, inverse
        damping = jnp.where(inverted, damping, 2 * damping)
    raise LoraError(f"covariances[{path!r}] has no inverse in {c.dtype}: scale the inputs that it is made of.")


# Checks, before work starts


def _check_covariance(path: str, c: jax.Array) -> None:
    skew, largest = jnp.abs(c - c.mT).max(), jnp.abs(c).max()
    if skew > 1e-3 * largest:
        raise LoraError(f"covariances[{path!r}] is not symmetric, C - C^T is up to {skew:.3g}: give X^T X of rows x.")
    if not (jnp.trace(c, axis1=-2, axis2=-1) > 0).all():
        raise LoraError(
            f"covariances[{path!r}] has no variance on its diagonal: give X^T X of rows x that are not zero."
        )


def _check_name(start: str, what: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise LoraError(f"{start}({what}={found!r}): expected one of {', '.join(map(repr, known))}.")


def _check_result(path: str, array: jax.Array) -> jax.Array:
    if not jnp.isfinite(wide(array)).all():
        raise LoraError(
            f"the start of {path!r} overflows {array.dtype}: what it is made of is too large, scale that down."
        )
    return array
