"""Mistakes of people who come from PEFT, optax, Flax or qwix: each gets one error that says what to do instead.

A row is a name, the mistake, and words that its message holds: what was found, what was expected, the call that mends
it. An error of Python or of JAX's insides would fail a row, and so would a change of a folder or of an array.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx

import lora_jax as lora
from lora_jax import bases, checkpoint, key_maps, starts

D, K, ROWS = 6, 4, 8
RULES = {"up|down": lora.Lora(rank=2)}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def other_model(params, x):
    return x @ params["head"]["kernel"]


@functools.cache
def plans(fn=model):
    return lora.plan(fn, weights(fn), jnp.ones((ROWS, D)), rules=RULES if fn is model else {".*": lora.Lora(rank=1)})


def weights(fn=model):
    shapes = {"up": (D, K), "down": (K, D)} if fn is model else {"head": {"kernel": (D, 3)}}
    return jax.tree.map(lambda shape: jnp.full(shape, 0.1), shapes, is_leaf=lambda node: isinstance(node, tuple))


def adapters_of(fn=model):
    return lora.init(jax.random.key(0), weights(fn), plans(fn))


@dataclass
class Given:
    """What a newcomer has at hand."""

    folder: Path
    params: Any = field(default_factory=weights)
    adapters: Any = field(default_factory=adapters_of)
    x: Any = field(default_factory=lambda: jnp.ones((ROWS, D)))
    key: Any = field(default_factory=lambda: jax.random.key(0))
    optimizer: Any = field(default_factory=lambda: optax.adam(1e-2))
    apply: Any = field(default_factory=lambda: lora.lora_apply(model))
    key_map: Any = field(
        default_factory=lambda: key_maps.KeyMap(key_maps.linear("up", "up"), key_maps.linear("down", "down"))
    )

    @property
    def plan(self):
        return plans()

    @property
    def state(self):
        return lora.TrainState.create(self.adapters, self.optimizer)

    def loss(self, adapters, params, x):
        return (self.apply(params, adapters, x) ** 2).mean()

    def step(self, **options):
        return lora.jit_step(self.loss, self.optimizer, **options)

    def saved(self):
        checkpoint.save(self.folder / "adapters", self.adapters)
        return self.folder / "adapters"

    def exported(self):
        lora.save_peft(self.folder / "peft", self.adapters, self.key_map)
        return self.folder / "peft"

    def packed(self):
        return bases.quantize(self.params, {".*": bases.Int8()})


MISTAKES: list[Any] = []


def mistake(name: str, make: Callable[..., Any], words: str, prepare: Callable[[Given], Any] | None = None) -> None:
    """Add a row: the words have " | " between them; what `prepare` returns is given to the mistake as well."""
    MISTAKES.append(pytest.param(make, words.split(" | "), prepare, id=name))


# Plans and rules ------------------------------------------------------------------------------------------------------

mistake("rules by position", lambda g: lora.plan(model, g.params, g.x, RULES), "rules={ | by keyword | 'up|down'")
mistake("no rules", lambda g: lora.plan(model, g.params, g.x), "rules={ | lora.Lora(rank=8)")
mistake("rules are a list", lambda g: lora.plan(model, g.params, g.x, rules=["up"]), "['up'] | dict | lora.Lora(")
mistake("rules are a pattern", lambda g: lora.plan(model, g.params, g.x, rules="up"), "'up' | dict | lora.Lora(")
mistake("rules are one rule", lambda g: lora.plan(model, g.params, g.x, rules=lora.Lora(rank=2)), "Lora(rank=2 | dict")
mistake(
    "a rule is its class",
    lambda g: lora.plan(model, g.params, g.x, rules={"up": lora.Lora}),
    "'up' | class Lora | lora.Lora(rank=8)",
)
mistake(
    "a rule is its rank", lambda g: lora.plan(model, g.params, g.x, rules={"up": 8}), "'up' | 8 | lora.Lora(rank=8)"
)
mistake(
    "a rule is a format",
    lambda g: lora.plan(model, g.params, g.x, rules={"up": bases.Int8()}),
    "'up' | Int8 | bases.quantize",
)
mistake(
    "names as in PEFT",
    lambda g: lora.plan(model, g.params, g.x, rules={"q_proj": lora.Lora(rank=2)}),
    "'q_proj' | whole path | up",
)
mistake(
    "parameters before the function",
    lambda g: lora.plan(g.params, model, g.x, rules=RULES),
    "plan(fn, params | dict | function",
)
mistake(
    "a model without its function",
    lambda g: lora.plan(nn.Dense(3), {"params": {}}, g.x, rules=RULES),
    "Linen | from_linen",
)
mistake("rank 0", lambda g: lora.Lora(rank=0), "rank=0 | at least 1")
mistake("rank below 0", lambda g: lora.Lora(rank=-8), "rank=-8 | at least 1")
mistake("rank is a float", lambda g: lora.Lora(rank=8.0), "rank=8.0 | whole number")
mistake("rank is a string", lambda g: lora.Lora(rank="8"), "rank='8' | whole number")
mistake(
    "rank above the weight",
    lambda g: lora.plan(model, g.params, g.x, rules={"up": lora.Lora(rank=64)}),
    "rank 64 | at most 4",
)
mistake("alpha is a string", lambda g: lora.Lora(rank=8, alpha="16"), "alpha='16' | finite number")
mistake("dtype is an integer's", lambda g: lora.Lora(rank=8, dtype=jnp.int8), "int8 | jnp.float32")
mistake(
    "8 bits of one's own",
    lambda g: lora.plan(
        lambda p, x: x @ p["w"]["q"].astype(x.dtype), own_int8(), g.x, rules={".*q": lora.Lora(rank=2)}
    ),
    "'w/q' | int8[6, 4] | lora.bases.quantize",
)
mistake(
    "8 bits of one's own, by the name of the layer",
    lambda g: lora.plan(lambda p, x: x @ p["w"]["q"].astype(x.dtype), own_int8(), g.x, rules={"w": lora.Lora(rank=2)}),
    "'w' | 'w/q' | int8[6, 4] | lora.bases.quantize",
)


def own_int8():
    return {"w": {"q": jnp.ones((D, K), jnp.int8), "scale": jnp.ones(K)}}


# Functions ------------------------------------------------------------------------------------------------------------


class Small(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(D, K, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


mistake("an NNX model as fn", lambda g: lora.lora_apply(Small()), "NNX | lora.from_nnx")
mistake("an NNX model in plan", lambda g: lora.plan(Small(), g.params, g.x, rules=RULES), "NNX | lora.from_nnx")
mistake("a Linen module as fn", lambda g: lora.lora_apply(nn.Dense(3)), "Linen | model.apply | lora.from_linen")
mistake("a Linen class as fn", lambda g: lora.lora_apply(nn.Dense), "Linen | lora.from_linen")
mistake("parameters as fn", lambda g: lora.lora_apply(g.params), "lora_apply(fn) | dict | function")
mistake("a Linen module to from_nnx", lambda g: lora.from_nnx(nn.Dense(3)), "Linen | lora.from_linen")
mistake("an NNX model to from_linen", lambda g: lora.from_linen(Small(), {"params": {}}), "NNX | lora.from_nnx")
mistake(
    "parameters alone to from_linen", lambda g: lora.from_linen(nn.Dense(3), {"kernel": g.x}), "{'params': ... | kernel"
)
mistake("materialize by a number", lambda g: lora.lora_apply(model, materialize=3), "materialize=3 | True")

# Keys -----------------------------------------------------------------------------------------------------------------

mistake("an int for a key", lambda g: lora.init(0, g.params, g.plan), "init(key, params, plan) | 0 | jax.random.key(0)")
mistake(
    "the order of init",
    lambda g: lora.init(g.params, g.key, g.plan),
    "init(key, params, plan) | dict | jax.random.key(0)",
)
mistake("a plan before the parameters", lambda g: lora.init(g.key, g.plan, g.params), "init(key, params, plan) | plan")
mistake("rules for a plan", lambda g: lora.init(g.key, g.params, RULES), "rules | lora.plan(fn, params")
mistake(
    "numpy's generator for a key",
    lambda g: lora.init(np.random.default_rng(0), g.params, g.plan),
    "Generator | jax.random.key(0)",
)
mistake("NNX's streams for a key", lambda g: lora.init(nnx.Rngs(0), g.params, g.plan), "Rngs | jax.random.key(0)")
mistake("many keys for one", lambda g: lora.init(jax.random.split(g.key, 3), g.params, g.plan), "3 | jax.vmap")
mistake("a dict of keys", lambda g: lora.init({"params": g.key}, g.params, g.plan), "dict | jax.random.key(0)")
mistake(
    "parameters of another model",
    lambda g: lora.init(g.key, weights(other_model), g.plan),
    "'down' | no such path | lora.plan",
)
mistake(
    "an int for a key of dropout",
    lambda g: lora.with_dropout(g.adapters, 0),
    "with_dropout(adapters, key | jax.random.key(0)",
)
mistake("the order of with_dropout", lambda g: lora.with_dropout(g.key, g.adapters), "with_dropout(adapters, key | key")
mistake(
    "the rate for the key",
    lambda g: lora.with_dropout(g.adapters, 0.1),
    "with_dropout(adapters, key | 0.1 | jax.random.key(0)",
)
mistake("dropout in percent", lambda g: lora.with_dropout(g.adapters, g.key, 10), "rate=10 | below 1")
mistake("dropout of one adapter", lambda g: lora.with_dropout(g.adapters["up"], g.key), "LoraAdapter | {path: adapter}")
mistake(
    "an int for a key of a state",
    lambda g: lora.TrainState.create(g.adapters, g.optimizer, 0),
    "TrainState.create | jax.random.key(0)",
)

# Applying and merging -------------------------------------------------------------------------------------------------

mistake("the order of apply", lambda g: g.apply(g.adapters, g.params, g.x), "(params, adapters | 'down' | lora.init")
mistake(
    "the batch before the adapters", lambda g: g.apply(g.params, g.x, g.adapters), "(params, adapters | float32[8, 6]"
)
mistake("the order of merge", lambda g: lora.merge(g.adapters, g.params), "(params, adapters | 'down' | lora.init")
mistake("the plan for adapters", lambda g: g.apply(g.params, g.plan, g.x), "plan | lora.init")
mistake("a list of adapters", lambda g: g.apply(g.params, [g.adapters], g.x), "list | lora.combine")
mistake(
    "a tuple of adapters to merge", lambda g: lora.merge(g.params, (g.adapters, g.adapters)), "tuple | lora.combine"
)
mistake("no adapters at all", lambda g: g.apply(g.params), "apply(params, adapters | 1 positional")
mistake("adapters by keyword", lambda g: g.apply(g.params, adapters=g.adapters, x=g.x), "by position | 'adapters'")
mistake("a state for adapters", lambda g: g.apply(g.params, g.state, g.x), "TrainState | state.trainable")
mistake(
    "adapters of another model",
    lambda g: g.apply(g.params, adapters_of(other_model), g.x),
    "'head/kernel' | another model",
)
mistake(
    "weights of another size",
    lambda g: g.apply({"up": jnp.ones((D, 5)), "down": jnp.ones((5, D))}, g.adapters, g.x),
    "'down' | [4, 6] | [5, 6] | lora.init",
)
mistake(
    "an argument that is not hashable",
    lambda g: lora.lora_apply(lambda p, x, how: model(p, x))(g.params, g.adapters, g.x, object.__new__(Unhashable)),
    "Unhashable | functools.partial",
)
mistake(
    "a packed base in the plain model",
    lambda g: model(g.packed(), g.x),
    "EightBits | lora_apply(fn)(params, {} | lora.bases.dense",
)
mistake(
    "a packed base in a Linen model",
    lambda g: packed_linen()(g.x),
    "EightBits | lora_apply(fn)(params, {} | lora.bases.dense",
)
mistake("a packed base on the left", lambda g: g.packed()["up"] @ g.x.T, "EightBits | lora.bases.dense")
mistake(
    "a packed base in einsum", lambda g: jnp.einsum("td,dk->tk", g.x, g.packed()["up"]), "EightBits | lora.bases.dense"
)
mistake("a packed weight as numpy's", lambda g: np.asarray(g.packed()["up"]), "EightBits | lora.bases.dense")
mistake("a packed table looked up", lambda g: g.packed()["up"][jnp.arange(2)], "EightBits | lora.bases.dense")
mistake("a packed weight that is cast", lambda g: g.packed()["up"].astype(jnp.bfloat16), "EightBits | lora.bases.dense")
mistake("a format's class", lambda g: bases.quantize(g.params, {"up": bases.Nf4}), "'up' | Nf4 | lora.bases.Nf4()")
mistake("a format without rules", lambda g: bases.quantize(g.params, bases.Nf4()), "Nf4 | dict | lora.bases.Nf4()")
mistake(
    "parts without weights", lambda g: lora.combine([g.adapters, g.adapters]), "combine([(adapters, weight) | adapters"
)
mistake("parts by position", lambda g: lora.combine((g.adapters, 0.5)), "combine([(adapters, weight)")
mistake("one set of adapters to sum", lambda g: lora.combine(g.adapters), "combine([(adapters, weight) | adapters")
mistake("the weight first", lambda g: lora.combine([(0.5, g.adapters)]), "combine([(adapters, weight) | 0.5")
mistake("starts in the wrong order", lambda g: starts.pissa(g.adapters, g.params), "(params, adapters | 'down'")


def packed_linen():
    fn, params, state = lora.from_linen(nn.Dense(K), {"params": {"kernel": jnp.ones((D, K)), "bias": jnp.ones(K)}})
    return functools.partial(fn, bases.quantize(params, {"kernel": bases.Int8()}), state)


class Unhashable:
    __hash__ = None


# Training -------------------------------------------------------------------------------------------------------------

mistake(
    "the order of create",
    lambda g: lora.TrainState.create(g.optimizer, g.adapters),
    "TrainState.create(trainable, optimizer | optax | adapters",
)
mistake("a learning rate to create", lambda g: lora.TrainState.create(g.adapters, 1e-3), "0.001 | optax.adamw(0.001)")
mistake(
    "an optimizer not made",
    lambda g: lora.TrainState.create(g.adapters, optax.adam),
    "adam | learning rate | optax.adamw(1e-3)",
)
mistake("a plan that is trained", lambda g: lora.TrainState.create(g.plan, g.optimizer), "plan | lora.init")
mistake(
    "the order of jit_step", lambda g: lora.jit_step(g.optimizer, g.loss), "jit_step(loss, optimizer | optax | function"
)
mistake(
    "the order of a step", lambda g: g.step()(g.params, g.state, g.x), "step(state, params, *batch) | dict | TrainState"
)
mistake(
    "adapters for a state",
    lambda g: g.step()(g.adapters, g.params, g.x),
    "step(state, params, *batch) | adapters | TrainState.create",
)
mistake(
    "a state of another optimizer",
    lambda g: g.step()(lora.TrainState.create(g.adapters, optax.sgd(0.1)), g.params, g.x),
    "opt_state | TrainState.create",
)
mistake("microbatches as a string", lambda g: g.step(microbatches="2"), "microbatches | '2' | whole number")
mistake(
    "the loss in the wrong order",
    lambda g: lora.jit_step(lambda params, adapters, x: g.loss(adapters, params, x), g.optimizer)(
        g.state, g.params, g.x
    ),
    "(params, adapters | lora.init",
)
mistake(
    "a loss of all rows",
    lambda g: lora.jit_step(lambda a, p, x: g.apply(p, a, x), g.optimizer)(g.state, g.params, g.x),
    "(8, 6) | scalar",
)
mistake(
    "a loss of nothing",
    lambda g: lora.jit_step(lambda a, p, x: None, g.optimizer)(g.state, g.params, g.x),
    "None | scalar",
)
mistake(
    "a loss of a list",
    lambda g: lora.jit_step(lambda a, p, x: [g.loss(a, p, x), {}], g.optimizer)(g.state, g.params, g.x),
    "scalar",
)
mistake(
    "a loss without the adapters",
    lambda g: lora.jit_step(lambda a, p, x: model(p, x).mean(), g.optimizer)(g.state, g.params, g.x),
    "does not use | lora_apply",
)
mistake(
    "freeze_base of a learning rate",
    lambda g: lora.freeze_base(1e-3),
    "freeze_base(optimizer | 0.001 | optax.adamw(0.001)",
)
mistake(
    "a mask of another tree",
    lambda g: lora.freeze_base(g.optimizer, {"head": True}).init(g.adapters),
    "'head' | 'up/a' | mask",
)
mistake(
    "a mask of names",
    lambda g: lora.freeze_base(g.optimizer, {"up": "train", "down": "train"}).init(g.adapters),
    "holds 'train' | booleans",
)
mistake("a mask of an optimizer", lambda g: lora.trainable_mask(g.optimizer), "optax | adapters")
mistake("a mask of a plan", lambda g: lora.trainable_mask(g.plan), "plan | lora.init")
mistake("labels of a number", lambda g: lora.labels(1e-3, {".*": "train"}), "0.001 | adapters")
mistake("labels by position", lambda g: lora.labels({".*": "train"}, g.adapters), "labels(tree, rules")
mistake("labels without rules", lambda g: lora.labels(g.adapters, "train"), "'train' | dict")
mistake(
    "lora_plus of an optimizer that is made",
    lambda g: lora.lora_plus(optax.adamw(1e-3), 1e-3),
    "lora_plus(optimizer, learning_rate | optax.adamw",
)
mistake(
    "an optimizer as learning rate",
    lambda g: lora.lora_plus(optax.adamw, optax.adam(1e-3)),
    "lora_plus(optimizer, learning_rate | number | schedule",
)
mistake(
    "lora_fa of an optimizer", lambda g: lora.lora_fa(optax.adam(1e-3)), "lora_fa(learning_rate | number | schedule"
)
mistake(
    "a budget of a learning rate",
    lambda g: lora.adapt_budget(1e-3, 2, 10),
    "adapt_budget(optimizer | optax.adamw(0.001)",
)
mistake(
    "a replicated state in jit_step",
    lambda g: g.step()(jax_utils.replicate(g.state), g.params, g.x),
    "pmap | unreplicate",
)
mistake(
    "an unreplicated state in pmap_step",
    lambda g: lora.pmap_step(g.loss, g.optimizer)(g.state, jax_utils.replicate(g.params), jnp.ones((8, 1, D))),
    "replicate(state) | replicated=False",
)
mistake(
    "an unreplicated base in pmap_step",
    lambda g: lora.pmap_step(g.loss, g.optimizer)(jax_utils.replicate(g.state), g.params, jnp.ones((8, 1, D))),
    "'down' | [4, 6] | 8 devices | replicate(params)",
)
mistake(
    "a spec for a batch",
    lambda g: lora.shard_map_step(g.loss, g.optimizer, jax.make_mesh((8,), ("data",)), "data"),
    "'data' | P(",
)


@functools.cache
def state_of_the_step_before():
    given = Given(Path())
    state = given.state
    given.step()(state, given.params, given.x)
    return state


def taken(_):
    """Return a state whose arrays a step has taken."""
    return state_of_the_step_before()


TAKEN = "'down/a' | deleted | state.trainable"
mistake("adapters that a step took", lambda g, old: g.apply(g.params, old.trainable, g.x), TAKEN, prepare=taken)
mistake("adapters that a step took, merged", lambda g, old: lora.merge(g.params, old.trainable), TAKEN, prepare=taken)
mistake(
    "adapters that a step took, saved",
    lambda g, old: checkpoint.save(g.folder / "new", old.trainable),
    TAKEN,
    prepare=taken,
)
mistake(
    "adapters that a step took, exported",
    lambda g, old: lora.save_peft(g.folder / "new", old.trainable, g.key_map),
    TAKEN,
    prepare=taken,
)
mistake(
    "a state that a step took",
    lambda g, old: g.step()(old, g.params, g.x),
    "step(state, params, *batch) | deleted | returned",
    prepare=taken,
)
mistake(
    "a state of what a step took",
    lambda g, old: lora.TrainState.create(old.trainable, g.optimizer),
    TAKEN,
    prepare=taken,
)
mistake(
    "a base that a merge took",
    lambda g, _: g.apply(g.params, g.adapters, g.x),
    "'down' | deleted | donate=True",
    prepare=lambda g: lora.merge(g.params, g.adapters, donate=True),
)

# Folders and key maps -------------------------------------------------------------------------------------------------

mistake(
    "a folder that is not there", lambda g: checkpoint.load(str(g.folder / "none")), "none | lora_jax.checkpoint.save"
)
mistake(
    "a PEFT folder that is not there",
    lambda g: lora.load_peft(str(g.folder / "none"), g.params, g.key_map),
    "none | adapter_config.json",
)
mistake(
    "the order of save", lambda g: checkpoint.save(g.adapters, g.folder / "new"), "save(folder, adapters | adapters"
)
mistake(
    "the order of load_peft",
    lambda g, folder: lora.load_peft(g.params, folder, g.key_map),
    "load_peft(folder,  | dict",
    prepare=Given.exported,
)
mistake(
    "the order of save_peft",
    lambda g: lora.save_peft(g.adapters, g.folder / "new", g.key_map),
    "save_peft(folder, adapters | adapters",
)
mistake(
    "parameters for save_peft", lambda g: lora.save_peft(g.folder / "new", g.params, g.key_map), "'down' | lora.init"
)
mistake(
    "a dict as key map",
    lambda g, folder: lora.load_peft(folder, g.params, {"up": "up"}),
    "dict | KeyMap( | key_maps.linear",
    prepare=Given.exported,
)
mistake(
    "a dict as key map, to save",
    lambda g: lora.save_peft(g.folder / "new", g.adapters, {"up": "up"}),
    "dict | KeyMap( | key_maps.linear",
)
mistake(
    "an entry as key map",
    lambda g: lora.save_peft(g.folder / "new", g.adapters, key_maps.linear("up", "up")),
    "Entry | KeyMap(",
)
mistake(
    "a model's name as key map",
    lambda g, folder: lora.load_peft(folder, g.params, "llama"),
    "'llama' | key_maps.LLAMA",
    prepare=Given.exported,
)
mistake("strings in a key map", lambda g: key_maps.KeyMap("up", "down"), "'up' | key_maps.linear")
mistake(
    "a key map of another model",
    lambda g, folder: lora.load_peft(folder, g.params, key_maps.LLAMA),
    "up | key map",
    prepare=Given.exported,
)
mistake(
    "adapters to a file",
    lambda g, file: lora.save_peft(file, g.adapters, g.key_map),
    "file.txt | no folder",
    prepare=lambda g: written(g.folder / "file.txt"),
)
mistake(
    "a config for a folder",
    lambda g, folder: lora.load_peft(folder / "adapter_config.json", g.params, g.key_map),
    "adapter_config.json | is a file | folder",
    prepare=Given.exported,
)
mistake(
    "a file of weights for a folder",
    lambda g, folder: lora.load_peft(folder / "adapter_model.safetensors", g.params, g.key_map),
    "adapter_model.safetensors | is a file | folder",
    prepare=Given.exported,
)
mistake(
    "checkpoints in the wrong order",
    lambda g: lora.Checkpoints(g.params, g.folder / "run", g.plan),
    "Checkpoints(folder, params, plan | dict",
)
mistake(
    "checkpoints of rules",
    lambda g: lora.Checkpoints(g.folder / "run", g.params, RULES),
    "Checkpoints(folder, params, plan | rules | lora.plan",
)
mistake(
    "a folder of PEFT to load",
    lambda g, folder: checkpoint.load(folder),
    "peft | lora.load_peft",
    prepare=Given.exported,
)
mistake(
    "a saved folder to load_peft",
    lambda g, folder: lora.load_peft(folder, g.params, g.key_map),
    "adapters | lora.checkpoint.load",
    prepare=Given.saved,
)
mistake(
    "a description without a scale",
    lambda g, folder: checkpoint.load(folder),
    "description | 'up' | 'ratio' | damaged",
    prepare=lambda g: described(g, without_scale),
)
mistake(
    "a description that is cut",
    lambda g, folder: checkpoint.load(folder),
    "description | damaged",
    prepare=lambda g: described(g, lambda text: text[:20]),
)
mistake(
    "a description of another weight",
    lambda g, folder: checkpoint.load(folder),
    "'other' | damaged",
    prepare=lambda g: described(g, lambda text: text.replace('"up"', '"other"', 1)),
)
mistake(
    "places in the wrong order",
    lambda g: lora.adapter_shardings(g.adapters, g.params),
    "adapter_specs(base, adapters | adapters",
)


def written(path):
    path.write_text("mine")
    return path


def described(g, change):
    """Save adapters, and change the text of their description."""
    folder = g.saved()
    file = folder / "description" / "metadata"
    file.write_text(change(file.read_text()))
    return folder


def without_scale(text):
    facts = json.loads(text)
    del facts["arrays"]["adapters"]["up"]["ratio"]
    return json.dumps(facts)


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("make", "words", "prepare"), MISTAKES)
def test_a_mistake_is_told_what_to_do(make, words, prepare, tmp_path):
    given = Given(tmp_path)
    args = [] if prepare is None else [prepare(given)]
    before = files(tmp_path)
    with pytest.raises(lora.LoraError) as error:
        make(given, *args)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert files(tmp_path) == before


def test_old_keys_are_keys():
    """`jax.random.PRNGKey` gives the numbers of `jax.random.key`, wherever a key is taken."""
    given, new, old = Given(Path()), jax.random.key(3), jax.random.PRNGKey(3)
    fresh = lora.init(new, given.params, given.plan)

    def loss(adapters, params, x, key):
        return given.loss(lora.with_dropout(trained(adapters), key, 0.5), params, x)

    def trained(adapters):
        return jax.tree.map(lambda array: array + 0.1, adapters)

    def all_of(key):
        state = lora.TrainState.create(fresh, given.optimizer, key)
        _, metrics = lora.train_step(loss, given.optimizer, state, given.params, given.x)
        return lora.init(key, given.params, given.plan), starts.orthogonal(key, fresh), metrics["loss"]

    ours, theirs = all_of(new), all_of(old)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_may_have_arguments_of_any_name():
    plan = lora.plan(
        lambda params, x, fn, rank: x @ params["up"] * fn,
        weights(),
        jnp.ones((1, D)),
        fn=2.0,
        rank=1,
        rules={"up": lora.Lora(rank=1)},
    )
    assert list(plan) == ["up"]
