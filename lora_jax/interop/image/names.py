"""Names of tensors in files of adapters for image models: whose component, which module, which array.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight     kohya's sd-scripts, LyCORIS: dots are underscores
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight             diffusers
    diffusion_model.input_blocks.1.1.proj_in.lora_up.weight           ComfyUI

Names with underscores are told by the names of the model's own modules: each of these is written in all known ways.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.interop.image.spellings import Spelling, spellings

DENOISERS = ("unet", "transformer")  # one model of a pipeline is either, and many files say one for the other
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")

# What names begin with, and the component that these are of. None is for names that say none, and for the model that
# removes the noise.
_UNDERSCORED = {
    "lora_unet_": None,
    "lora_transformer_": None,
    "lycoris_": None,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_DOTTED = {
    "unet.": None,
    "transformer.": None,
    "diffusion_model.": None,
    "model.diffusion_model.": None,
    "base_model.model.": None,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
_BEGINNINGS = sorted({**_UNDERSCORED, **_DOTTED}.items(), key=lambda pair: len(pair[0]), reverse=True)

# What names of tensors end with, and the array that each is. The arrays have LyCORIS' names.
_LORA = ("lora_{}.weight", "lora.{}.weight", "lora_linear_layer.{}.weight")
_PEFT = ("lora_{}.weight", "lora_{}.default.weight", "lora_{}")
_ENDINGS = {
    **{form.format(way): way for form in _LORA for way in ("down", "up", "mid")},
    **{form.format(letter): way for form in _PEFT for letter, way in (("A", "down"), ("B", "up"))},
    **{f"lora_magnitude_vector{more}": "magnitude" for more in ("", ".weight", ".default.weight")},
    **{name: name for name in ("alpha", "dora_scale", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_t2")},
    **{f"{kind}_w{i}_{x}": f"{kind}_w{i}_{x}" for kind in ("hada", "lokr") for i in (1, 2) for x in "ab"},
}
_MOST_DOTS = 2  # in an ending
_OF_PROCESSORS = re.compile(
    r"(.+?)\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight"
)  # of old attention modules
_WHOLE = "what was trained whole, without factors: merge it where it was trained"
_BIAS = "a bias of factors, which this version has no place for: merge it where it was trained"
_REFUSED = {  # other endings, and what they are of
    r"oft_\w+|rescale": "OFT, a rotation of W: merge it where it was trained",
    r"boft_\w+": "BOFT, a rotation of W: merge it where it was trained",
    r"[ab][12]\.weight": "GLoRA, whose change is a product of W: merge it where it was trained",
    r"on_input": "IA3, which this version reads from folders of PEFT alone",
    r"diff|diff_b|w_norm|b_norm|set_weight": _WHOLE,
    r"reshape_weight": "a module with more inputs than the model's: merge it where it was trained",
    r"lokr_t1": "a Tucker form of LoKr's first factor, which no reader has",
    r"bias|lora_(B|up)(\.default)?\.bias": _BIAS,
}


class TensorName(NamedTuple):
    """What the name of a tensor says."""

    component: str | None  # None stands for the model that removes the noise
    module: str
    is_underscored: bool  # whether dots of the module's name became underscores
    array: str


def parse(name: str) -> TensorName:
    """Return what the name of a tensor says.

    Raises:
        LoraError: it is of an adapter that has no place here, or of none; the message lacks the file's name.
    """
    module, array = _split(name)
    for beginning, component in _BEGINNINGS:
        if module.startswith(beginning) and len(module) > len(beginning):
            rest, is_underscored = module.removeprefix(beginning), beginning in _UNDERSCORED
            if is_underscored and "." in rest:
                raise LoraError(f"holds {short(name)}, a name of sd-scripts, in which a module has no dots.")
            return TensorName(component, rest, is_underscored, array)
    return TensorName(None, module, False, array)


def _split(name: str) -> tuple[str, str]:
    """Return the module and the array of a name."""
    if (old := _OF_PROCESSORS.fullmatch(name)) is not None:
        letter = old[2]
        if old[1].endswith("self_attn"):  # of a text encoder
            return f"{old[1]}.{letter}_proj", old[3]
        return f"{old[1]}.{'to_out.0' if letter == 'out' else f'to_{letter}'}", old[3]
    parts = name.split(".")
    for dots in range(_MOST_DOTS, -1, -1):
        module, ending = ".".join(parts[: -dots - 1]), ".".join(parts[-dots - 1 :])
        if module and ending in _ENDINGS:
            return module.replace(".processor.", "."), _ENDINGS[ending]
    for dots in range(_MOST_DOTS, -1, -1):
        for pattern, what in _REFUSED.items():
            if re.fullmatch(pattern, ".".join(parts[-dots - 1 :])):
                raise LoraError(f"holds {short(name)}, which is of {what}.")
    raise LoraError(f"holds {short(name)}, which is no tensor of LoRA, LoHa or LoKr.")


class Target(NamedTuple):
    """The module that a name is of, or one of several whose outputs are joined there."""

    module: str
    part: int = 0
    parts: int = 1


class ModuleNames:
    """The names of a model's modules, and all other ways in which files write them.

    Args:
        modules: their names, such as "down_blocks.0.attentions.0.proj_in".
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = dict.fromkeys(modules)
        self._underscored: dict[str, dict[Target, None]] = {}
        for module in self._modules:
            self._add(module, Spelling(module))
        for module, spelling in spellings(self._modules):
            self._add(module, spelling)

    def _add(self, module: str, spelling: Spelling) -> None:
        found = self._underscored.setdefault(spelling.name.replace(".", "_"), {})
        found[Target(module, spelling.part, spelling.parts)] = None

    def targets(self, name: TensorName) -> list[Target]:
        """Return the modules that a name is of, several where they are joined.

        Raises:
            LoraError: there is none, or it may be two; the message lacks the file's name.
        """
        if not name.is_underscored and name.module in self._modules:
            return [Target(name.module)]
        found = [*self._underscored.get(name.module.replace(".", "_"), ())]
        if not found:
            own = nearest(name.module, self._modules, n=3)
            raise LoraError(
                f"is for {short(name.module)}, which no module is called; the nearest are "
                f"{', '.join(map(repr, own)) or 'none'}. It is for another model, or the key map lacks it."
            )
        found = sorted(found, key=lambda target: (target.part, target.module))
        modules = ", ".join(short(target.module) for target in found[:4])
        if len({target.part: None for target in found}) < len(found):
            raise LoraError(f"is for {short(name.module)}, which may be each of {modules}: rename one of them.")
        if len(found) < found[0].parts:
            parts = f"{found[0].parts} modules, of which the model has {modules} alone"
            raise LoraError(f"is for {short(name.module)}, which joins {parts}.")
        return found
