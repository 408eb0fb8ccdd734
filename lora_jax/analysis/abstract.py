"""Shapes in the place of arrays, and where they would be: what a program is compiled for without its machine."""

from typing import Any, Literal

import jax
import optax
from jax import P
from jax.sharding import Mesh, NamedSharding

from lora_jax.bases.placement import place
from lora_jax.core.argument_checks import check_is
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.partition import check_spec, full_spec
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.targets import Plan
from lora_jax.initialization.init import init
from lora_jax.sharding.adapters import Policy, adapter_shardings
from lora_jax.sharding.devices import sharding_of
from lora_jax.training.state import TrainState

CALL = "abstract(tree, mesh, specs)"
STATE_CALL = "abstract_state(params, plan, optimizer)"
WHOLE = P()  # on every device


def abstract(tree: Any, mesh: Mesh, specs: Any = WHOLE) -> Any:
    """Return the shapes of a tree with where they would be on a mesh, which may be one of `lora.topology_mesh`.

    Args:
        tree: arrays or shapes, such as `jax.eval_shape(model.init, key, x)` returns, and packed weights, also those of
            `jax.eval_shape(lambda params: lora.bases.quantize(params, rules), params)`.
        mesh: the devices.
        specs: one `PartitionSpec` for all, or a tree like `tree` with one for each (None is `P()`); `NamedSharding`s
            stand for their specs. That of a packed weight is the one of the array that it stands for.

    Returns:
        The tree with a `jax.ShapeDtypeStruct` with a sharding in the place of each array.

    Raises:
        LoraError: the trees have different paths; a leaf is no array; a spec names an axis that the mesh lacks, or
            splits an axis unevenly.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> mesh = jax.make_mesh((1, 1), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    >>> shapes = lora.abstract({"w": jnp.ones((8, 4)), "b": jnp.ones(4)}, mesh, {"w": jax.P("fsdp"), "b": None})
    >>> shapes["w"].shape, shapes["w"].sharding.spec == jax.P("fsdp", None)
    ((8, 4), True)
    """
    check_is(CALL, "mesh", mesh, Mesh, 'a mesh: lora.topology_mesh("v5e:4x4", fsdp=16)')
    names, leaves, treedef = flatten_with_names(tree)
    if specs is None or isinstance(specs, P | NamedSharding):
        found: list[Any] = [specs] * len(names)
    else:
        there, given, _ = flatten_with_names(specs, is_leaf=lambda node: node is None or isinstance(node, P))
        where = dict(zip(there, given, strict=True))
        for name in (*names, *there):
            if name not in where or name not in dict.fromkeys(names):
                raise LoraError(f"{name!r} is not in both trees: give a PartitionSpec for each array, or one for all.")
        found = [where[name] for name in names]
    placed = []
    for name, leaf, spec in zip(names, leaves, found, strict=True):
        if not is_array(leaf):
            raise LoraError(f"{CALL}: {name!r} is a {type(leaf).__name__}, expected an array or a shape.")
        spec = P() if spec is None else getattr(spec, "spec", spec)
        if not isinstance(spec, P):
            raise LoraError(f"{CALL}: the spec of {name!r} is {spec!r}, expected a PartitionSpec.")
        sharding = NamedSharding(mesh, full_spec(name, spec, len(leaf.shape), mesh))
        check_spec(name, tuple(leaf.shape), sharding)
        placed.append(sharding)
    shapes = [_shapes(leaf) for leaf in leaves]
    return place(treedef.unflatten(shapes), treedef.unflatten(placed))


def abstract_state(
    params: Any,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    policy: Literal["tensor", "replicate", "inherit"] | Policy = "tensor",
) -> TrainState:
    """Return the shapes of `lora.TrainState.create(lora.init(key, params, plan), optimizer)`, and where they would be.

    Adapters are where `lora.adapter_shardings` has them, and the optimizer's moments beside them, also where it keeps
    them of groups of arrays alone, as `lora.freeze_base`, `lora.lora_plus` and `optax.masked` do.

    Args:
        params: shapes with shardings, as `lora.abstract` returns them.
        plan: as of `lora.plan`, which takes shapes too.
        optimizer: any optax transformation.
        key: of the state, if the loss takes one.
        policy: where adapters go, as of `lora.adapter_shardings`: "inherit" splits them as the base is split.

    Returns:
        A `TrainState` of `jax.ShapeDtypeStruct`s on the mesh of `params`.

    Raises:
        LoraError: a parameter has no sharding; as `lora.init`.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> mesh = jax.make_mesh((1, 1), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    >>> params = lora.abstract({"w": jnp.ones((8, 4))}, mesh, jax.P("fsdp"))
    >>> x = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> state = lora.abstract_state(params, plan, lora.freeze_base(optax.adam(1e-3)))
    >>> state.trainable["w"].a.shape
    (8, 2)
    """
    check_is(STATE_CALL, "plan", plan, Plan, "a plan: make it with lora.plan(fn, params, *args, rules={...})")
    if not plan:
        raise LoraError(f"{STATE_CALL}: the plan has no targets.")
    if not any(isinstance(sharding_of(leaf), NamedSharding) for leaf in jax.tree.leaves(params)):
        raise LoraError(
            f"{STATE_CALL}: the parameters are on no mesh: give shapes that are, as lora.abstract(params, mesh, specs) "
            "makes them."
        )
    places = jax.tree.leaves(adapter_shardings(params, plan, policy=policy))
    bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)

    def made(params: Any, key: Any) -> Any:
        return TrainState.create(init(jax.random.key(0), params, plan), optimizer, key)

    state: Any = jax.eval_shape(made, bare, key)
    whole = NamedSharding(places[0].mesh, P())
    own = jax.tree_util.tree_leaves_with_path(state.trainable)
    there = {path: (leaf.shape, place) for (path, leaf), place in zip(own, places, strict=True)}

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # Optimizers keep moments in trees like the adapters', with holes where a mask leaves some out: the end of a
        # path says whose moment it is. One of another shape, such as a sum over an axis, is made whole.
        for start in range(len(path)):
            shape, place = there.get(path[start:], ((), None))
            if place is not None and shape == leaf.shape:
                return _at(leaf, place)
        return _at(leaf, whole)

    return jax.tree_util.tree_map_with_path(placed, state)


def _shapes(leaf: Any) -> Any:
    """Return an array, or the arrays of a packed weight, as shapes."""
    if is_packed(leaf):
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _at(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
