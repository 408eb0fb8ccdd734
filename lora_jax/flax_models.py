"""A Flax model as a pure function of its parameters and of the rest of its state, which is what `lora_apply` takes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.core.argument_checks import check_is, flax_library, refuse
from lora_jax.core.errors import LoraError
from lora_jax.core.no_array import refuse_use
from lora_jax.core.packed import is_packed

Function = Callable[..., tuple[Any, Any]]


def from_linen(model: Any, variables: Mapping[str, Any]) -> tuple[Function, Any, dict[str, Any]]:
    """`fn, params, state` of a Linen module: `fn(params, state, *args, **kwargs) -> (out, state)`.

    `state` holds the variables that are no parameters, such as `batch_stats`; each call gives back what it has made
    of them (drop it in evaluation). Keywords go to `model.apply`: `rngs=`, `method=`, `train=True`. Paths begin below
    `params/`.

    Args:
        model: a `flax.linen.Module`.
        variables: as `model.init` gives them.

    Returns:
        The function, `variables["params"]`, and the other collections, which are the state.

    Raises:
        LoraError: `model` is one of NNX; the variables have no collection `params`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn, lora_jax as lora
    >>> model = nn.Dense(3)
    >>> fn, params, state = lora.from_linen(model, model.init(jax.random.key(0), jnp.ones((1, 4))))
    >>> out, state = fn(params, state, jnp.ones((2, 4)))
    >>> lora.plan(fn, params, state, jnp.ones((2, 4)), rules={"kernel": lora.Lora(rank=1)})["kernel"].axes
    KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    """
    if flax_library(model) == "NNX":
        refuse("from_linen(model, variables)", "model", model, "a Linen module: lora.from_nnx(model) is for NNX")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise LoraError(
            "from_linen takes all variables of a model, {'params': ..., ...} as model.init gives them, "
            f"found {list(variables) if isinstance(variables, Mapping) else type(variables).__name__}."
        )
    state = {name: collection for name, collection in variables.items() if name != "params"}

    def fn(params: Any, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        for node in filter(is_packed, jax.tree.leaves(params, is_leaf=is_packed)):
            refuse_use(node)  # Linen would complain of the shapes of its arrays
        out, updated = model.apply({"params": params, **state}, *args, mutable=list(state), **kwargs)
        return out, dict(updated)

    return fn, variables["params"], state


def from_nnx(model: Any) -> tuple[Function, Any, Any]:
    """`fn, params, state` of an NNX module: `fn(params, state, *args, **kwargs) -> (out, state)`.

    `state` holds all that is no `nnx.Param`: statistics, caches, the counters of random streams; each call gives back
    what it has made of it, and leaves what was passed as it is. Whether the model trains or evaluates is fixed as it
    was given (`model.eval()` before), or a keyword of its call (`train=False`). `method="encode"` calls another method
    than the model itself. After training, `nnx.update(model, lora.merge(params, adapters), state)` puts everything
    back.

    Args:
        model: an `nnx.Module`.

    Returns:
        The function, the `nnx.State` of the parameters, and that of all else.

    Raises:
        LoraError: `model` is no NNX module.

    >>> import jax.numpy as jnp, flax.nnx as nnx, lora_jax as lora
    >>> fn, params, state = lora.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> out, state = fn(params, state, jnp.ones((2, 4)))
    >>> list(lora.plan(fn, params, state, jnp.ones((2, 4)), rules={".*kernel": lora.Lora(rank=1)}))
    ['kernel']
    """
    from flax import nnx  # it takes a while to import

    if flax_library(model) == "Linen":
        refuse("from_nnx(model)", "model", model, "an NNX module: lora.from_linen(model, variables) is for Linen")
    check_is("from_nnx(model)", "model", model, nnx.Module, "an NNX module, such as nnx.Linear(4, 3, rngs=nnx.Rngs(0))")
    graph, *parts = nnx.split(model, nnx.Param, ...)

    def variables_of_their_own(parts: Any) -> Any:
        """Return the same arrays in new variables: a module writes into those that it is made of."""
        return jax.tree.map(lambda array: array, parts)

    params, state = variables_of_their_own(parts)

    def fn(params: Any, state: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> tuple[Any, Any]:
        try:
            model = nnx.merge(graph, *variables_of_their_own((params, state)))
        except ValueError as error:
            raise LoraError(
                "the function of from_nnx is fn(params, state, *args), with the parameters and the state that from_nnx "
                f"returned, or later ones of their structure; found a {type(state).__name__} for the state."
            ) from error
        out = getattr(model, method)(*args, **kwargs)
        return out, nnx.state(model, nnx.Not(nnx.Param))

    return fn, params, state
