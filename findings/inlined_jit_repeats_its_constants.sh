#!/usr/bin/env bash
# In a gradient, a function under jax.jit(inline=True) brings a copy of the array that it closes over for each call.
#
# Versions: jax and jaxlib 0.12.0.1, on the CPU backend; with 0.10.2 the program has one copy.
#
# Five calls of one function that closes over one NumPy array, and the gradient of a loss of them. The text that the
# program is lowered to holds the array six times. Without `inline=True` it holds it three times, in both versions. The
# value is the same. A random projection of 256 x 4096 that 200 weights share is so 0.8 GB of text where 4 MB were meant.
#
# Seen:
#     jit(inline=True)  6
#     jit               3
#     no jit            1
#
# Whoever has matrices that belong to a program and not to its arguments, as VeRA has, meets it. Leaving out the inner jit
# avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(for p in python3.13 python3.12 python3; do "$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
    2>/dev/null && echo "$p" && break; done) || { echo "JAX 0.12 needs Python 3.12 or newer."; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np

shared = np.random.default_rng(0).normal(size=(24, 7)).astype(np.float32)


def product(x, d):
    return x + (x @ shared * d).sum()


def copies(product):
    def loss(ds, x):
        for d in ds:
            x = jnp.tanh(product(x, d))
        return x.sum()

    text = jax.jit(jax.grad(loss)).lower([jnp.ones(7)] * 5, jnp.ones((3, 24))).as_text()
    return len(re.findall(r'dense<"0x\w*"> : tensor<24x7xf32>', text))


found = {
    "jit(inline=True)": copies(jax.jit(product, inline=True)),
    "jit": copies(jax.jit(product)),
    "no jit": copies(product),
}
for name, n in found.items():
    print(f"{name:17s} {n}")
assert list(found.values()) == [6, 3, 1], "the behaviour has changed"
print("An inlined function still brings its array with each call.")
PYTHON
