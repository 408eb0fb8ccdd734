"""Policies of `jax.checkpoint`: what of a layer is kept for the backward pass, and where."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.errors import LoraError
from lora_jax.core.packed import HOST


def thin(prim: Any, *args: Any, **params: Any) -> Any:
    """Keep x @ A of each adapted product, T x r numbers, and compute all else again: a policy for `jax.checkpoint`.

    It saves the products with A in the backward pass of a layer that is computed twice. JAX calls it with an operation
    of the program, its operands and its parameters.

    Args:
        prim: the operation.
        args: its operands.
        params: its parameters.

    Returns:
        Whether the results are kept, in the form that JAX wants.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=lora.policies.thin)
    ...     return jax.lax.scan(body, x, params["layers"])[0].sum()
    >>> params, x = {"layers": jnp.ones((3, 4, 4))}, jnp.ones((2, 4))
    >>> adapters = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={".*": lora.Lora(rank=2)}))
    >>> gradient = jax.grad(lambda adapters: lora.lora_apply(model)(params, adapters, x))(adapters)
    >>> gradient["layers"].a.shape
    (3, 4, 2)
    """
    return _only_h(prim, *args, **params)


_only_h = jax.checkpoint_policies.save_only_these_names("lora_h")


def offload(*names: str) -> Callable[..., Any]:
    """Return a policy that keeps what has these names in the memory of the host, and computes all else again.

    A scan over n layers then keeps the inputs of one layer on the device, in the place of all n. Each is copied to the
    host while its layer is computed, and back while the next one's backward pass runs, as far as the compiler can.

    Args:
        names: as the body of a layer gives them, first of all to its input: x = checkpoint_name(x, "layer_input"), of
            `jax.ad_checkpoint`. Without any, "layer_input".

    Returns:
        A policy for `jax.checkpoint(layer, policy=..., prevent_cse=False)` in a scan over layers. Under `jax.jit`, on
        devices whose hosts have memory of the kind "pinned_host".

    Raises:
        LoraError: names that are no strings.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> from jax.ad_checkpoint import checkpoint_name
    >>> def layer(x, w):
    ...     x = checkpoint_name(x, "layer_input")
    ...     return jnp.tanh(x @ w), None
    >>> def model(params, x):
    ...     body = jax.checkpoint(layer, policy=lora.policies.offload("layer_input"), prevent_cse=False)
    ...     return jax.lax.scan(body, x, params["layers"])[0].sum()
    >>> gradient = jax.jit(jax.grad(lora.lora_apply(model)))
    >>> gradient({"layers": jnp.ones((3, 4, 4))}, {}, jnp.ones((1, 4)))["layers"].shape
    (3, 4, 4)
    """
    if not all(isinstance(name, str) for name in names):
        raise LoraError(f"offload{names!r}: names are strings, one after the other, such as offload('layer_input').")
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*(names or ("layer_input",))],
        offload_src="device",
        offload_dst=HOST,
    )
