"""What dropout costs in compile time: the gradient of an unrolled decoder, with and without `with_dropout`, in turn.

python benchmarks/dropout_compile.py             # 24 layers; seconds of the process, not of the clock
python benchmarks/dropout_compile.py 24 rbg      # with keys of another generator
"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora

D, HEADS, TOKENS = 64, 4, 16
SHAPES = dict.fromkeys("qkvo", (D, D)) | {"gate": (D, 4 * D), "up": (D, 4 * D), "down": (4 * D, D)}


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def model(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for p in params:
        q, k, v = ((norm(x) @ p[name]).reshape(TOKENS, HEADS, -1) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        x = x + jnp.einsum("hts,shd->thd", weights, v).reshape(TOKENS, D) @ p["o"]
        x = x + (jax.nn.silu(norm(x) @ p["gate"]) * (norm(x) @ p["up"])) @ p["down"]
    return x


def main(layers: int = 24, impl: str = "threefry2x32") -> None:
    params = [{name: jnp.ones(shape) / D for name, shape in SHAPES.items()} for _ in range(layers)]
    x = jnp.ones((TOKENS, D))
    adapters = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={".*": lora.Lora(rank=4)}))
    apply = lora.lora_apply(model)
    for rate in (0.0, 0.1, 0.0, 0.1):
        jax.clear_caches()

        def loss(adapters: Any, key: jax.Array, rate: float = rate) -> jax.Array:
            return apply(params, lora.with_dropout(adapters, key, rate), x).sum()

        start = time.process_time()
        compiled = jax.jit(jax.grad(loss)).lower(adapters, jax.random.key(0, impl=impl)).compile()
        seconds, instructions = time.process_time() - start, (compiled.as_text() or "").count(" = ")
        print(f"{layers} layers, rate {rate}: {seconds:.2f} s, {instructions} instructions")


if __name__ == "__main__":
    main(*(int(arg) if arg.isdigit() else arg for arg in sys.argv[1:]))  # type: ignore[arg-type]
