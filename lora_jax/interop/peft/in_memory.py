"""Adapters as the tensors of HF PEFT, in memory: for servers that take new adapters without a restart."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lora_jax.adapters.arguments import check_dtype
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_adapter_dict, check_is
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.peft.dtypes import in_fp32
from lora_jax.interop.peft.profiles import FOR_SERVERS
from lora_jax.interop.peft.save import contents

CALL = "peft_tensors(adapters, key_map)"


def peft_tensors(
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    params: Any = None,
    profile: Literal["peft", "vllm", "vllm-by-expert", "sglang"] = "vllm",
    dtype: Any = None,
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Return the tensors and the config that `save_peft` would write, without a folder.

    They are what the hot-swap calls of servers take: a dict of tensors by PEFT's names, and the config as a dict, such
    as `load_lora_adapter_from_tensors` of SGLang, and what a trainer of vLLM hands to its workers.

    Args:
        adapters: `{path: adapter}`; one of a bank is `jax.tree.map(lambda leaf: leaf[slot], bank)`.
        key_map: from parameters to modules.
        params: parameters, only where a module holds several of them and not all have adapters.
        profile: "vllm" has one rank and a scale of 1 for all, which every server reads; "peft" keeps those of each.
            They differ in experts: see `save_peft`.
        dtype: of the tensors, such as jnp.bfloat16; None keeps those of the arrays.

    Returns:
        `{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [r, in], ...}`, numpy arrays on the host,
        and the entries of `adapter_config.json`.

    Raises:
        LoraError: as `save_peft` does; there are no adapters.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> from lora_jax.key_maps import KeyMap, linear
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"q/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)}
    >>> tensors, config = lora.peft_tensors(adapters, KeyMap(linear("q/kernel", "model.q_proj", "in out")))
    >>> {name: tensor.shape for name, tensor in tensors.items()}
    {'base_model.model.model.q_proj.lora_A.weight': (2, 4), 'base_model.model.model.q_proj.lora_B.weight': (3, 2)}
    >>> config["r"], config["lora_alpha"], config["target_modules"]
    (2, 2, ['model.q_proj'])
    """
    check_adapter_dict(CALL, adapters)
    check_is(CALL, "key_map", key_map, KeyMap, A_KEY_MAP)
    if profile not in (known := ("peft", *FOR_SERVERS)):
        raise LoraError(f"profile={profile!r}: expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")
    if not adapters:
        raise LoraError(f"{CALL}: there are no adapters.")
    refuse_spread(dict(adapters))
    if dtype is not None:
        check_dtype("peft_tensors", dtype)
        adapters = in_fp32(dict(adapters))
    about = {"base_model_name_or_path": None, "task_type": None}
    tensors, entries = contents(
        adapters, {}, key_map, params, profile=profile, tied="untie", dtype=dtype, more={}, about=about
    )
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}, entries
