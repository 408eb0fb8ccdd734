import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import BATCH, EXPERTS, HEAD, HEADS, LAYERS, MODELS, TIME, D, K

import lora_jax as lora
from lora_jax import KernelAxes, Lora, LoraError

CASES = {case.name: case for case in MODELS}
PARAMS = {
    "layer_0": {"query": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}, "norm": {"scale": jnp.ones(8)}},
    "unused": jnp.ones((4, 4)),
    "table": jnp.arange(12).reshape(4, 3),
}


def model(params, x):
    q = params["layer_0"]["query"]
    return (x * params["layer_0"]["norm"]["scale"][None]) @ q["kernel"] + q["bias"][None]


def plan(rules, params=PARAMS, fn=model):
    return lora.plan(fn, params, jnp.ones((3, 8)), rules=rules)


@pytest.mark.parametrize(
    ("name", "path", "axes"),
    [
        ("two_layers", "w1", KernelAxes((), (0,), (1,))),
        ("weight_on_the_left", "w", KernelAxes((), (1,), (0,))),
        ("transposed", "w", KernelAxes((), (1,), (0,))),
        ("attention_kernels", "wq", KernelAxes((), (0,), (1, 2))),
        ("attention_kernels", "wo", KernelAxes((), (0, 1), (2,))),
        ("outputs_around_inputs", "w", KernelAxes((), (1,), (0, 2))),
        ("experts", "w", KernelAxes((0,), (1,), (2,))),
        ("experts_in_the_middle", "w", KernelAxes((1,), (0,), (2,))),
        ("scan_over_layers", "w", KernelAxes((0,), (1,), (2,))),
        ("scan_over_layers_of_experts", "w", KernelAxes((0, 1), (2,), (3,))),
        ("scan_with_the_weight_as_constant", "w", KernelAxes((), (0,), (1,))),
    ],
)
def test_axes_are_read_off_the_program(name, path, axes):
    assert CASES[name].plan(Lora(2))[path].axes == axes


def test_factors_have_the_axes_of_the_kernel():
    a = CASES["scan_over_layers_of_experts"].adapters(Lora(2))["w"]
    assert a.a.shape == (EXPERTS, LAYERS, D, 2)
    assert a.b.shape == (EXPERTS, LAYERS, 2, D)
    q = CASES["attention_kernels"].adapters(Lora(2))
    assert q["wq"].b.shape == (2, HEADS, HEAD)
    assert q["wo"].a.shape == (HEADS, HEAD, 2)
    assert all(adapter.kernel_shape() == CASES["attention_kernels"].shapes[path] for path, adapter in q.items())


def test_fan_in_counts_one_matrix():
    """Stacked layers and experts start as they would alone: |A| <= 1/sqrt(inputs), and close to it somewhere."""
    case = CASES["scan_over_layers_of_experts"]
    a = lora.init(jax.random.key(0), case.params(), case.plan(Lora(2)))["w"].a
    bound = D**-0.5
    assert 0.95 * bound < jnp.abs(a).max() <= bound


def test_uses_and_flops_are_counted():
    target = CASES["used_twice"].plan(Lora(2))["w"]
    assert [use.rows for use in target.uses] == [(BATCH * TIME, BATCH * TIME)] * 2
    assert target.flops() == 2 * 2 * BATCH * TIME * 2 * (D + D)
    repeated = CASES["scan_with_the_weight_as_constant"].plan(Lora(2))["w"]
    assert repeated.flops() == 3 * 2 * BATCH * TIME * 2 * (D + D)
    layer = jax.jit(lambda x, w: x @ w)
    [twice] = lora.plan(
        lambda p, x: layer(layer(x, p), p), jnp.ones((4, 4)), jnp.ones((3, 4)), rules={"": Lora(1)}
    ).values()
    assert len(twice.uses) == 2
    stacked = CASES["scan_over_layers"].plan(Lora(2))["w"]
    assert stacked.flops() == LAYERS * 2 * BATCH * TIME * 2 * (D + D)
    assert "helpers.py" in target.uses[0].where


def test_nothing_is_allocated():
    """A model of 400 GB plans on shapes alone."""
    big = jax.ShapeDtypeStruct((320_000, 320_000), jnp.float32)
    found = lora.plan(
        lambda p, x: x @ p["w"], {"w": big}, jax.ShapeDtypeStruct((4, 320_000), jnp.float32), rules={"w": Lora(8)}
    )
    assert "1 of 1 weights adapted: 5,120,000 parameters beside 102,400,000,000" in str(found)


def test_first_matching_rule_wins():
    rules = {"layer_0/.*bias": None, ".*norm.*": None, "layer_0/query/.*": Lora(2), "unused|table": None}
    found = plan(rules)
    assert list(found) == ["layer_0/query/kernel"]
    assert found["layer_0/query/kernel"].rule == Lora(2)


def test_adding_a_weight_does_not_change_the_others_start():
    case = CASES["two_layers"]
    both = lora.init(jax.random.key(0), case.params(), case.plan(Lora(2)))
    fn, shapes = case.fn, case.params()
    alone = lora.init(jax.random.key(0), shapes, lora.plan(fn, shapes, case.input(), rules={"w2": Lora(2)}))
    assert jnp.array_equal(both["w2"].a, alone["w2"].a)
    assert not jnp.array_equal(both["w1"].a[:5, 0], both["w2"].a[:5, 0])


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"layer_0/qeury/kernel": Lora(2)}, [r"'layer_0/qeury/kernel' matches no parameter", "layer_0/query/kernel"]),
        ({"kernel": Lora(2)}, ["'kernel' matches no parameter", "whole path", "layer_0/query/kernel"]),
        (
            {".*kernel": Lora(2), ".*query/kernel": Lora(3)},
            ["'.*query/kernel' is never reached", "'layer_0/query/kernel'"],
        ),
        ({".*(bias|scale)": Lora(2)}, ["2 weight(s)", "layer_0/query/bias", "vector float32[6]", "layer_0/norm/scale"]),
        ({"unused": Lora(1)}, ["'unused'", "float32[4, 4] is not used by the function"]),
        ({"table": Lora(1)}, ["'table'", "int32[4, 3] is not of a floating dtype"]),
        ({".*kernel": Lora(7)}, ["layer_0/query/kernel", "rank 7", "min(8, 6)", "[8, 6]"]),
        ({"(": Lora(7)}, ["'('", "not a regular expression"]),
        ({".*kernel": 8}, ["'.*kernel' is 8", "lora.Lora(rank=8)"]),
        ({}, ["rules are a dict"]),
        ({".*kernel": None, "unused": None}, ["all rules are None", "'.*kernel': None", "at least"]),
        (Lora(2), ["rules are a dict"]),
    ],
)
def test_bad_rules(rules, says):
    with pytest.raises(LoraError) as error:
        plan(rules)
    for part in says:
        assert part in str(error.value)


def test_forming_is_advised_only_where_it_helps():
    with pytest.raises(LoraError) as error:
        plan({".*bias": Lora(1)})
    assert "materialize" not in str(error.value)
    with pytest.raises(LoraError, match=r"materialize='layer_0/query/kernel'\.$"):
        plan({".*(bias|kernel)": Lora(1)}, fn=lambda p, x: jnp.tanh(p["layer_0"]["query"]["kernel"]) * x.sum())


def test_a_weight_used_in_two_ways_names_both():
    def two_ways(params, x):
        y = jnp.einsum("td,dhk->thk", x, params["w"])
        return y, jnp.einsum("th,dhk->tdk", x[:, :3], params["w"])

    with pytest.raises(
        LoraError, match=r"used in two ways: inputs 0, outputs 1 2 by .* inputs 1, outputs 0 2"
    ) as error:
        lora.plan(two_ways, {"w": jnp.ones((8, 3, 4))}, jnp.ones((5, 8)), rules={"w": Lora(2)})
    assert "test_plan.py" in str(error.value)


def test_one_body_used_in_two_ways():
    """The two calls share their equations; still, both uses are seen."""
    layer = jax.jit(lambda x, w: jnp.einsum("bi,ijk->bjk", x, w))

    def two_ways(params, x):
        return layer(x, params["w"]), layer(x, params["w"].transpose(1, 0, 2))

    with pytest.raises(LoraError, match="used in two ways"):
        lora.plan(two_ways, {"w": jnp.ones((4, 4, 3))}, jnp.ones((5, 4)), rules={"w": Lora(2)})


def test_a_field_called_value_is_a_field():
    """Only NNX's own level `value`, which has nothing beside it, is left out of a path."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    params = {"attention": Attention(jnp.ones((4, 3)), jnp.ones((4, 3)))}
    found = lora.plan(
        lambda p, x: x @ p["attention"].query + x @ p["attention"].value,
        params,
        jnp.ones((2, 4)),
        rules={".*/(query|value)": Lora(1)},
    )
    assert list(found) == ["attention/query", "attention/value"]


def test_init_takes_a_plan():
    with pytest.raises(LoraError, match=r"`plan` is rules, .*, expected a plan: make it with lora\.plan"):
        lora.init(jax.random.key(0), PARAMS, {".*kernel": Lora(2)})


def test_the_table_can_be_read():
    lines = str(CASES["two_layers"].plan(Lora(2, alpha=8))).splitlines()
    assert lines[0].split() == ["path", "shape", "axes", "rule", "parameters", "bytes", "FLOPs", "x", "thin"]
    assert lines[2].startswith("w1    [12, 10]  inputs 0, outputs 1  Lora(rank=2, alpha=8)")
    assert lines[-1].startswith("2 of 3 weights adapted: 88 parameters beside 250 (26.04%), 352 B.")
    assert K == 10


def layered(names, n=3, rules=None):
    """A plan of n layers with these weights [8, 8], `{i}` in their names being the layer."""
    params = {name.format(i=i): jnp.ones((8, 8)) for i in range(n) for name in names}

    def fn(params, x):
        for weight in params.values():
            x = x @ weight
        return x

    return lora.plan(fn, params, jnp.ones((3, 8)), rules=rules or {".*": Lora(2)})


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["layers_{i}/q", "layers_{i}/w1", "layers_{i}/w3"], {"layers_*/q": 3, "layers_*/w1": 3, "layers_*/w3": 3}),
        (["model/layers/{i}/q"], {"model/layers/*/q": 3}),
        (["h{i}/q", "embed"], {"embed": 1, "h*/q": 3}),
        (
            ["block_{i}/mlp_{i}/dense_0", "block_{i}/mlp_{i}/fc2"],
            {"block_*/mlp_*/dense_0": 3, "block_*/mlp_*/fc2": 3},
        ),
        (["l_{i}/e_0", "l_{i}/e_1"], {"l_*/e_*": 6}),
        (["encoder_2/layer.{i}.q"], {"encoder_2/layer.*.q": 3}),
    ],
)
def test_layers_are_one_row_with_their_count(names, rows):
    found = layered(names)
    lines = str(found).splitlines()
    body = [(line.split()[0], *line.split("Lora(rank=2)")[1].split()[:2]) for line in lines[2 : 2 + len(rows)]]
    assert body == [(name, str(n), str(32 * n)) for name, n in rows.items()]
    assert lines[2 + len(rows)].startswith(
        f"{len(found)} of {len(found)} weights adapted: {32 * len(found)} parameters"
    )
    assert len(found.table(grouped=False).splitlines()) == 2 + len(found) + 1
    assert [line.split()[0] for line in found.table(grouped=False).splitlines()[2:-1]] == list(found)


def test_only_what_is_alike_is_one_row():
    """Another rule, shape or use is another row; the sums are those of all rows, however they are grouped."""
    rules = {"layers_0/q": lora.LoraFa(2), "layers_1/q": Lora(3), "layers_5/q": None, ".*": Lora(2)}
    found = layered(["layers_{i}/q"], 6, rules)
    assert [line.split()[0] for line in str(found).splitlines()[2:5]] == ["layers_0/q", "layers_1/q", "layers_*/q"]
    trained = 16 + 48 + 3 * 32
    assert (found.parameters, found.fraction) == (trained, trained / (6 * 64 + trained + 16))
    for grouped in (True, False):
        assert f"5 of 6 weights adapted: {trained + 16} parameters ({trained} of them trained)" in found.table(grouped)
    assert repr(found) == f"Plan(5 of 6 weights adapted, {trained} parameters trained)"
    assert repr(found["layers_1/q"]) == "Target('layers_1/q', [8, 8], inputs 0, outputs 1, Lora(rank=3))"
    adapters = lora.init(jax.random.key(0), {f"layers_{i}/q": jnp.ones((8, 8)) for i in range(6)}, found)
    counted = sum(x.size for x in jax.tree.leaves(adapters))
    assert counted == trained + 16 + 2 * len(found), "with the ratios"


def test_notes_are_said_once_for_all_layers():
    params = {f"layers_{i}": {"wo": jnp.ones((2, 3, 8)), "odd": jnp.ones((8, 8))} for i in range(4)}

    def fn(params, x):
        for layer in params.values():
            x = jnp.einsum("thd,hdk->tk", (x @ jnp.tanh(layer["odd"]))[:, :6].reshape(-1, 2, 3), layer["wo"])
        return x

    text = str(lora.plan(fn, params, jnp.ones((3, 8)), rules={".*": Lora(2)}, materialize=".*odd"))
    assert text.count("is formed at full size") == 0
    assert text.count("4 x 'layers_*/odd' are formed at full size: ") == 1
    assert "'layers_0/wo' and 3 more [2, 3, 8]: axes 0 and 1 share one B." in text


def test_a_rule_without_a_hash_is_counted_too():
    class Mine(lora.Ia3):
        __hash__ = None

    assert layered(["{i}/q", "{i}/k"], 2, {".*q": Mine(), ".*": Lora(2)}).parameters == 2 * 8 + 2 * 32


def test_params_that_do_not_fit_the_plan():
    case = CASES["two_layers"]
    with pytest.raises(LoraError, match=r"'w1' of shape \[12, 10\], but these parameters have shape \[3, 10\]"):
        lora.init(jax.random.key(0), {**case.params(), "w1": jnp.ones((3, 10))}, case.plan(Lora(2)))
    with pytest.raises(LoraError, match=r"'w2' of shape \[10, 12\], but these parameters have no such path"):
        lora.init(jax.random.key(0), {"w1": case.params()["w1"]}, case.plan(Lora(2)))


def test_the_adapters_of_weights_alike_are_traced_once(monkeypatch):
    traced = []
    init = Lora.init
    monkeypatch.setattr(Lora, "init", lambda self, key, w, axes: traced.append(w.shape) or init(self, key, w, axes))
    params = {**{f"square_{i}": jnp.ones((8, 8)) for i in range(5)}, "out": jnp.ones((8, 3))}

    def chain(params, x):
        for i in range(5):
            x = x @ params[f"square_{i}"]
        return x @ params["out"]

    found = lora.plan(chain, params, jnp.ones((2, 8)), rules={"square_.*": Lora(lambda path, shape: 2), "out": Lora(2)})
    assert len(found) == 6
    assert sorted(traced) == [(8, 3), (8, 8)]
