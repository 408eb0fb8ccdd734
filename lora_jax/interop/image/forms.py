"""What the tensors of one module are in files for image models, by their names and shapes.

    LoRA    up @ down; of a convolution down [r, in, *window] and up [out, r, 1, 1]
            with a core (Tucker): mid [r, r, *window] between down [r, in, 1, 1] and up
    DoRA    the same with the lengths of the outputs: dora_scale [out, 1, ...] of LyCORIS, or a magnitude of HF PEFT
    LoHa    (w1_a @ w1_b) * (w2_a @ w2_b); with cores t [r, r, *window], w_a [r, out] and w_b [r, in]
    LoKr    w1 (x) w2, each whole or w_a @ w_b; w2 of a convolution [out, in, *window], also with a core

The names of arrays are those of LyCORIS. Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation", arXiv 2309.14859.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lora_jax.core.errors import LoraError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_LORA = ("down", "up", "mid", "dora_scale", "magnitude")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class Form(NamedTuple):
    """What the tensors of a module are."""

    format: str  # the format of ours that has a place for them, once cores are multiplied in
    rank: int | None  # that alpha is divided by; None where both factors of a LoKr are whole, and it has no scale


def form_of(shapes: Shapes, window: Shape | None) -> Form:
    """Return what a module's tensors are.

    Args:
        shapes: of its tensors but alpha.
        window: of the convolution that it is, empty for linear layers, and None where that is not known.

    Raises:
        LoraError: tensors are missing, of two kinds, or of shapes that do not fit one another; the message lacks the
            names of the file and of the module.
    """
    if not shapes:
        raise LoraError("has an alpha alone, and no factors")
    if any(0 in shape for shape in shapes.values()):
        raise LoraError(f"has {listed(shapes)}, of which some have no numbers")
    for own, form in ((_LORA, _lora), (_LOHA, _loha)):
        if all(name in own for name in shapes):
            return form(shapes)
    if all(name in _LOKR for name in shapes):
        return _lokr(shapes, window)
    lengths = [name for name in ("dora_scale", "magnitude") if name in shapes and "down" not in shapes]
    hint = ", and lengths of outputs are read beside LoRA alone: merge it where it was trained" if lengths else ""
    raise LoraError(f"has {listed(shapes)}, which are of no one kind{hint}")


def listed(shapes: Shapes) -> str:
    """Return names and shapes for a message."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _lora(shapes: Shapes) -> Form:
    _check_there(shapes, ("down", "up"))
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    fits = len(down) >= 2 and len(up) >= 2 and math.prod(up[2:]) == 1
    if mid is None:
        fits = fits and up[1] == down[0]
    else:
        fits = fits and math.prod(down[2:]) == 1 and mid[:2] == (up[1], down[0]) and len(mid) > 2
    _check_fits(shapes, fits)
    if "dora_scale" in shapes and "magnitude" in shapes:
        raise LoraError(f"has {listed(shapes)}, lengths of two kinds")
    if (lengths := shapes.get("dora_scale")) is not None and lengths[:1] == (1,) and up[0] != 1:
        raise LoraError(
            f"has dora_scale {list(lengths)}, lengths of its inputs (wd_on_out=False), and DoRA has those of its "
            f"{up[0]} outputs: merge it where it was trained"
        )
    lengths = shapes.get("magnitude", lengths)
    _check_fits(shapes, lengths is None or math.prod(lengths) == up[0])
    return Form("LORA" if lengths is None else "DORA", down[0])


def _loha(shapes: Shapes) -> Form:
    cores = ("hada_t1", "hada_t2") if "hada_t1" in shapes or "hada_t2" in shapes else ()
    _check_there(shapes, (*_LOHA[:4], *cores))
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    fits = a == shapes["hada_w2_a"] and b == shapes["hada_w2_b"] and len(a) == len(b) == 2
    if cores:
        t = shapes["hada_t1"]
        fits = fits and t == shapes["hada_t2"] and len(t) > 2 and t[:2] == (a[0], b[0])
    else:
        fits = fits and a[1] == b[0]
    _check_fits(shapes, fits)
    return Form("LOHA", b[0])


def _lokr(shapes: Shapes, window: Shape | None) -> Form:
    for i in "12":
        pair = (f"lokr_w{i}_a", f"lokr_w{i}_b")
        if (whole := f"lokr_w{i}") not in shapes:
            _check_there(shapes, pair)
        elif any(name in shapes for name in pair):
            raise LoraError(f"has {listed(shapes)}, and {whole} is there twice, whole and in two factors")
    core = shapes.get("lokr_t2")
    fits = core is None or ("lokr_w2_a" in shapes and len(core) > 2)
    fits = fits and len(shapes.get("lokr_w1", (1, 1))) == 2 and len(shapes.get("lokr_w2", (1, 1))) >= 2
    for i in "12":
        a, b = (shapes.get(f"lokr_w{i}_{x}", (1, 1)) for x in "ab")
        fits = fits and len(a) == len(b) == 2
        fits = fits and (a[1] == b[0] if core is None or i == "1" else core[:2] == (a[0], b[0]))
    _check_fits(shapes, fits)
    rank = next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)
    is_linear = not window and core is None and len(shapes.get("lokr_w2", (1, 1))) == 2
    return Form("LOKR" if is_linear else "LORA", rank)


def _check_there(shapes: Shapes, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in shapes]:
        raise LoraError(f"has only {listed(shapes)}, and not {', '.join(missing)}")


def _check_fits(shapes: Shapes, fits: bool) -> None:
    if not fits:
        raise LoraError(f"has {listed(shapes)}, which do not fit one another")
