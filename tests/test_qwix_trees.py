"""The trees of qwix, tunix and MaxText by their documented layouts; tests/interop_qwix has the real qwix."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lora_jax as lora
from lora_jax.interop.qwix_trees import from_qwix, load_maxtext, to_qwix

D, H, S, L, E, R = 6, 2, 4, 3, 5, 2
PARAMS = {
    "dense": {"kernel": jnp.ones((D, H * S))},
    "heads": {"w": jnp.ones((D, H, S))},
    "out": {"kernel": jnp.ones((H, S, D))},
    "layers": {"q": {"kernel": jnp.ones((D, L, H, S))}},  # scanned along axis 1, as MaxText has them
    "experts": jnp.ones((E, D, S)),
}


def model(p, x):
    y = x @ p["dense"]["kernel"] + jnp.einsum("bd,dhs->bhs", x, p["heads"]["w"]).reshape(len(x), -1)
    x = x + jnp.einsum("bhs,hsd->bd", y.reshape(-1, H, S), p["out"]["kernel"])
    x = (
        x
        + jax.lax.scan(
            lambda x, w: (x + jnp.einsum("bd,dhs->bhs", x, w).sum((1, 2))[:, None], None),
            x,
            jnp.moveaxis(p["layers"]["q"]["kernel"], 1, 0),
        )[0]
    )
    return jnp.einsum("bed,eds->bes", jnp.broadcast_to(x[:, None], (len(x), E, D)), p["experts"])


PLAN = lora.plan(model, PARAMS, jnp.ones((1, D)), rules={".*": lora.Lora(rank=R)})
SHAPES = {
    "dense/kernel": ((D, R), (R, H * S)),
    "heads/w": ((D, R), (R, H, S)),  # by an einsum
    "out/kernel": ((H * S, R), (R, D)),  # by a product that flattens
    "layers/q/kernel": ((D, L, R), (R, L, H * S)),
    "experts": ((E, D, R), (R, S)),  # an einsum has one B for all
}


def tree_of(shapes=SHAPES, wrapped=True):
    """Random factors in these shapes, nested and beside their kernels."""
    rng, tree = np.random.default_rng(0), {}
    for path, pair in shapes.items():
        *parts, last = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        for ending, shape in zip("ab", pair, strict=True):
            node[f"{last}_lora_{ending}"] = rng.normal(size=shape).astype(np.float32)
    tree["dense"]["kernel"] = np.ones((D, H * S), np.float32)
    return {"params": {"params": tree}} if wrapped else tree


def changes_by_hand(tree, scale):
    """Each kernel's change, by the einsum that says what qwix computes."""
    t = tree["params"]["params"]
    sums = {
        "dense/kernel": ("dr,ro->do", t["dense"]["kernel_lora_a"], t["dense"]["kernel_lora_b"]),
        "heads/w": ("dr,rhs->dhs", t["heads"]["w_lora_a"], t["heads"]["w_lora_b"]),
        "out/kernel": ("ir,rd->id", t["out"]["kernel_lora_a"], t["out"]["kernel_lora_b"]),
        "layers/q/kernel": ("dlr,rlo->dlo", t["layers"]["q"]["kernel_lora_a"], t["layers"]["q"]["kernel_lora_b"]),
        "experts": ("edr,rs->eds", t["experts_lora_a"], t["experts_lora_b"]),
    }
    return {path: scale * np.einsum(*of).reshape(PLAN[path].shape) for path, of in sums.items()}


def test_changes_are_those_of_qwix():
    tree = tree_of()
    adapters = from_qwix(tree, PLAN, alpha=8.0)
    merged = lora.merge(PARAMS, adapters)
    for path, change in changes_by_hand(tree, 8.0 / R).items():
        found = merged
        for part in path.split("/"):
            found = found[part]
        np.testing.assert_allclose(found - 1, change, rtol=1e-5, atol=1e-5)


def test_to_a_tree_and_back():
    tree = tree_of()
    adapters = from_qwix(tree, PLAN, alpha=8.0)
    jax.tree.map(np.testing.assert_array_equal, to_qwix(adapters, tree, alpha=8.0), tree)
    again = from_qwix(to_qwix(adapters, tree, alpha=4.0), PLAN, alpha=4.0)  # twice B, exactly
    jax.tree.map(np.testing.assert_array_equal, lora.merge(PARAMS, again), lora.merge(PARAMS, adapters))
    wide = jax.tree.map(lambda leaf: leaf, tree_of({"dense/kernel": ((D, 5), (5, H * S))}))
    one = {"dense/kernel": adapters["dense/kernel"]}
    filled = to_qwix(one, wide, alpha=5.0)["params"]["params"]["dense"]
    np.testing.assert_array_equal(filled["kernel_lora_a"][:, :R], one["dense/kernel"].a)
    assert not filled["kernel_lora_a"][:, R:].any()
    np.testing.assert_array_equal(filled["kernel_lora_b"][:R], one["dense/kernel"].b * 4.0)
    none = to_qwix({}, wide, alpha=5.0)["params"]["params"]["dense"]
    assert not none["kernel_lora_b"].any()


def save(folder, tree, **custom):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "items", tree)
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": custom}))


def test_a_checkpoint_of_maxtext(tmp_path):
    """With the states of an optimizer beside, which have the same names, and alpha in orbax's metadata."""
    tree = tree_of() | {"opt_state": [{"mu": tree_of()}], "step": np.asarray(3)}
    save(tmp_path / "200", tree, lora={"lora_rank": R, "lora_alpha": 8.0}, scan_layers=True)
    expected = from_qwix(tree_of(), PLAN, alpha=8.0)
    for folder in (tmp_path / "200", tmp_path / "200" / "items"):
        jax.tree.map(np.testing.assert_array_equal, load_maxtext(folder, PLAN), expected)
    with pytest.raises(lora.LoraError, match=r"was trained with alpha 8\.0, and alpha=4 is given"):
        load_maxtext(tmp_path / "200", PLAN, alpha=4)
    save(tmp_path / "300", tree_of(wrapped=False))
    with pytest.raises(lora.LoraError, match="does not say alpha"):
        load_maxtext(tmp_path / "300", PLAN)
    jax.tree.map(np.testing.assert_array_equal, load_maxtext(tmp_path / "300", PLAN, alpha=8.0), expected)


def test_damaged_checkpoints(tmp_path):
    with pytest.raises(lora.LoraError, match="there is no folder"):
        load_maxtext(tmp_path / "none", PLAN, alpha=8.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(lora.LoraError, match="is no tree that orbax has saved"):
        load_maxtext(tmp_path / "empty", PLAN, alpha=8.0)
    (tmp_path / "empty" / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"lora": {"lora_alpha": "8"}}}')
    with pytest.raises(lora.LoraError, match=r"lora_alpha is .+, expected a number"):
        load_maxtext(tmp_path / "empty", PLAN)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (SHAPES | {"other/kernel": ((D, R), (R, D))}, "factors of 'other/kernel', and 0 more that the plan does not"),
        ({path: pair for path, pair in SHAPES.items() if path != "experts"}, "no factors of 'experts'"),
        (SHAPES | {"heads/w": ((H, R), (R, D, S))}, r"'heads/w' of shape \[6, 2, 4\] has factors \[2, 2\]"),
        (SHAPES | {"layers/q/kernel": ((L, D, R), (L, R, H * S))}, r"'layers/q/kernel' of shape \[6, 3, 2, 4\]"),
        (SHAPES | {"dense/kernel": ((D, R), (R + 1, H * S))}, "another model, or the plan is"),
        (SHAPES | {"dense/kernel": ((D, 0), (0, H * S))}, "another model, or the plan is"),
    ],
)
def test_trees_of_other_models(shapes, says):
    with pytest.raises(lora.LoraError, match=says):
        from_qwix(tree_of(shapes), PLAN, alpha=8.0)


def test_mistakes():
    tree = tree_of()
    adapters = from_qwix(tree, PLAN, alpha=8.0)
    with pytest.raises(lora.LoraError, match="no leaves of qwix's LoRA"):
        from_qwix(PARAMS, PLAN, alpha=8.0)
    with pytest.raises(lora.LoraError, match="plan"):
        from_qwix(tree, PARAMS, alpha=8.0)
    with pytest.raises(lora.LoraError, match="alpha is 0"):
        from_qwix(tree, PLAN, alpha=0)
    del tree["params"]["params"]["experts_lora_b"]
    with pytest.raises(lora.LoraError, match="'experts_lora_a' without its partner"):
        from_qwix(tree, PLAN, alpha=8.0)
    with pytest.raises(lora.LoraError, match="has rank 2, and the tree has rank 1"):
        to_qwix({"dense/kernel": adapters["dense/kernel"]}, tree_of({"dense/kernel": ((D, 1), (1, H * S))}), alpha=1.0)
    with pytest.raises(lora.LoraError, match="no factors of 'heads/w'"):
        to_qwix({"heads/w": adapters["heads/w"]}, tree_of({"dense/kernel": ((D, 1), (1, H * S))}), alpha=1.0)
    own = jax.tree.map(lambda leaf: leaf + jnp.arange(leaf.size).reshape(leaf.shape), adapters["experts"])
    with pytest.raises(lora.LoraError, match="qwix has one for all of them"):
        to_qwix({"experts": own}, tree_of(), alpha=1.0)
