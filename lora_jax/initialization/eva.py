"""EVA: start with the principal components of each weight's inputs, and give ranks to those that explain most."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.errors import LoraError
from lora_jax.initialization.checks import check_data, check_fresh, inputs_shape
from lora_jax.initialization.rank_allocation import allocate_sorted
from lora_jax.initialization.rebase import Adapters, with_factors
from lora_jax.initialization.svd import flatten_stack, principal_components


def eva(adapters: Adapters, inputs: Any, *, rho: float = 2.0) -> dict[str, LoraAdapter]:
    """Start A with the directions in which the inputs vary most, and redistribute the ranks: A = V_r, B = 0.

    The rows of X = U S V^T are the inputs x of a weight, and component i explains S_i^2 / sum S^2 of them. Every weight
    gets its first component; the rest of the sum of all ranks goes to the components that explain most, of whichever
    weight. The scale of each adapter stays the same, that is, alpha changes along with the rank. The base is unchanged.
    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv
    2410.07170.

    A weight with stacked matrices has one rank for all of them, which counts once, and its components have the mean of
    their shares. HF PEFT subtracts the mean from X first, as in PCA, and may leave a weight without adapter. For the
    former give X - mean.

    Args:
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them.
        inputs: `{path: X [*stack, n, d]}`, n rows of what each weight is multiplied with, at least as many as its rank;
            several input axes flattened to d.
        rho: no rank grows beyond rho times what it was, or beyond min(d, k, n). 1 leaves the ranks as they are.

    Returns:
        The started adapters, of other ranks.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA; inputs are missing, too few, not finite or of another
            shape; rho is not a finite number of at least 1.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jax.random.normal(jax.random.key(0), (32, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> lora.starts.eva(lora.init(jax.random.key(1), params, plan), {"w": x}, rho=1)
    {'w': LoraAdapter(a 6x2, b 2x4)}
    """
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 1 <= rho < math.inf:
        raise LoraError(f"eva(rho={rho!r}): expected a finite number of at least 1, for example 2.0.")
    check_fresh(adapters)
    expected = {path: inputs_shape(adapter.axes, adapter.kernel_shape()) for path, adapter in adapters.items()}
    xs = check_data("inputs", inputs, expected)
    for path, adapter in adapters.items():
        if (rows := xs[path].shape[-2]) < (rank := adapter.a.shape[-1]):
            raise LoraError(f"inputs[{path!r}] has {rows} rows, expected at least {rank}, its rank: give more of them.")

    components: dict[str, jax.Array] = {}  # [n, d, most]
    shares: dict[str, np.ndarray] = {}  # [most]
    for path, adapter in adapters.items():
        _, d, k = adapter.axes.fans(adapter.kernel_shape())
        x = flatten_stack(xs[path])
        most = round(min(rho * adapter.a.shape[-1], d, k, x.shape[1]))
        components[path], shares[path] = principal_components(x, most)
    ranks = allocate_sorted(shares, sum(adapter.a.shape[-1] for adapter in adapters.values()))

    def start(path: str, adapter: LoraAdapter) -> LoraAdapter:
        n, _, k = adapter.axes.fans(adapter.kernel_shape())
        return with_factors(path, adapter, components[path][:, :, : ranks[path]], jnp.zeros((n, ranks[path], k)))

    return {path: start(path, adapter) for path, adapter in adapters.items()}
