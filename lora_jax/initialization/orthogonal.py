"""The orthogonal start: random factors, neither of them zero, whose product is zero."""

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.argument_checks import check_key
from lora_jax.core.arrays import matmul_highest
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import path_key
from lora_jax.initialization.checks import check_fresh
from lora_jax.initialization.rebase import Adapters, with_factors


def orthogonal(key: jax.Array, adapters: Adapters) -> dict[str, LoraAdapter]:
    """Start with A = X Q_even / 10 and B = Q_odd^T Y / 10, whose product is zero though neither of them is.

    The entries of X [d, r/2] and Y [r/2, k] are drawn from N(0, 1); Q_even and Q_odd [r/2, r] are every second row of
    one random orthogonal matrix. Both factors have a gradient from the first step on; where B is zero, only B has one.
    The base is unchanged. There is no paper; the start is that of HF PEFT (`init_lora_weights="orthogonal"`).

    Args:
        key: of the random numbers; the key of each path is derived from it, as in `lora.init`.
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them, of even ranks.

    Returns:
        The started adapters.

    Raises:
        LoraError: `key` is no random key; the adapters are not fresh ones of plain LoRA; a rank is odd.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> adapters = lora.starts.orthogonal(jax.random.key(1), lora.init(jax.random.key(0), params, plan))
    >>> a, b = adapters["w"].a, adapters["w"].b
    >>> bool(abs(a @ b).max() < 1e-5), bool(abs(b).max() > 0)
    (True, True)
    """
    check_key("orthogonal(key, adapters)", key)
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
        return with_factors(path, adapter, matmul_highest(x, q[:, ::2]) / 10, matmul_highest(q[:, 1::2].mT, y) / 10)

    return {path: start(path, adapter) for path, adapter in adapters.items()}
