"""Where the arrays of a bank are on a mesh: those of one adapter, with the axis of slots before them."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import P
from jax.sharding import NamedSharding

from lora_jax.adapters.slot_form import in_slots
from lora_jax.core.argument_checks import check_adapter_dict
from lora_jax.core.errors import LoraError
from lora_jax.core.partition import check_divisible, full_spec, names_of

CALL = "AdapterBank(like, slots, shardings=..., axis=...)"
MEND = "lora.adapter_shardings(params, plan)"


def bank_places(shardings: Mapping[str, Any], form: Mapping[str, Any], slots: int, axis: str | None) -> dict[str, Any]:
    """Return the sharding of each array of a bank.

    Args:
        shardings: those of one adapter, `{path: adapter}`.
        form: the shapes of one slot.
        slots: how many there are.
        axis: the axis of the mesh that the slots are split over; None for all of them on each device.

    Raises:
        LoraError: there are other paths or arrays than in the bank; a place is no `NamedSharding`; the axis is not one
            of the mesh, splits the arrays already, or does not divide the slots.
    """
    check_adapter_dict(CALL, shardings)
    places = in_slots(shardings)
    if sorted(places) != sorted(form):
        raise LoraError(f"{CALL}: shardings are of the paths {[*places]}, but the bank has {[*form]}: {MEND}.")
    return {path: _of_path(path, places[path], shapes, slots, axis) for path, shapes in form.items()}


def _of_path(path: str, places: Any, shapes: Any, slots: int, axis: str | None) -> Any:
    form: Any = jax.tree.structure(shapes)
    if form != jax.tree.structure(places):
        found, expected = [*places.arrays()], [*shapes.arrays()]
        raise LoraError(f"{CALL}: {path!r} has shardings of {found}, but the bank has {expected} there: {MEND}.")
    return jax.tree.map(lambda place, shape: _with_slots(path, place, shape, slots, axis), places, shapes)


def _with_slots(path: str, place: Any, shape: Any, slots: int, axis: str | None) -> NamedSharding:
    if not isinstance(place, NamedSharding):
        raise LoraError(f"{CALL}: {path!r} has {place!r}, expected a NamedSharding: {MEND}.")
    spec = full_spec(path, place.spec, len(shape.shape), place.mesh)
    if axis is not None and axis not in place.mesh.shape:
        raise LoraError(f"{CALL}: the mesh lacks the axis {axis!r}: it has {dict(place.mesh.shape)}.")
    if any(axis in names_of(entry) for entry in spec):
        raise LoraError(
            f"{CALL}: {path!r} is split as {spec} already, so its slots cannot be split over {axis!r} too: give "
            "another axis, or None for all slots on each device."
        )
    spec = P(axis, *spec)
    what = f"{CALL}: the bank of {path!r}, {[slots, *shape.shape]}"
    check_divisible(what, (slots, *shape.shape), spec, place.mesh, "or take another number of slots")
    return NamedSharding(place.mesh, spec)
