"""Adapters out of the folder of a run's checkpoints, without its plan, its optimizer or its base.

All that it takes is in what a run writes: kind, axes and scale of each adapter, and the names of the base's weights.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints import adapters
from lora_jax.checkpoints.arrays import empty, local_checkpointer
from lora_jax.checkpoints.failures import damaged_step
from lora_jax.checkpoints.fingerprint import checksums, differences
from lora_jax.checkpoints.orbax_manager import steps_in
from lora_jax.checkpoints.state_codec import decode_description
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError

Loaded = tuple[dict[str, Adapter], dict[str, Any]]


def load(folder: str | Path, *, step: int | None = None) -> Loaded:
    """Load the adapters that `save` wrote, or those of a checkpoint of a run, `lora.Checkpoints`.

    A run may be read while it goes on. Its optimizer state is not read.

    Args:
        folder: that `save` wrote; a folder of `lora.Checkpoints`, or one of the steps in it.
        step: of the checkpoint, where the folder has several; the newest without it.

    Returns:
        The adapters, `{path: adapter}`, and the other arrays as nested dicts: those that `save` was given, or what was
        trained beside adapters in a run. They are tied to no device, like new ones. Where the adapters of a run are
        deeper in the tree that is trained, as in {"lora": adapters, "head": ...}, their paths still begin where those
        of the base do; of several sets of adapters for the same weights all have their paths in that tree.

    Raises:
        LoraError: no such folder or step; written by something else, or by a newer version; damaged; of an unknown
            kind.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter = lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)
    ...     lora.checkpoint.save(f"{folder}/adapters", {"w": adapter})
    ...     adapters, others = lora.checkpoint.load(f"{folder}/adapters")
    >>> adapters, others
    ({'w': LoraAdapter(a 4x2, b 2x3)}, {})
    """
    folder = Path(folder).absolute()
    steps = steps_in(folder)
    named = re.fullmatch(r"step_(\d+)", folder.name)
    if not steps and named and step is None and int(named[1]) in steps_in(folder.parent):
        return load(folder.parent, step=int(named[1]))
    if not steps:
        if step is not None:
            if not folder.exists():
                raise LoraError(f"there is no folder {folder}, which was to hold checkpoints of lora.Checkpoints.")
            raise LoraError(f"{folder} holds no checkpoints of lora.Checkpoints, which have steps: leave `step` out.")
        return adapters.load(folder)
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise LoraError(f"{folder} has no checkpoint of step {step!r}; there are the steps {known}.")
    chosen = steps[-1] if step is None else step
    try:
        return _read(folder, chosen)
    except LoraError:
        if step is None and chosen not in steps_in(folder):  # the run went on, and removed it meanwhile
            return load(folder)
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise damaged_step(folder, chosen, steps, error, "lora.checkpoint.load(folder, step={})") from error


def _read(folder: Path, step: int) -> Loaded:
    """Return the adapters of one checkpoint, and what was trained beside them."""
    where = folder / f"step_{step}"
    facts = decode_description(_read_description(where), f"{folder}, step {step}")
    saved, described = facts["arrays"], facts["adapters"]
    # States of one's own may hold adapters anywhere; what else is in these is not known to be trained.
    root = "trainable/" if all(_below(f"trainable/{path}", saved) for path in described) else ""
    fields = {path: _below(f"{root}{path}", saved) for path in described}
    taken = {name for names in fields.values() for name in names.values()}
    others = [name for name in saved if root and name.startswith(root) and name not in taken]
    wanted = [name for names in fields.values() for name in names.values()] + others
    arrays = _read_arrays(where, {name: saved[name] for name in wanted})
    keys = _weights(list(described), facts["base"])
    found = {
        key: adapters.rebuild(path, described[path], {field: arrays[name] for field, name in fields[path].items()})
        for path, key in zip(described, keys, strict=True)
    }
    return found, _nested({name.removeprefix(root): arrays[name] for name in others})


def _below(path: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the arrays right below a path, by their fields."""
    prefix = path.rstrip("/") + "/"
    found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {field: name for field, name in found.items() if "/" not in field}


def _weights(paths: Sequence[str], base: Mapping[str, str]) -> list[str]:
    """Return the path of the weight of each adapter: what of its own path is one in the base.

    A packed weight has its arrays one level down. Paths stay as they are where two would be the same.
    """
    known = {*base, *(name.rpartition("/")[0] for name in base)} - {""}

    def weight(path: str) -> str:
        parts = path.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((end for end in ends if end in known), path)

    found = list(map(weight, paths))
    return found if len(dict.fromkeys(found)) == len(found) else list(paths)


def _nested(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Return arrays by their paths as nested dicts."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            raise LoraError(
                f"{name!r} and another array trained beside the adapters have paths of which one goes on where the "
                "other ends: restore the state as a whole, by lora.Checkpoints(...).restore(state)."
            )
        node[last] = array
    return tree


# Files ----------------------------------------------------------------------------------------------------------------


def _read_description(where: Path) -> Any:
    """Read the description of the checkpoint at a path."""
    import orbax.checkpoint as ocp

    with local_checkpointer() as reader:
        return reader.restore(where, ocp.args.Composite(description=ocp.args.JsonRestore()))["description"]


def _read_arrays(where: Path, saved: Mapping[str, str]) -> dict[str, jax.Array]:
    """Read arrays of the checkpoint at a path, of which the checksums are given.

    Raises:
        ValueError: an array has another shape, dtype or checksum.
    """
    import orbax.checkpoint as ocp

    like = {name: empty(text.partition("]")[0] + "]") for name, text in saved.items()}
    written = {name: array for name, array in like.items() if array.size}
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in written}
    args = ocp.args.PyTreeRestore(item=written, restore_args=how, partial_restore=True)
    with local_checkpointer() as reader:
        found = reader.restore(where, ocp.args.Composite(arrays=args))["arrays"] if written else {}
    arrays = {name: jnp.asarray(array) for name, array in (like | found).items()}
    if damaged := differences(saved, checksums(arrays)):
        raise ValueError(damaged[0])
    return arrays
