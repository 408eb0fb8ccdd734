"""The table of all formats. A further kind of adapter is one more entry."""

from lora_jax.core.errors import short
from lora_jax.interop.peft.formats.adalora import AdaLoraFormat
from lora_jax.interop.peft.formats.bdlora import BdLoraFormat
from lora_jax.interop.peft.formats.delora import DeloraFormat
from lora_jax.interop.peft.formats.dora import DoraFormat
from lora_jax.interop.peft.formats.format import Format
from lora_jax.interop.peft.formats.gralora import GraloraFormat
from lora_jax.interop.peft.formats.ia3 import Ia3Format
from lora_jax.interop.peft.formats.kasa import KasaFormat
from lora_jax.interop.peft.formats.loha import LohaFormat
from lora_jax.interop.peft.formats.lokr import LokrFormat
from lora_jax.interop.peft.formats.lora import LoraFormat
from lora_jax.interop.peft.formats.miss import MissFormat
from lora_jax.interop.peft.formats.refused import REFUSED
from lora_jax.interop.peft.formats.vera import VeraFormat
from lora_jax.interop.peft.options import Options

LORA = LoraFormat()

# Of several that a config could be of, the first one is meant.
_KINDS: tuple[Format, ...] = (
    *(BdLoraFormat(), KasaFormat(), LORA, DoraFormat(), AdaLoraFormat(), LohaFormat(), LokrFormat(), VeraFormat()),
    *(Ia3Format(), MissFormat(), GraloraFormat(), DeloraFormat()),
)
FORMATS: dict[str, Format] = {format.name: format for format in _KINDS}


def format_of(options: Options) -> Format:
    """Return the format that a config is of.

    Raises:
        LoraError: there is none for it.
    """
    kind = options.get("peft_type")
    for format in FORMATS.values():
        if format.peft_type == kind and format.is_meant_by(options):
            return format
    if isinstance(kind, str) and kind in REFUSED:
        raise options.error(f"peft_type is {short(kind)}, which is not read: {REFUSED[kind]}.")
    known = dict.fromkeys(format.peft_type for format in FORMATS.values())
    raise options.error(f"peft_type is {short(kind)}; this version of lora_jax reads {', '.join(known)}.")
