"""Whether adapters are those of the parameters beside them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import (
    TAKEN_BY_A_STEP,
    TAKEN_BY_DONATION,
    check_adapter_dict,
    check_kept,
    is_taken,
    named_arrays,
)
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import check_registered
from lora_jax.core.paths import is_array, nearest


def check_adapters(adapters: Mapping[str, Adapter], names: list[str], leaves: list[Any]) -> None:
    """Check that every adapter has its weight and fits it.

    Raises:
        LoraError: the adapters are no `{path: adapter}`; a path is not among the parameters, or is no array of floats
            there; shapes differ; an array has been deleted.
    """
    check_adapter_dict("(params, adapters, ...)", adapters)
    weights = dict(zip(names, leaves, strict=True))
    for path, adapter in adapters.items():
        check_registered(adapter)
        if path not in weights:
            near = ", ".join(map(repr, nearest(path, names)))
            raise LoraError(
                f"there is an adapter for {path!r}, but the parameters have no such path; the nearest are {near}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )
        weight = weights[path]
        if not (is_array(weight) and jnp.issubdtype(weight.dtype, jnp.floating)):
            found = weight.dtype if is_array(weight) else type(weight).__name__
            raise LoraError(f"there is an adapter for {path!r}, but that is {found}, expected an array of floats.")
        arrays = jax.tree.leaves(adapter)
        if any(map(is_taken, arrays)):  # which takes no names
            check_kept(named_arrays(path, adapter), TAKEN_BY_A_STEP)
        check_kept(((path, part) for part in jax.tree.leaves(weight)), TAKEN_BY_DONATION)
        dtypes = sorted({str(a.dtype) for a in jax.tree.leaves(adapter.arrays()) if _is_counted(a.dtype)})
        if dtypes:
            raise LoraError(
                f"the adapter for {path!r} holds {', '.join(dtypes)} arrays, expected floats: cast them back with "
                "jax.tree.map(lambda array: array.astype(jnp.float32), adapters)."
            )
        try:
            found, expected = adapter.kernel_shape(), tuple(weight.shape)
        except LoraError as error:
            raise LoraError(f"the adapter for {path!r} {error} lora.init makes one that fits.") from None
        if found != expected:
            raise LoraError(
                f"the adapter for {path!r} fits a weight of shape {list(found)}, "
                f"but the parameter has {list(expected)}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )


def _is_counted(dtype: Any) -> bool:
    return not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jax.dtypes.prng_key))
