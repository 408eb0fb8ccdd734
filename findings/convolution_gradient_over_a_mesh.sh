#!/usr/bin/env bash
# The gradient of a convolution's kernel is wrong, without an error, on a mesh with an axis that nothing is split over.
#
# Versions: jax and jaxlib 0.10.2, on the CPU backend with eight simulated devices; 0.12.0 does the same.
#
# A mesh of 4 x 2 devices, "data" and "model". The input of a convolution is split over "data" along the axis that the
# window moves along, as a sequence or the rows of an image are; nothing is split over "model". The value is right, and
# the gradient of the input too. The gradient of the kernel is twice the right one: it is summed over all eight devices,
# though the two along "model" hold the same. On a mesh of four devices along "data" alone it is right.
#
# Seen:
#     one device  [53.375, 59.9375, 66.5, 73.0625]
#     4           [53.375, 59.9375, 66.5, 73.0625]
#     4 x 2       [106.75, 119.875, 133.0, 146.125]
#
# Whoever trains convolutions with adapters on such a mesh meets it, since their factors are kernels as well. Splitting
# the batch and not the positions avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2

JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - <<'PYTHON'
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

x, kernel = jnp.arange(16.0).reshape(1, 8, 2) / 8, jnp.ones((2, 2, 1))


def loss(kernel, x):
    y = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.sum(y**2)


def over(shape, names):
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "data")))
    value, (gradient, of_input) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(kernel, placed)
    assert value == loss(kernel, x), "the value is right"
    assert (of_input == jax.grad(loss, argnums=1)(kernel, x)).all(), "the gradient of the input is right"
    return gradient.ravel().tolist()


right = jax.grad(loss)(kernel, x).ravel().tolist()
along_one, along_two = over((4,), ("data",)), over((4, 2), ("data", "model"))
print("one device ", right)
print("4          ", along_one)
print("4 x 2      ", along_two)
assert along_one == right
assert along_two == [2 * entry for entry in right], "the behaviour has changed"
print("The gradient of the kernel is still doubled.")
PYTHON
