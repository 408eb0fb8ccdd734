"""Other names of the modules of image models: those of Stability's and of Black Forest Labs' own code.

Files of adapters name modules as the trainer's model does. A UNet of diffusers is also known by the names of the code
that Stable Diffusion came with (input_blocks, middle_block, output_blocks), and a Flux transformer by those of its
authors (double_blocks, single_blocks), who join query, key and value in one module.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple


class Spelling(NamedTuple):
    """Another name of a module, or of one that has its outputs among others."""

    name: str
    part: int = 0  # which of the modules that are joined there
    parts: int = 1


_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)")
_MID_BLOCK = re.compile(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)")

_FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0": Spelling("img_attn.proj"),
    "attn.to_add_out": Spelling("txt_attn.proj"),
    "ff.net.0.proj": Spelling("img_mlp.0"),
    "ff.net.2": Spelling("img_mlp.2"),
    "ff_context.net.0.proj": Spelling("txt_mlp.0"),
    "ff_context.net.2": Spelling("txt_mlp.2"),
    "norm1.linear": Spelling("img_mod.lin"),
    "norm1_context.linear": Spelling("txt_mod.lin"),
    **{f"attn.to_{x}": Spelling("img_attn.qkv", i, 3) for i, x in enumerate("qkv")},
    **{f"attn.add_{x}_proj": Spelling("txt_attn.qkv", i, 3) for i, x in enumerate("qkv")},
}
_SINGLE = {
    "proj_mlp": Spelling("linear1", 3, 4),
    "proj_out": Spelling("linear2"),
    "norm.linear": Spelling("modulation.lin"),
    **{f"attn.to_{x}": Spelling("linear1", i, 4) for i, x in enumerate("qkv")},
}
_FLUX_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d{1,3})\.(.+)")


def spellings(modules: Iterable[str]) -> Iterator[tuple[str, Spelling]]:
    """Yield `(module, another name of it)` for modules that are named as in diffusers."""
    names = dict.fromkeys(modules)
    resnets = [int(block[4]) for name in names if (block := _BLOCK.fullmatch(name)) and name.startswith("down")]
    layers = max(resnets, default=0) + 1  # in each block on the way down; one more on the way up
    with_attention = {b[2]: None for name in names if (b := _BLOCK.fullmatch(name)) and b[1] + b[3] == "upattentions"}
    is_flux = any(name.startswith("single_transformer_blocks.") or ".add_q_proj" in name for name in names)
    for name in names:
        if (unet := _in_unet(name, layers, with_attention)) is not None:
            yield name, Spelling(unet)
        elif is_flux and (flux := _in_flux(name)) is not None:
            yield name, flux


def _in_unet(name: str, layers: int, with_attention: Mapping[str, None]) -> str | None:
    """Return the name in Stability's UNet: its blocks are numbered through, and resnets and attentions in each."""
    if name in _UNET:
        return _UNET[name]
    if (middle := _MID_BLOCK.fullmatch(name)) is not None:
        return f"{_MIDDLE[middle[1]]}.{_RESNET.get(middle[2], middle[2])}"
    if (block := _BLOCK.fullmatch(name)) is None:
        return None
    way, number, kind, i, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
    each = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{each * (number + 1)}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        return f"output_blocks.{each * number + layers}.{1 + (block[2] in with_attention)}.{rest}"
    within = 0 if kind == "resnets" else 1
    place = f"input_blocks.{each * number + i + 1}" if way == "down" else f"output_blocks.{each * number + i}"
    return f"{place}.{within}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"


def _in_flux(name: str) -> Spelling | None:
    """Return the name in Flux as its authors have it.

    Not the last modulation: its scale and its shift have changed places there.
    """
    if name in _FLUX:
        return Spelling(_FLUX[name])
    if (block := _FLUX_BLOCK.fullmatch(name)) is None:
        return None
    table, beginning = (_SINGLE, "single_blocks") if block[1] else (_DOUBLE, "double_blocks")
    found = table.get(block[3])
    return None if found is None else found._replace(name=f"{beginning}.{block[2]}.{found.name}")
