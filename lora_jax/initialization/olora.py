"""OLoRA: start with the QR decomposition of each weight."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.initialization.checks import check_weights
from lora_jax.initialization.rebase import Adapters, rebase
from lora_jax.initialization.svd import Factors


def olora(params: Any, adapters: Adapters) -> tuple[Any, dict[str, LoraAdapter]]:
    """Start with B an orthonormal basis of the first r rows of W: A = R[:r]^T, B = Q[:, :r]^T, with W^T = Q R.

    W^T [k, d] is the weight as the paper and HF PEFT have it. As in PEFT, the factors are not divided by the scale, and
    the base becomes W - s A B.
    Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.

    Args:
        params: the parameters; adapted weights may be packed.
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them.

    Returns:
        The new parameters, and the started adapters.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jax.random.normal(jax.random.key(0), (6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> base, adapters = lora.starts.olora(params, lora.init(jax.random.key(1), params, plan))
    >>> b = adapters["w"].b
    >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-5))
    True
    """
    weights = check_weights(params, adapters)

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        rank = adapter.a.shape[-1]
        q, r = jnp.linalg.qr(w.mT)  # [n, k, m] and [n, m, d], with m = min(d, k)
        return r[:, :rank].mT, q[:, :, :rank].mT

    return rebase(params, weights, adapters, factors)
