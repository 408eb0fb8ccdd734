"""What dropout costs in compile time: the gradient of unrolled linear layers, with and without `with_dropout`, in turn.

python benchmarks/dropout_compile.py             # 24 layers; seconds of the process, not of the clock
python benchmarks/dropout_compile.py 24 rbg      # with keys of another generator
"""

import sys
import time

import jax
import jax.numpy as jnp

import lora_jax as lora


def model(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def main(layers: int = 24, impl: str = "threefry2x32") -> None:
    params, x = [jnp.ones((16, 16))] * layers, jnp.ones((4, 16))
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {str(i): lora.LoraAdapter(jnp.ones((16, 2)), jnp.ones((2, 16)), axes, 1.0) for i in range(layers)}
    apply = lora.lora_apply(model)
    for rate in (0.0, 0.1, 0.0, 0.1):
        jax.clear_caches()

        def loss(adapters: dict[str, lora.Adapter], key: jax.Array, rate: float = rate) -> jax.Array:
            return apply(params, lora.with_dropout(adapters, key, rate), x).sum()

        start = time.process_time()
        compiled = jax.jit(jax.grad(loss)).lower(adapters, jax.random.key(0, impl=impl)).compile()
        seconds, instructions = time.process_time() - start, (compiled.as_text() or "").count(" = ")
        print(f"{layers} layers, rate {rate}: {seconds:.2f} s, {instructions} instructions")


if __name__ == "__main__":
    main(*(int(arg) if arg.isdigit() else arg for arg in sys.argv[1:]))  # type: ignore[arg-type]
