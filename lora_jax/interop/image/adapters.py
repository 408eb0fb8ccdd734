"""Adapters of image models, to and from the files of kohya's sd-scripts, LyCORIS, diffusers and ComfyUI.

    adapters = lora.load_image("cats.safetensors", params, key_map)                   # any of these files
    lora.save_kohya("cats.safetensors", adapters, key_map)                            # for sd-scripts, ComfyUI, Forge
    lora.save_diffusers("cats/pytorch_lora_weights.safetensors", adapters, key_map)   # for diffusers, ComfyUI

A file may hold adapters of several models, the components of a pipeline; each is read by its name. How names and
tensors look is in `names` and `forms`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_is
from lora_jax.core.errors import LoraError
from lora_jax.interop.image.forms import Shape
from lora_jax.interop.image.metadata import metadata_of, shown
from lora_jax.interop.image.names import DENOISERS
from lora_jax.interop.image.reader import check_component, file_of, groups_of, read_image
from lora_jax.interop.image.writers import DIFFUSERS_FORMATS, KOHYA_FORMATS, write_diffusers, write_kohya
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.module_adapters import ModuleAdapters, for_parameters, module_adapters
from lora_jax.interop.peft.parameters import shapes_of

Beside = Mapping[str, tuple[Mapping[str, Adapter], KeyMap]]


class ImageFile(NamedTuple):
    """What a file for image models holds."""

    components: dict[str, int]  # how many modules have adapters, by "unet", "text_encoder", ...
    metadata: dict[str, str]  # `ss_network_dim`, `modelspec.title` and the like, as the file says them


def inspect_image(path: str | Path) -> ImageFile:
    """Return which components of a pipeline a file has adapters for, and what its header says of them.

    Args:
        path: the file, or a folder with the `pytorch_lora_weights.safetensors` of diffusers.

    Returns:
        An `ImageFile`: `components`, `{name: how many modules have adapters}`, and `metadata` as the header has it.

    Raises:
        LoraError: it cannot be read, or holds what is no adapter of a kind that this version reads.

    >>> import jax.numpy as jnp, tempfile, lora_jax as lora
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("q/kernel", "mid_block.attn.to_q"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"q/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_kohya(f"{folder}/cats.safetensors", adapters, key_map)
    ...     lora.inspect_image(f"{folder}/cats.safetensors").components
    {'unet': 1}
    """
    path = file_of(path)
    components = {component or DENOISERS[0]: len(groups) for component, groups in groups_of(path).items()}
    return ImageFile(components, shown(metadata_of(path)))


def load_image(
    path: str | Path,
    plan_or_params: Any,
    key_map: KeyMap,
    *,
    component: str = "unet",
    dtype: Any = jnp.float32,
) -> dict[str, Adapter]:
    """Read the adapters of one component of an image model, from a file of sd-scripts, LyCORIS, diffusers or ComfyUI.

    Names in which dots became underscores are told by the key map's modules. A UNet of diffusers is met by the names of
    Stability's code too (`input_blocks`), and a Flux transformer by those of its authors (`double_blocks`), where
    query, key and value are one module, of which each gets its rows. LoRA, DoRA, LoHa and LoKr come back as these
    kinds; a file of several kinds, and LoKr of a convolution, as the LoRA that they are. Cores of Tucker forms are
    multiplied into the factor beside them, in fp32.

    Args:
        path: the file, or a folder with the `pytorch_lora_weights.safetensors` of diffusers.
        plan_or_params: a plan, for adapters of just the planned weights, with the plan's axes; or parameters (or their
            shapes), with the axes of the key map.
        key_map: from parameters to modules, such as "down_blocks.0.attentions.0.proj_in".
        component: whose adapters: "unet" or "transformer", "text_encoder", "text_encoder_2" or "text_encoder_3";
            `inspect_image` says which a file has. The others are not read.
        dtype: of the adapters. fp32 by default; None keeps the file's.

    Returns:
        `{path: adapter}`. The scale is alpha / r; 1 where the file has no alpha, or one of 0, and for LoKr of two whole
        factors, as all readers have it.

    Raises:
        LoraError: there is no such file, or it is damaged; it has no adapters of this component; a name is of no
            module, or may be of two; tensors are of a kind that this version does not have (OFT, GLoRA, IA3, weights
            that were trained whole, DoRA with lengths of inputs), lack their partners, or do not fit the parameters.
            Each is named, and nothing is returned.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("mid/{x}/kernel", "mid_block.attn_{x}.to_q"))
    >>> params = {"mid": {"0": {"kernel": jnp.ones((4, 3))}}}
    >>> plan = lora.plan(lambda params, x: x @ params["mid"]["0"]["kernel"], params, jnp.ones((2, 4)),
    ...                  rules={".*": lora.Lora(rank=2, alpha=8)})
    >>> adapters = lora.init(jax.random.key(0), params, plan)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_kohya(f"{folder}/cats.safetensors", adapters, key_map)
    ...     print(inspect_image(f"{folder}/cats.safetensors").components)
    ...     again = load_image(f"{folder}/cats.safetensors", params, key_map)
    {'unet': 1}
    >>> print(again["mid/0/kernel"].scale)
    4.0
    """
    call = "load_image(path, plan_or_params, key_map)"
    check_is(call, "key_map", key_map, KeyMap, A_KEY_MAP)
    check_component(component)
    if dtype is not None:
        check_dtype("load_image", dtype)
    path = file_of(path)
    found = read_image(path, modules_of(plan_or_params, key_map), component=component)
    return for_parameters(found, plan_or_params, key_map, path, dtype=dtype)


def modules_of(plan_or_params: Any, key_map: KeyMap) -> dict[str, Shape]:
    """Return the modules that parameters are, with the windows of convolutions."""
    matches = key_map.match(shapes_of(plan_or_params), strict=False).values()
    of_weights = [match for match in matches if match.entry.kind != "array"]
    return {name: match.sizes_of("window") for match in of_weights for name in match.names.values()}


def save_kohya(
    path: str | Path,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    component: str = "unet",
    beside: Beside | None = None,
    params: Any = None,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    r"""Write adapters as kohya's sd-scripts and LyCORIS do, for these, ComfyUI, Forge, InvokeAI and diffusers.

    LoRA, DoRA, LoHa and LoKr are written as they are; sums and other kinds as the LoRA that they are. LyCORIS, ComfyUI
    and Forge read all of these. diffusers reads LoRA, and of DoRA only the factors: for it there is `save_diffusers`.

    Args:
        path: of the file.
        adapters: `{path: adapter}`.
        key_map: from parameters to modules. Dots in their names become underscores. For SDXL, sd-scripts reads the
            names of Stability's code, for Flux those of its authors: give a key map with these; others take both.
        component: which model the adapters are of.
        beside: adapters and key maps of other components in the same file, as `{"text_encoder": (adapters, key_map)}`.
        params: parameters, only where a module holds several of them and not all have adapters.
        dtype: of the factors, such as `jnp.float16`; None keeps theirs.
        metadata: what the header says beside, such as `{"ss_base_model_version": "sdxl_base_v1-0"}`.

    Raises:
        LoraError: arguments are in another order; an adapter is of a kind that has no place in the file; two names of
            modules become one; a number is beyond the dtype; the file cannot be written. Nothing is written then.

    >>> import jax.numpy as jnp, tempfile, lora_jax as lora
    >>> from safetensors.numpy import load_file
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("q/kernel", "mid_block.attn.to_q"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"q/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_kohya(f"{folder}/cats.safetensors", adapters, key_map)
    ...     print(*sorted(load_file(f"{folder}/cats.safetensors")), sep="\n")
    lora_unet_mid_block_attn_to_q.alpha
    lora_unet_mid_block_attn_to_q.lora_down.weight
    lora_unet_mid_block_attn_to_q.lora_up.weight
    """
    call = "save_kohya(path, adapters, key_map)"
    found = _components(call, adapters, key_map, component, beside, params, KOHYA_FORMATS)
    write_kohya(Path(path), found, dtype=dtype, metadata=metadata)


def save_diffusers(
    path: str | Path,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    component: str = "unet",
    beside: Beside | None = None,
    params: Any = None,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters as diffusers' `save_lora_weights` does, for diffusers, ComfyUI and PEFT's injection.

    LoRA, DoRA and LoKr are written as they are, LoHa and other kinds as the LoRA that they are. Scales are multiplied
    into B, or W1 of LoKr, because not all readers read them: exact where they are powers of two, else rounded once.

    Arguments and errors are those of `save_kohya`. The name that diffusers expects is
    `pytorch_lora_weights.safetensors`, and the modules' names are those of its models.

    Raises:
        LoraError: as of `save_kohya`.

    >>> import jax.numpy as jnp, tempfile, lora_jax as lora
    >>> from safetensors.numpy import load_file
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("q/kernel", "mid_block.attn.to_q"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"q/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_diffusers(f"{folder}/pytorch_lora_weights.safetensors", adapters, key_map)
    ...     sorted(load_file(f"{folder}/pytorch_lora_weights.safetensors"))
    ['unet.mid_block.attn.to_q.lora_A.weight', 'unet.mid_block.attn.to_q.lora_B.weight']
    """
    call = "save_diffusers(path, adapters, key_map)"
    found = _components(call, adapters, key_map, component, beside, params, DIFFUSERS_FORMATS)
    write_diffusers(Path(path), found, dtype=dtype, metadata=metadata)


def _components(
    call: str,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    component: str,
    beside: Beside | None,
    params: Any,
    formats: tuple[str, ...],
) -> dict[str, ModuleAdapters]:
    """Return the adapters of all components by torch's modules."""
    check_component(component)
    found = {component: module_adapters(call, adapters, key_map, params=params, formats=formats)}
    for name, pair in (beside or {}).items():
        check_component(name)
        if name in found or {name, component} == {*DENOISERS}:
            raise LoraError(f"{call}: beside= has {name!r}, and component={component!r} is of the same model.")
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise LoraError(f"{call}: beside[{name!r}] is a {type(pair).__name__}, expected (adapters, key_map).")
        found[name] = module_adapters(call, *pair, formats=formats)
    return found
