"""Of rules over names, the first that matches decides: for adapters, packed weights, labels and what may be formed."""

import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax import LoraError
from lora_jax.core.patterns import first_match

PARAMS = {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}
X = jnp.ones((2, 4))
AXES = lora.KernelAxes((), (0,), (1,))
ADAPTERS = {"up/kernel": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 8)), AXES, 1.0)}


def model(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


def plan(patterns):
    lora.plan(model, PARAMS, X, rules=dict.fromkeys(patterns, lora.Lora(rank=1)))


def quantize(patterns):
    lora.bases.quantize(PARAMS, dict.fromkeys(patterns, lora.bases.Int8()))


def labels(patterns):
    lora.labels(PARAMS, dict.fromkeys(patterns, "slow"), default="fast")


def materialize_in_plan(patterns):
    lora.plan(model, PARAMS, X, rules={"up/kernel": lora.Lora(rank=1)}, materialize=list(patterns))


def materialize_in_apply(patterns):
    lora.lora_apply(model, materialize=list(patterns))(PARAMS, ADAPTERS, X)


CALLS = [plan, quantize, labels, materialize_in_plan, materialize_in_apply]


def test_the_first_pattern_decides():
    rules = {"a": 1, "[ab]": 2, ".*": 3}
    assert first_match(rules, ["c", "b", "a", "ab"]) == {"c": 3, "b": 2, "a": 1, "ab": 3}
    assert list(first_match({"a": 1, "c": 2}, ["c", "b", "a"])) == ["c", "a"], "in the order of the names"


@pytest.mark.parametrize("call", CALLS)
def test_patterns_that_fit(call):
    call(["up/kernel", ".*"])
    call([".*kernel"])


@pytest.mark.parametrize("call", CALLS)
def test_a_pattern_that_matches_nothing(call):
    with pytest.raises(LoraError, match=r"'up/kernle' matches no (?s:.*)\n  up/kernel"):
        call([".*down.*", "up/kernle"])


@pytest.mark.parametrize("call", CALLS)
def test_a_pattern_that_is_never_reached(call):
    with pytest.raises(LoraError, match=r"'up/\.\*' is never reached: all 1 .*'up/kernel' first, are taken by earlier"):
        call([".*kernel", "up/.*"])


@pytest.mark.parametrize("call", CALLS)
def test_a_pattern_that_is_no_regular_expression(call):
    for pattern in ("(", 3):
        with pytest.raises(LoraError, match="regular expression"):
            call([pattern])


@pytest.mark.parametrize("materialize", [True, False, ".*", [".*"], []])
def test_what_may_be_formed_of_no_parameters(materialize):
    """All and none of them."""
    assert lora.lora_apply(lambda params, x: x, materialize=materialize)({}, {}, X) is X
    materialize_in_plan([".*"])
