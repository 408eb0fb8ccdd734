"""Models of text and images around a text model that is one of ours: where its config and its tensors are.

Gemma 3 (4B, 12B, 27B) and Mistral Small 3.1 are published so. The text model is read; what sees images is left unread,
by its name. Texts alone have the logits of the whole model.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import KeyMap
from lora_jax.recipes.config_fields import Fields


class Wrapper(NamedTuple):
    """What models of one `model_type` have around the text model.

    Args:
        architecture: the class of transformers.
        text: `model_type` of the text model.
        about_images: fields of config.json that change nothing for texts.
    """

    architecture: str
    text: str
    about_images: tuple[str, ...]


_ABOUT_IMAGES = ("vision_config", "image_token_index", "image_token_id", "processor_class")
WRAPPERS = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        (
            *_ABOUT_IMAGES,
            *("boi_token_index", "boi_token_id", "eoi_token_index", "eoi_token_id", "mm_tokens_per_image"),
        ),
    ),
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration",
        "mistral",
        (
            *_ABOUT_IMAGES,
            *("multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer"),
        ),
    ),
}
UNREAD = ("vision_tower", "multi_modal_projector")  # modules whose tensors texts do not need
_OF_THE_WHOLE = ("eos_token_id", "tie_word_embeddings")  # what counts is what the outer config says, if it says it
_PACKING = ("quantization_config", "compression_config")


def text_facts(facts: Mapping[str, Any], where: str, ignore: Iterable[str]) -> dict[str, Any]:
    """Return the config of the text model inside of another one's.

    Raises:
        LoraError: there is none, or it is of another type than this kind of model has; a field that asks for something
            that is not supported, or that is not known.
    """
    wrapper = WRAPPERS[facts["model_type"]]
    fields = Fields(facts, where)
    text = fields.get("text_config")
    found = text.get("model_type") if isinstance(text, dict) else text
    if found != wrapper.text:
        fields.refuse("text_config", found, f"the config of a model of type {wrapper.text!r}")
    if (architectures := facts.get("architectures")) and wrapper.architecture not in architectures:
        fields.refuse("architectures", architectures, f"[{wrapper.architecture!r}]: no other head is read")
    if text.get("final_logit_softcapping") is not None:
        raise LoraError(
            f"{where}: final_logit_softcapping is {short(text['final_logit_softcapping'])}, and {wrapper.architecture} "
            "caps no logits, expected null."
        )
    for name in (*wrapper.about_images, *_OF_THE_WHOLE, *_PACKING):
        fields.get(name, None)
    fields.check_all_read(ignore)
    own = {name: value for name, value in text.items() if name != "architectures"}  # the outer one counts
    given = (*_OF_THE_WHOLE, *_PACKING)
    return own | {name: facts[name] for name in given if facts.get(name) is not None}


class Names(NamedTuple):
    """What the names of a text model's tensors begin with.

    Args:
        body: of all but the head, in the place of "model.".
        head: in the place of "lm_head".
    """

    body: str = "model."
    head: str = "lm_head"

    def of(self, key_map: KeyMap) -> KeyMap:
        """Return the key map of a text model with these names."""
        return key_map.renamed("model.", self.body).renamed("lm_head", self.head)


_OF_MODULES = Names("model.language_model.")  # in transformers since 4.52, and so in PEFT
_OF_FILES = (Names("language_model.model.", "language_model.lm_head"), _OF_MODULES)  # published; saved by some


def names_of_modules(wrapper: str) -> Names:
    """Return the names of modules in transformers, of the text model inside of this one; "" for one by itself."""
    return _OF_MODULES if wrapper else Names()


def names_in_files(wrapper: str, tensors: Iterable[str]) -> Names:
    """Return the names that files have which hold these tensors."""
    if not wrapper:
        return Names()
    found = [names for names in _OF_FILES if any(name.startswith(names.body) for name in tensors)]
    return found[0] if found else _OF_FILES[0]


def is_unread(wrapper: str, tensor: str) -> bool:
    """Return whether a tensor is of what sees images.

    >>> is_unread("gemma3", "vision_tower.embeddings.weight"), is_unread("", "vision_tower.embeddings.weight")
    (True, False)
    """
    return bool(wrapper) and tensor.removeprefix("model.").partition(".")[0] in UNREAD
