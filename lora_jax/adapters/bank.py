"""A bank of adapters: a few on the device, thousands on the host or on disk."""

import collections
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.bank_places import bank_places
from lora_jax.adapters.select import select
from lora_jax.adapters.slot_form import form_of, in_form
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_adapter_dict
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.core.selected import Axes

Adapters = Mapping[str, Adapter]
Source = Adapters | Callable[[], Adapters]  # the adapters, or what reads them
Request = str | tuple[str, int] | None  # the newest version of a name, one version of it, or the base alone


class AdapterBank:
    """Adapters by name, some of them in slots on the device, for one compiled program that serves them all.

    A batch names its adapters; those that are in no slot are loaded into the slots that were used least recently. A
    slot is overwritten in place: nothing is compiled again, and the device never holds more than the slots. A name may
    have several versions, so that a rollout goes on with those of step n while step n + 1 is put beside them.

    One thread asks for adapters; others may register new ones meanwhile. What `select` returned, and `adapters`, hold
    until the next call that loads something, which takes their memory: use them, and ask again.

    Args:
        like: `{path: adapter}` of the largest rank, or their shapes: what each slot has room for. Adapters of smaller
            ranks are padded with zeros, which change nothing.
        slots: how many adapters are on the device.
        versions: how many of each name are kept, the newest ones.
        shardings: where the arrays of an adapter are on a mesh: `lora.adapter_shardings(params, plan)`. None for the
            default device.
        axis: the axis of that mesh that the slots are split over; None for all slots on each device.

    Raises:
        LoraError: no adapters; no slots; shardings of another form, or that cannot be split.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((3, 5, 4))
    >>> plan = lora.plan(model, params, x, rules={"w": lora.Lora(rank=2)})
    >>> some = lora.init(jax.random.key(0), params, plan)
    >>> bank = lora.AdapterBank(some, slots=2)
    >>> for name in ["anna", "ben", "carl"]:
    ...     _ = bank.register(name, some)                       # or a function that reads them: lora.load_peft, ...
    >>> apply = jax.jit(lora.lora_apply(model))
    >>> apply(params, bank.select(["ben", None, "anna"]), x).shape
    (3, 5, 3)
    >>> apply(params, bank.select(["carl", "anna", "carl"]), x).shape, bank.resident()
    ((3, 5, 3), [('anna', 1), ('carl', 1)])
    """

    def __init__(
        self,
        like: Adapters,
        slots: int,
        *,
        versions: int = 2,
        shardings: Adapters | None = None,
        axis: str | None = None,
    ) -> None:
        call = "AdapterBank(like, slots)"
        check_adapter_dict(call, like)
        if not like:
            raise LoraError(f"{call}: `like` is empty, expected the adapters that a slot has room for.")
        for name, number in (("slots", slots), ("versions", versions)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise LoraError(f"AdapterBank({name}={number!r}): expected a number of at least 1.")
        if shardings is None and axis is not None:
            raise LoraError(f"AdapterBank(axis={axis!r}): `axis` is of the mesh of `shardings`, which are missing.")
        self.slots, self.versions = slots, versions
        self.loads = self.evictions = 0  # so far
        self._form = form_of(like)
        places = None if shardings is None else bank_places(shardings, self._form, slots, axis)
        self._bank = _zeros(self._form, slots, places)
        self._put = _put if places is None else jax.jit(_overwritten, donate_argnums=0, out_shardings=places)
        self._sources: dict[str, dict[int, Source]] = {}  # by name and version, the oldest version first
        self._slots: collections.OrderedDict[tuple[str, int], int] = collections.OrderedDict()  # the latest used last
        self._free = list(reversed(range(slots)))
        self._lock = threading.RLock()

    def register(self, name: str, source: Source, version: int | None = None) -> int:
        """Add a version of an adapter, or replace one that is there. Nothing is loaded until it is asked for.

        Args:
            name: any string.
            source: `{path: adapter}`, which is kept as numpy arrays on the host; or a function without arguments that
                returns it, called each time it is loaded into a slot, and not kept:
                `functools.partial(read, folder)`, with `lora.load_peft(folder, params, key_map)[0]` in `read`.
            version: such as the step of a training; by default one more than the newest.

        Returns:
            The version.

        Raises:
            LoraError: the name is no string, the version no number; adapters do not fit the bank.
        """
        if not isinstance(name, str):
            raise LoraError(f"AdapterBank.register({short(name)}, ...): expected the name of the adapter, a string.")
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise LoraError(f"AdapterBank.register({name!r}, version={version!r}): expected a whole number.")
        kept = source if callable(source) else jax.tree.map(np.asarray, dict(source))
        if not callable(kept):
            in_form(repr(name), kept, self._form)
        with self._lock:
            of_name = self._sources.setdefault(name, {})
            version = max(of_name, default=0) + 1 if version is None else version
            self._forget(name, version)
            of_name[version] = kept
            self._sources[name] = of_name = dict(sorted(of_name.items()))
            for old in list(of_name)[: -self.versions]:
                self._forget(name, old)
                del of_name[old]
        return version

    def unregister(self, name: str) -> None:
        """Remove all versions of an adapter.

        Args:
            name: of the adapter.

        Raises:
            LoraError: there is none of this name.
        """
        with self._lock:
            for version in self._versions(name):
                self._forget(name, version)
            del self._sources[name]

    def ids(self, requests: Sequence[Request]) -> np.ndarray:
        """Load what a batch asks for, and return the slot of each example, i32 [examples]; -1 for the base.

        Args:
            requests: for each example the name of an adapter, which is its newest version, a pair (name, version), or
                None for the base alone.

        Raises:
            LoraError: a name or version is not there, or no longer; the batch asks for more adapters than there are
                slots; what is read does not fit. Then nothing is loaded.
        """
        with self._lock:
            keys = [self._key(request) for request in requests]
            wanted = list(dict.fromkeys(key for key in keys if key is not None))
            if len(wanted) > self.slots:
                raise LoraError(
                    f"a batch asks for {len(wanted)} adapters at once, but the bank has {self.slots} slots: make a "
                    "bank of more slots, or batches of fewer adapters."
                )
            read = {key: self._read(key) for key in wanted if key not in self._slots}
            for key in wanted:
                if key in self._slots:
                    self._slots.move_to_end(key)
            for key, adapters in read.items():
                slot = self._free.pop() if self._free else self._evict(wanted)
                self._bank = self._put(self._bank, np.int32(slot), adapters)
                self._slots[key] = slot
                self.loads += 1
            return np.array([-1 if key is None else self._slots[key] for key in keys], np.int32)

    def select(self, requests: Sequence[Request], *, in_axes: Axes = 0, out_axes: Axes = 0) -> dict[str, Adapter]:
        """Return the adapters for one batch, as `lora.select` does, for the requests that `ids` takes.

        Args:
            requests: as of `ids`.
            in_axes, out_axes: as of `lora.select`.

        Raises:
            LoraError: what `ids` and `lora.select` raise.
        """
        with self._lock:
            ids = self.ids(requests)
            return select(self._bank, ids, in_axes=in_axes, out_axes=out_axes)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The bank on the device, `{path: adapter}` with arrays [slots, ...], for `lora.select(bank.adapters, ids)`."""
        return dict(self._bank)

    def names(self) -> dict[str, list[int]]:
        """Return the versions of each name, the oldest first."""
        with self._lock:
            return {name: list(versions) for name, versions in self._sources.items()}

    def resident(self) -> list[tuple[str, int]]:
        """Return what is in the slots, the least recently used first."""
        with self._lock:
            return list(self._slots)

    def _versions(self, name: Any) -> dict[int, Source]:
        if not isinstance(name, Hashable) or name not in self._sources:
            near = ", ".join(map(repr, nearest(str(name), list(self._sources)))) or "none: register some"
            raise LoraError(f"the bank has no adapter {name!r}; the nearest are {near}.")
        return self._sources[name]

    def _key(self, request: Request) -> tuple[str, int] | None:
        if request is None:
            return None
        name, version = request if isinstance(request, tuple) and len(request) == 2 else (request, None)
        there = self._versions(name)
        if version is None:
            return name, max(there)
        if version not in there:
            raise LoraError(
                f"the bank has no version {version!r} of {name!r}; there are {list(there)}: the newest {self.versions} "
                "are kept, AdapterBank(..., versions=...)."
            )
        return name, version

    def _read(self, key: tuple[str, int]) -> dict[str, Any]:
        name, version = key
        source = self._sources[name][version]
        return in_form(repr(name), source() if callable(source) else source, self._form)

    def _evict(self, wanted: Sequence[tuple[str, int]]) -> int:
        key = next(key for key in self._slots if key not in wanted)
        self.evictions += 1
        return self._slots.pop(key)

    def _forget(self, name: str, version: int) -> None:
        """Give the slot of a version free, if it has one."""
        slot = self._slots.pop((name, version), None)
        if slot is not None:
            self._free.append(slot)


def _zeros(form: Any, slots: int, places: Any) -> Any:
    """Return an empty bank, each part of it made where it is to be."""
    make = lambda: jax.tree.map(lambda shape: jnp.zeros((slots, *shape.shape), shape.dtype), form)  # noqa: E731
    return make() if places is None else jax.jit(make, out_shardings=places)()


def _overwritten(bank: Any, slot: Any, adapters: Any) -> Any:
    """Overwrite one slot, in the memory that the bank has; where slots are split, only its devices write."""

    def put(slots: jax.Array, one: Any) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(slots, one, slot, 0)

    return jax.tree.map(put, bank, adapters)


_put = jax.jit(_overwritten, donate_argnums=0)
