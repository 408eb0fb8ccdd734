#!/usr/bin/env bash
# The gradient of a scan over batches unpacks the weights of all layers at once, though each layer is under jax.checkpoint.
#
# Versions: jax and jaxlib 0.12.0.1, on the CPU backend; 0.10.2 does the same.
#
# A model is a scan over layers. Each unpacks its frozen int8 weight and is under jax.checkpoint, so the gradient of one
# batch holds one unpacked weight at a time. A loss that is a second scan, over batches, around it is one where the frozen
# weights do not change from one step to the next. Differentiated, that scan moves what depends on them alone out of its
# loop, out of the checkpointed layers too: a loop before it unpacks all layers into one float32 array, which is kept for
# the whole forward pass. The backward pass does not read it: it unpacks each layer again, as jax.checkpoint asks for.
#
# Seen, the temporary memory of the compiled program over the size of all unpacked weights:
#     value of the scan over batches                     0.04
#     gradient of one batch                              0.11
#     gradient of the scan over batches                  1.30
#     gradient of it, its steps under jax.checkpoint     0.12
#     a scan over batches that adds up their gradients   0.12
#
# Whoever trains adapters over a quantized base with such a loss meets it: the base takes the memory that it has in full
# precision. The last two lines avoid it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(for p in python3.13 python3.12 python3; do "$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
    2>/dev/null && echo "$p" && break; done) || { echo "JAX 0.12 needs Python 3.12 or newer."; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

LAYERS, WIDTH, ROWS, BATCHES = 32, 64, 4, 3


@jax.checkpoint
def layer(x, weights):
    packed, scale, trained = weights
    return jnp.tanh(x @ (packed * scale) + x * trained), None


def loss(trained, x, packed, scale):
    return jax.lax.scan(layer, x, (packed, scale, trained))[0].sum()


def over_batches(trained, batches, packed, scale, around=lambda step: step):
    def step(total, x):
        return total + loss(trained, x, packed, scale), None

    return jax.lax.scan(around(step), 0.0, batches)[0]


def sum_of_gradients(trained, batches, packed, scale):
    def step(total, x):
        return total + jax.grad(loss)(trained, x, packed, scale), None

    return jax.lax.scan(step, jnp.zeros_like(trained), batches)[0]


shape = jax.ShapeDtypeStruct
trained, batches = shape((LAYERS, WIDTH), "f4"), shape((BATCHES, ROWS, WIDTH), "f4")
packed, scale = shape((LAYERS, WIDTH, WIDTH), "i1"), shape((LAYERS, 1, WIDTH), "f4")
unpacked = f"f32[{LAYERS},{WIDTH},{WIDTH}]"


def measured(f, x):
    traced = jax.jit(f).trace(trained, x, packed, scale)
    memory = traced.lower().compile().memory_analysis().temp_size_in_bytes
    return memory / (LAYERS * WIDTH * WIDTH * 4), unpacked in str(traced.jaxpr)


found = {
    "value of the scan over batches": measured(over_batches, batches),
    "gradient of one batch": measured(jax.grad(loss), shape((ROWS, WIDTH), "f4")),
    "gradient of the scan over batches": measured(jax.grad(over_batches), batches),
    "gradient of it, its steps under jax.checkpoint": measured(
        jax.grad(lambda *args: over_batches(*args, around=jax.checkpoint)), batches
    ),
    "a scan over batches that adds up their gradients": measured(sum_of_gradients, batches),
}
for name, (memory, _) in found.items():
    print(f"{name:50s} {memory:.2f}")
assert [memory > 1 for memory, _ in found.values()] == [False, False, True, False, False], "the behaviour has changed"
assert all(holds == (memory > 0.2) for memory, holds in found.values()), "and it is JAX, not XLA, that moves it"
print("The gradient of a scan over batches still unpacks all layers.")
PYTHON
