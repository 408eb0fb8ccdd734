"""Starts of LoRA from the weight, a gradient or data, instead of a random A and a zero B.

Each takes fresh adapters `{path: LoraAdapter}`, as `lora.init` makes them for rules of `lora.Lora`, and returns them
with other factors. Where A B is not zero, s A B is subtracted from the base, so that starting changes nothing:
`merge(new_params, new_adapters)` is `merge(params, adapters)` up to the rounding of W's dtype, or of its packing.

    start                 A                       B                       base
    pissa                 U_r sqrt(S_r / |s|)     sqrt(S_r / |s|) V_r^T   W - s A B      U S V^T = W
    olora                 R[:r]^T                 Q[:, :r]^T              W - s A B      Q R = W^T
    corda                 C^-1 U sqrt(S / |s|)    sqrt(S / |s|) V^T       W - s A B      U S V^T = C W
    lora_ga               U_r                     S_2r V_2r^T times c     W - s A B      U S V^T = dL/dW
    eva                   V_r                     0                       W              U S V^T = X
    orthogonal            random, with A B = 0    random                  W
    loftq                 U_r sqrt(S_r / |s|)     sqrt(S_r / |s|) V_r^T   Q, packed      U S V^T = W - Q

Here W is the matrix [d, k] that multiplies from the right, x @ W, and s the scale of the adapter. A weight of stacked
matrices is started matrix by matrix; several input or output axes are flattened to d and k.

An adapter trained on a changed base belongs to that base. Subtracting what it started with makes it a plain adapter of
the ORIGINAL one, of twice the rank:

>>> import jax, lora_jax as lora
>>> from lora_jax import starts
>>> params = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
>>> plan = lora.plan(lambda p, x: x @ p["w"], params, jax.numpy.ones((1, 6)), rules={"w": lora.Lora(rank=2)})
>>> base, start = starts.pissa(params, lora.init(jax.random.key(1), params, plan))
>>> trained = jax.tree.map(lambda array: 1.1 * array, start)  # by a training step on `base`
>>> plain = lora.combine([(trained, 1.0), (start, -1.0)])
>>> bool(abs(lora.merge(params, plain)["w"] - lora.merge(base, trained)["w"]).max() < 1e-5)
True

Packed weights are unpacked for their start one at a time, and the residual is packed again, which adds another rounding
error. Where W is at hand, start from W and pack the new base.

Starts look at numbers, so they run outside `jax.jit`.
"""

from lora_jax.initialization.corda import corda
from lora_jax.initialization.eva import eva
from lora_jax.initialization.loftq import loftq
from lora_jax.initialization.lora_ga import lora_ga
from lora_jax.initialization.olora import olora
from lora_jax.initialization.orthogonal import orthogonal
from lora_jax.initialization.pissa import pissa

__all__ = ["corda", "eva", "loftq", "lora_ga", "olora", "orthogonal", "pissa"]
