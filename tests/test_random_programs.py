"""Laws 1 and 5 over random programs: random kinds of adapters, in a random wrapper and a random place.

`random_programs.py` draws them. What a kind cannot follow factored is allowed to be formed, so that every program has a
value; which of them are refused is the subject of `test_programs.py`.
"""

import itertools
import random
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import total
from jax import NamedSharding, P
from random_programs import Program

import lora_jax as lora

pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.LoraWarning")  # stacks that a random rule does not name

KINDS = [
    lora.Lora(rank=1, alpha=2),
    lora.Lora(rank=2, alpha=-1),
    lora.RsLora(rank=2, alpha=3),
    lora.LoraFa(rank=1, alpha=3),
    lora.Dora(rank=1, alpha=3),
    lora.Loha(rank=1, alpha=3),
    lora.AdaLora(rank=2, alpha=3),
    lora.Lokr(rank=1, alpha=3),
    lora.Lokr(rank=9, alpha=3),
    lora.Vera(rank=2),
    lora.Ia3(),
    lora.Full(),
    lora.Rows((1, 0)),
    lora.Rows((1,), axis=1),
    None,
]
SMALLEST = lora.Lora(rank=1, alpha=2)
REASONS = (
    "is not used by the function",
    "is above",
    "is for a table of two axes",
    "has the index",
    "behind `stop_gradient` only",
    "is used in two",
)
# Programs with a product of stacks at which XLA's CPU backend of 0.10 ends the process, as `conftest.py` has set it.
WITH_EMITTERS = (89,) if version("jaxlib").startswith("0.10.") else ()
WRAPPERS = ("none", "dropout", "copies", "vmap")
PLACES = ("one device", "data", "data and model")


def planned(program, params, x, rng):
    """A plan with a random kind for each weight; one that cannot have it gets LoRA of rank 1, or none."""
    kinds = {1: [lora.Full(), None]}
    rules = {name: rng.choice(kinds.get(len(shape), KINDS)) for name, shape in program.shapes.items()}
    while any(rules.values()):
        refused = ""
        try:
            return lora.plan(program, params, x, rules=rules, materialize=True)
        except lora.LoraError as refusal:
            refused = str(refusal)
        problems = re.findall(r"^  '(\w+)': (.*)$", refused, re.MULTILINE)
        assert problems, refused
        for name, why in problems:
            assert any(reason in why for reason in REASONS), refused
            rules[name] = None if rules[name] == SMALLEST else SMALLEST
    return None


def trained(plan, seed):
    """Adapters of random numbers, by NumPy: `lora.init` would compile a program for each shape."""
    rng = np.random.default_rng((seed, 2))
    shapes = {path: target.abstract() for path, target in plan.items()}
    return jax.tree.map(lambda s: jnp.asarray(0.7 * rng.normal(size=s.shape), s.dtype), shapes)


def placed(place, params, x, rng):
    """The parameters and the input at a random place of this kind, and the sharding of the input there."""
    if place == "one device":
        return params, x, None
    sizes = (4, 1) if place == "data" else (2, 2)
    mesh = jax.make_mesh(sizes, ("data", "model"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def spec(w):
        axis = rng.choice([*(i for i, n in enumerate(w.shape) if n % sizes[1] == 0), None])
        return P(*("model" if i == axis else None for i in range(w.ndim)))

    batch = NamedSharding(mesh, P("data"))
    there = {name: NamedSharding(mesh, spec(w)) for name, w in params.items()}
    return jax.device_put(params, there), jax.device_put(x, batch), batch


def check(seed: int, wrapper: str | None = None, place: str | None = None) -> None:
    """Compare the program with adapters, wrapped and placed, with the merged one as it is, on one device."""
    rng, program = random.Random(-seed), Program(seed)
    params, x = program.params(seed), program.input(seed)
    plan = planned(program, params, x, rng)
    if plan is None:
        return
    wrapper, place = wrapper or rng.choice(WRAPPERS), place or rng.choice(PLACES)
    if (wrapper == "vmap" and program.has_groups) or program.has_branches:
        wrapper = "dropout"  # what others would do, JAX or XLA does not take
    if program.convolves and place == "data and model":
        place = "data"  # where XLA's own gradient is right
    adapters = trained(plan, seed)
    there, x_there, batch = placed(place, params, x, rng)
    adapters_there = adapters if batch is None else jax.device_put(adapters, lora.adapter_shardings(there, plan))
    apply = lora.lora_apply(program, materialize=True)

    def factored(a, p, x):
        return total(apply(p, lora.with_dropout(a, jax.random.key(0), 1e-9) if wrapper == "dropout" else a, x))

    def merged(a, p, x):
        return total(program(lora.merge(p, a), x))

    def without_rounding(a, p, x):
        return total(Program(seed, exact=True)(lora.merge(p, a), x))

    def run(fn, a, p, x, batch=None):
        a = jax.tree.map(lambda leaf: np.stack([leaf, leaf * np.float32(0.75)]), a) if wrapper == "vmap" else a
        copies = wrapper == "copies" and batch is not None
        grad = lora.value_and_grad(fn, batch_sharding=batch) if copies else jax.value_and_grad(fn)
        fn = fn if program.forward_only else grad
        fn = jax.vmap(fn, in_axes=(0, None, None)) if wrapper == "vmap" else fn
        options = {"xla_cpu_use_fusion_emitters": True} if seed in WITH_EMITTERS else None
        return jax.jit(fn, compiler_options=options)(a, p, x)

    found = leaves(run(factored, adapters_there, there, x_there, batch))
    expected = leaves(run(merged, adapters, params, x))
    allowed = 2e-4
    if program.rounds:
        exact = Program(seed, exact=True)
        rounded, expected = expected, leaves(run(without_rounding, adapters, exact.params(seed), exact.input(seed)))
        allowed = 0.03 + 3 * difference(rounded, expected)
    off = difference(found, expected)
    assert off <= allowed, f"off by {off:.2g}, {allowed:.2g} is allowed: {wrapper}, {place}, {plan}"


def leaves(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def difference(found, expected):
    """The largest difference, of the largest number of all."""
    size = max(1.0, *(float(np.abs(leaf).max(initial=0)) for leaf in expected))
    return max(float(np.abs(a - b).max(initial=0)) for a, b in zip(found, expected, strict=True)) / size


SMALL = list(itertools.islice((seed for seed in itertools.count() if Program(seed).is_small), 10))


@pytest.mark.parametrize("seed", SMALL)
def test_applying_is_merging_anywhere(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.sampled(5)
@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_a_thousand_programs(first):
    misses = []
    for seed in range(first, first + 50):
        try:
            check(seed)
        except Exception as error:  # all of them are looked at, and the first lines of each are shown
            misses.append(f"{seed}: {type(error).__name__}: {str(error)[:500]}")
    jax.clear_caches()
    assert not misses, "\n".join(misses)
