"""Reprs: one line, without numbers out of arrays, whatever the leaves are; those of rules can be evaluated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, MODELS

import lora_jax as lora
from lora_jax import bases, initializers

AXES = lora.KernelAxes((), (0,), (1,))
NAMES = vars(lora) | vars(bases) | {"jnp": jnp, "initializers": initializers}


def adapter(dtype=jnp.float32):
    return lora.LoraAdapter(jnp.ones((768, 8), dtype), jnp.ones((8, 3072), dtype), AXES, 2.0)


def mine(key, shape, fan_in, dtype):
    return jnp.ones(shape, dtype)


def test_adapters_show_shapes_and_static_facts():
    assert repr(adapter()) == "LoraAdapter(a 768x8, b 8x3072)"
    assert str({"q": adapter(jnp.bfloat16)}) == "{'q': LoraAdapter(a 768x8 bfloat16, b 8x3072 bfloat16)}"
    rows = lora.RowsAdapter(jnp.ones((6, 4)), AXES, tuple(range(6)), 100)
    assert repr(rows) == "RowsAdapter(values 6x4, indices (0, 1, 2, 3, ...), size 100, axis 0)"
    dropped = lora.with_dropout({"q": adapter()}, jax.random.key(0), 0.1)["q"]
    assert repr(dropped).startswith("DropoutAdapter(inner LoraAdapter(a 768x8, b 8x3072), keys scalar key<")


LEAVES = {
    "None": lambda _: None,
    "a sentinel": lambda _: object(),
    "a shape": lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
    "numpy": np.asarray,
    "a label": lambda _: "adapter",
    "a spec": lambda _: jax.P("data", None),
    "a masked node": lambda _: optax.MaskedNode(),
    "a sharding": lambda array: array.sharding,
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
def test_reprs_are_short_whatever_the_leaves_are(kind):
    case = next(case for case in MODELS if case.name == "two_layers")
    adapters = case.adapters(KINDS[kind])
    for leaf in LEAVES.values():
        for node in jax.tree.map(leaf, adapters).values():
            assert 0 < len(repr(node)) < 300
            assert "\n" not in repr(node)
            assert " at 0x" not in repr(node)
    for node in adapters.values():
        for array in (name for name, given in node.arrays().items() if given is not None and name != "ratio"):
            assert f"{array} " in repr(node)


def test_reprs_under_transforms_look_at_no_numbers():
    shown = []

    def f(node):
        shown.append(repr(node))
        return node

    jax.jit(f)(adapter())
    jax.vmap(f)(jax.tree.map(lambda array: array[None], adapter()))
    assert shown == [repr(adapter())] * 2
    gone = adapter()
    gone.a.delete()
    gone.b.delete()
    assert repr(gone) == shown[0]


def test_states_are_readable():
    """What a notebook shows of a state is a few lines of shapes, for the moments of its optimizer as well."""
    state = lora.TrainState.create({"q": adapter()}, optax.adam(1e-3))
    assert repr(state).count("LoraAdapter(a 768x8, b 8x3072)") == 3


@pytest.mark.parametrize("packed", [bases.Nf4(), bases.Nf4(double=False), bases.Int8(), bases.Fp8()], ids=repr)
def test_packed_weights_show_what_they_stand_for(packed):
    weight = bases.quantize({"w": jnp.ones((64, 128), jnp.bfloat16)}, {"w": packed})["w"]
    assert repr(weight).startswith(f"{type(weight).__name__}(64x128 bfloat16: ")
    assert len(repr(weight)) < 120
    for leaf in LEAVES.values():
        assert "\n" not in repr(jax.tree.map(leaf, weight))
    assert jax.jit(lambda w: len(repr(w)))(weight) == len(repr(weight))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lora.Lora(8), "Lora(rank=8)"),
        (lora.Lora(8, alpha=16), "Lora(rank=8, alpha=16)"),
        (lora.Lora(np.int64(8), alpha=np.float32(0.5)), "Lora(rank=8, alpha=0.5)"),
        (lora.RsLora(8, dtype=jnp.float32), "RsLora(rank=8)"),
        (lora.Dora(8, dtype=jnp.bfloat16, stack=0), "Dora(rank=8, dtype=jnp.bfloat16, stack=0)"),
        (lora.Lora(8, dtype=jnp.dtype(jnp.float32)), "Lora(rank=8)"),
        (lora.Lora(8, dtype="float16"), "Lora(rank=8, dtype='float16')"),
        (lora.Loha(8, stack=(0, 2)), "Loha(rank=8, stack=(0, 2))"),
        (lora.AdaLora(8, stack=()), "AdaLora(rank=8, stack=())"),
        (lora.Lokr(8, factor=4), "Lokr(rank=8, factor=4)"),
        (lora.LoraFa(8, init_a=initializers.gaussian), "LoraFa(rank=8, init_a=initializers.gaussian)"),
        (lora.Vera(seed=3, widths=(8, 6)), "Vera(seed=3, widths=(8, 6))"),
        (lora.Ia3(), "Ia3()"),
        (lora.Full(dtype=jnp.float16), "Full(dtype=jnp.float16)"),
        (lora.Rows((5, 7), axis=1), "Rows(indices=(5, 7), axis=1)"),
        (lora.Rows(range(32_000, 32_256)), "Rows(indices=range(32000, 32256))"),
        (bases.Nf4(), "Nf4()"),
        (bases.Int8(inputs=2, stack=1), "Int8(stack=1, inputs=2)"),
    ],
    ids=str,
)
def test_rules_show_what_was_given_and_can_be_evaluated(rule, text):
    assert repr(rule) == text
    assert eval(repr(rule), dict(NAMES)) == rule


def test_functions_are_shown_by_name():
    assert repr(lora.Lora(8, init_a=mine)) == "Lora(rank=8, init_a=mine)"
    assert (
        repr(lora.Lora(8, init_a=functools.partial(mine, fan_in=3))) == "Lora(rank=8, init_a=partial(mine, fan_in=3))"
    )
    assert repr(lora.Lora(lambda path, shape: 8)) == ("Lora(rank=test_functions_are_shown_by_name.<locals>.<lambda>)")

    class Start:
        def __call__(self, key, shape, fan_in, dtype):
            return jnp.ones(shape, dtype)

    assert repr(lora.Lora(8, init_a=Start())) == "Lora(rank=8, init_a=<Start>)"


def test_a_kind_of_ones_own_has_them_too_unless_it_says_otherwise():
    @dataclasses.dataclass(frozen=True)
    class Mine(lora.LoraAdapter):
        note: str = dataclasses.field(default="x", metadata={"static": True})

    @dataclasses.dataclass(frozen=True)
    class Spoken(lora.Lora):
        def __repr__(self):
            return "as I say"

    @dataclasses.dataclass(frozen=True)
    class Heir(Spoken):
        more: int = 0

    a = adapter()
    assert repr(Mine(a.a, a.b, a.axes, 0.5)) == "Mine(a 768x8, b 8x3072, note 'x')"
    assert repr(Spoken(8)) == repr(Heir(8)) == "as I say"

    class Plain(lora.Rule):  # no dataclass
        def init(self, key, w, axes):
            raise NotImplementedError

        def flops(self, shape, axes, rows):
            raise NotImplementedError

    assert "Plain object" in repr(Plain())
