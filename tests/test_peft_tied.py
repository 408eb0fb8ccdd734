"""Tables that are the head as well: in PEFT an adapter is of one end, in one tensor or parameter of both.

The oracle is a table of what PEFT computes with at either end, in numpy, from the meaning of each folder.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_peft import P, tensors_of
from test_peft_kinds import drawn, folder_of

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.key_maps import KeyMap, embedding, linear

TABLE, HEAD, QUERY = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
ROWS = "token_adapter.trainable_tokens_delta"
V, D, R = 11, 6, 2
BASE = drawn(
    0, **{f"{TABLE}.weight": (V, D), f"{QUERY}.weight": (D, D), "model.norm.weight": (D,), "model.last.weight": (3, D)}
)
W = BASE[f"{TABLE}.weight"]
PATH = "model/embed_tokens/embedding"


def published(folder, shards=1, stored=False, dtype=np.float32, **config):
    """A model that ties its head to its table, as transformers writes it."""
    tensors = BASE | ({f"{HEAD}.weight": W} if stored else {})
    names = sorted(tensors)
    files = [f"model-{i}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    folder.mkdir()
    for i, file in enumerate(files):
        own = {name: np.ascontiguousarray(tensors[name].astype(dtype)) for name in names[i::shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weights = {name: files[i % shards] for i, name in enumerate(names)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(facts | config))
    return folder


def ends_of(folder):
    """The table of the lookups and that of the head, as transformers loads them."""
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    table = tensors[f"{TABLE}.weight"]
    return table, table if tied else tensors[f"{HEAD}.weight"]


A, B = drawn(1, a=(R, V), b=(D, R)).values()
A2, B2 = drawn(2, a=(R, D), b=(V, R)).values()
OTHER, TRAINED, OWN = drawn(3, table=(V, D), rows=(2, D), own=(2, D)).values()
OF_TABLE = {f"{TABLE}.lora_embedding_A": A, f"{TABLE}.lora_embedding_B": B}
OF_HEAD = {f"{HEAD}.lora_A.weight": A2, f"{HEAD}.lora_B.weight": B2}
SAME_OF_HEAD = {f"{HEAD}.lora_A.weight": B.T, f"{HEAD}.lora_B.weight": A.T}
ADDED, ADDED_TO_HEAD = 2 * A.T @ B.T, 2 * B2 @ A2  # alpha is 4 and the rank 2


def with_rows(rows, at=(3, 5)):
    changed = W.copy()
    changed[list(at)] = rows
    return changed


# What a folder holds beside the query, what its config says of it, and what PEFT computes with at either end.
FOLDERS = {
    "table": (OF_TABLE, {"target_modules": ["embed_tokens"]}, W + ADDED, W),
    "head": (OF_HEAD, {"target_modules": ["lm_head"]}, W, W + ADDED_TO_HEAD),
    "each": (OF_TABLE | OF_HEAD, {"target_modules": ["embed_tokens", "lm_head"]}, W + ADDED, W + ADDED_TO_HEAD),
    "alike": (OF_TABLE | SAME_OF_HEAD, {"ensure_weight_tying": True}, W + ADDED, W + ADDED),
    "whole table": ({f"{TABLE}.weight": OTHER}, {"modules_to_save": ["embed_tokens"]}, OTHER, W),
    "whole head": ({f"{HEAD}.weight": OTHER}, {"modules_to_save": ["lm_head"]}, W, OTHER),
    "both whole": ({f"{HEAD}.weight": OTHER, f"{TABLE}.weight": OTHER}, {"ensure_weight_tying": True}, OTHER, OTHER),
    "new base": (OF_TABLE | {f"{TABLE}.base_layer.weight": OTHER}, {}, OTHER + ADDED, OTHER),
    "tokens": ({f"{TABLE}.{ROWS}": TRAINED}, {"trainable_token_indices": [3, 5]}, *2 * (with_rows(TRAINED),)),
    "tokens of the head": (
        {f"{HEAD}.{ROWS}": TRAINED},
        {"trainable_token_indices": {"lm_head": [3, 5]}},
        W,
        with_rows(TRAINED),
    ),
    "other tokens of the head": (
        {f"{TABLE}.{ROWS}": TRAINED, f"{HEAD}.{ROWS}": OWN},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [1, 2]}},
        with_rows(TRAINED),
        with_rows(OWN, (1, 2)),
    ),
}
OF_BOTH = ("alike", "both whole", "tokens")


def adapter(folder, name):
    tensors, config, *_ = FOLDERS[name]
    query = drawn(9, **{f"{QUERY}.lora_A.weight": (R, D), f"{QUERY}.lora_B.weight": (D, R)})
    options = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    return folder_of(folder, tensors | query, **options)


# Into files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "stored"),
    [(1, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, False), (1, True), (2, True)])],
)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_head_of_its_own_is_what_peft_computes(name, shards, stored, tmp_path):
    base = published(tmp_path / "base", shards, stored)
    folder = adapter(tmp_path / "adapter", name)
    lora.merge_checkpoint(base, folder, tmp_path / "out", tied="untie")
    for found, expected in zip(ends_of(tmp_path / "out"), FOLDERS[name][2:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    tensors = {n: t for path in sorted((tmp_path / "out").glob("*.safetensors")) for n, t in load_file(path).items()}
    for other in ("model.norm.weight", "model.last.weight"):
        np.testing.assert_array_equal(tensors[other], BASE[other])
    assert np.abs(tensors[f"{QUERY}.weight"] - BASE[f"{QUERY}.weight"]).max() > 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (name in OF_BOTH)
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(tensors)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for tensor, file in index["weight_map"].items():
            assert tensor in load_file(tmp_path / "out" / file)


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.sampled(1)
def test_one_tensor_holds_one_change(name, stored, tmp_path):
    """Refused unless both ends change alike, or are asked to; two changes do not fit into one tensor."""
    base = published(tmp_path / "base", stored=stored)
    folder = adapter(tmp_path / "adapter", name)
    lookups, head = FOLDERS[name][2:]
    if name not in OF_BOTH:
        with pytest.raises(lora.LoraError, match=r"has one tensor, 'model.embed_tokens.weight', for .*untie"):
            lora.merge_checkpoint(base, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    if name in ("each", "other tokens of the head"):
        with pytest.raises(lora.LoraError, match="both have changes of their own"):
            lora.merge_checkpoint(base, folder, tmp_path / "out", tied="both")
        return
    lora.merge_checkpoint(base, folder, tmp_path / "out", tied="refuse" if name in OF_BOTH else "both")
    expected = head if np.array_equal(lookups, W) else lookups
    for found in ends_of(tmp_path / "out"):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert (f"{HEAD}.weight" in tensors) == stored
    if stored:
        np.testing.assert_array_equal(tensors[f"{HEAD}.weight"], tensors[f"{TABLE}.weight"])


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, True),  # it says nothing, and the class has a head, which no file holds
        ({"tie_word_embeddings": None, "architectures": ["LlamaModel"]}, False),
        ({"tie_word_embeddings": None, "architectures": None}, False),
        ({"tie_word_embeddings": None, "architectures": ["T5ForConditionalGeneration"]}, True),
        ({"vocab_size": None}, True),
        ({"vocab_size": 5}, False),  # no table of tokens
    ],
)
def test_what_files_say_of_ties(config, tied, tmp_path):
    base = published(tmp_path / "base", **config)
    folder = adapter(tmp_path / "adapter", "table")
    if tied:
        with pytest.raises(lora.LoraError, match="has one tensor"):
            lora.merge_checkpoint(base, folder, tmp_path / "out")
    else:
        lora.merge_checkpoint(base, folder, tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")[f"{TABLE}.weight"]
        np.testing.assert_allclose(found, W + ADDED, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bert", None])
def test_heads_that_are_not_known_are_not_guessed(kind, tmp_path):
    """T5 scales what goes into a tied head, so that a copy of the table is another model."""
    base = published(tmp_path / "base", model_type=kind)
    folder = adapter(tmp_path / "adapter", "table")
    with pytest.raises(lora.LoraError, match=r"does not know what .* calls the head: save the model with tie_word_emb"):
        lora.merge_checkpoint(base, folder, tmp_path / "out", tied="untie")
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_program_with_one_table(tmp_path):
    """They are of both ends: said by name, or by parameters that have no other head."""
    base, params = published(tmp_path / "base"), TIED
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {PATH: lora.LoraAdapter(jnp.asarray(A.T), jnp.asarray(B.T), axes, 2.0)}
    own = params | {"lm_head/kernel": W.T}
    for given in (None, own):
        with pytest.raises(lora.LoraError, match="has one tensor"):
            lora.merge_checkpoint(base, adapters, tmp_path / "out", key_maps.LLAMA, params=given)
    lora.merge_checkpoint(base, adapters, tmp_path / "out", key_maps.LLAMA, params=params)
    lora.merge_checkpoint(base, adapters, tmp_path / "both", key_maps.LLAMA, tied="both")
    for folder in ("out", "both"):
        for found in ends_of(tmp_path / folder):
            np.testing.assert_allclose(found, W + ADDED, rtol=1e-5, atol=1e-5)
    lora.merge_checkpoint(base, adapters, tmp_path / "apart", key_maps.LLAMA, params=own, tied="untie")
    for found, expected in zip(ends_of(tmp_path / "apart"), (W + ADDED, W), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_a_new_head_of_other_dtypes(dtype, tmp_path):
    base = published(tmp_path / "base", dtype=dtype)
    lora.merge_checkpoint(base, adapter(tmp_path / "adapter", "head"), tmp_path / "out", tied="untie")
    table, head = ends_of(tmp_path / "out")
    assert table.dtype == head.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(table, W.astype(dtype))
    exact = W.astype(dtype).astype(np.float64) + ADDED_TO_HEAD
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(head.astype(np.float64), exact, rtol=max(eps, 1e-6), atol=1e-6)


def test_wrong_choices(tmp_path):
    base, folder = published(tmp_path / "base"), adapter(tmp_path / "adapter", "table")
    with pytest.raises(lora.LoraError, match="tied='yes': expected 'refuse', 'both' or 'untie'"):
        lora.merge_checkpoint(base, folder, tmp_path / "out", tied="yes")
    with pytest.raises(lora.LoraError, match=r"tied='untie'.*one parameter cannot be two"):
        lora.load_peft(folder, TIED, LLAMA, tied="untie")


# Into a program -------------------------------------------------------------------------------------------------------

LLAMA = key_maps.LLAMA
TIED = {PATH: jnp.asarray(W), "model/layers/0/self_attn/q_proj/kernel": jnp.asarray(BASE[f"{QUERY}.weight"].T)}
UNTIED = TIED | {"lm_head/kernel": jnp.asarray(W.T)}
IDS = jnp.arange(V)


def tied_program(p, ids):
    return jnp.tanh(p[PATH][ids] @ p["model/layers/0/self_attn/q_proj/kernel"]) @ p[PATH].T


def untied_program(p, ids):
    return jnp.tanh(p[PATH][ids] @ p["model/layers/0/self_attn/q_proj/kernel"]) @ p["lm_head/kernel"]


def by_hand(lookups, head, folder):
    a, b = (tensors_of(folder)[f"{P}{QUERY}.lora_{x}.weight"] for x in "AB")
    kernel = BASE[f"{QUERY}.weight"] + 2 * b @ a
    return np.tanh(lookups @ kernel.T) @ head.T


def planned(program, params, name):
    rules = {"model/layers.*": lora.Lora(R), f"{PATH}|lm_head.*": lora.Lora(R)}
    if "tokens" in name:
        rules[f"{PATH}|lm_head.*"] = lora.Rows((3, 5))
    return lora.plan(program, params, IDS, rules=rules)


@pytest.mark.parametrize("given", ["params", "plan"])
@pytest.mark.parametrize("name", ["table", "alike", "whole table", "both whole", "new base", "tokens"])
def test_one_parameter_for_both_ends(name, given, tmp_path):
    folder = adapter(tmp_path / "in", name)
    if given == "plan" and name not in ("table", "alike", "tokens"):
        return
    target = TIED if given == "params" else planned(tied_program, TIED, name)
    if name not in OF_BOTH:
        with pytest.raises(lora.LoraError, match=r"lookups of 'model.embed_tokens.weight' alone.*tied='both'"):
            lora.load_peft(folder, target, LLAMA)
    choice = "refuse" if name in OF_BOTH else "both"
    adapters, others = lora.load_peft(folder, target, LLAMA, tied=choice)
    with jax.default_matmul_precision("highest"):
        found = lora.lora_apply(tied_program)(TIED | others, adapters, IDS)
    lookups = FOLDERS[name][2]
    np.testing.assert_allclose(found, by_hand(lookups, lookups, folder), atol=2e-5)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "tokens"])
def test_two_parameters_hold_what_peft_computes(name, tmp_path):
    """Whatever is of one end, in a program with a head of its own. Trained tokens alone are of the table there."""
    folder = adapter(tmp_path / "in", name)
    adapters, others = lora.load_peft(folder, UNTIED, LLAMA)
    with jax.default_matmul_precision("highest"):
        found = lora.lora_apply(untied_program)(UNTIED | others, adapters, IDS)
    lookups, head = FOLDERS[name][2:]
    head = W if name == "new base" else head  # which a model that does not tie has of its own
    np.testing.assert_allclose(found, by_hand(lookups, head, folder), atol=2e-5)


@pytest.mark.parametrize("name", ["head", "each", "whole head", "tokens of the head"])
def test_a_change_of_the_head_alone_has_no_place_in_one_parameter(name, tmp_path):
    folder = adapter(tmp_path / "in", name)
    for choice in ("refuse", "both"):
        with pytest.raises(lora.LoraError, match=r"head.* tied to a table is no parameter of its own|lookups of"):
            lora.load_peft(folder, TIED, LLAMA, tied=choice)


@pytest.mark.parametrize("whole", [False, True])
def test_ends_that_differ_are_named(whole, tmp_path):
    """The copies of a file are equal, or one parameter cannot be both; no choice of `tied` is offered then."""
    folder = adapter(tmp_path / "in", "both whole" if whole else "each")
    if whole:
        tensors = tensors_of(folder)
        tensors[f"{P}{HEAD}.weight"] = tensors[f"{P}{HEAD}.weight"] + 1
        save_file(tensors, folder / "adapter_model.safetensors")
    for choice in ("refuse", "both"):
        with pytest.raises(
            lora.LoraError, match=f"changes both '{TABLE}.weight' and '{HEAD}.weight', and not"
        ) as error:
            lora.load_peft(folder, TIED, LLAMA, tied=choice)
        assert f"{PATH!r}" in str(error.value)
        assert "tied=" not in str(error.value)
    adapters, others = lora.load_peft(folder, UNTIED, LLAMA)  # with a head of its own, as the message says
    assert {PATH, "lm_head/kernel"} <= {*adapters, *others}


def test_a_table_without_a_head_is_no_question(tmp_path):
    """A plan shows that there are lookups alone; so do parameters that make nothing as wide as the table."""
    folder = adapter(tmp_path / "in", "table")

    def lookups(p, ids):
        return p[PATH][ids] @ p["model/layers/0/self_attn/q_proj/kernel"]

    assert len(lora.load_peft(folder, planned(lookups, TIED, "table"), LLAMA)[0]) == 2
    wide = KeyMap(embedding("emb", TABLE), linear("q", QUERY))
    edited = drawn(9, **{f"{QUERY}.lora_A.weight": (R, D), f"{QUERY}.lora_B.weight": (9, R)})
    options = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj"]}
    other = folder_of(tmp_path / "wide", OF_TABLE | edited, **options)
    assert len(lora.load_peft(other, {"emb": W, "q": np.zeros((D, 9), np.float32)}, wide)[0]) == 2


# And back -------------------------------------------------------------------------------------------------------------


def test_adapters_of_both_ends_are_written_for_both(tmp_path):
    folder = adapter(tmp_path / "in", "table")
    adapters, _ = lora.load_peft(folder, TIED, LLAMA, tied="both")
    with pytest.raises(lora.LoraError, match=f"'{PATH}' may be the head as well.*tied='both'.*tied='untie'"):
        lora.save_peft(tmp_path / "out", adapters, LLAMA, params=TIED)
    lora.save_peft(tmp_path / "out", adapters, LLAMA, params=TIED, tied="both")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"]
    assert config["target_modules"] == [HEAD, TABLE, QUERY]
    tensors = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(tensors[f"{P}{HEAD}.lora_A.weight"], B.T)
    np.testing.assert_array_equal(tensors[f"{P}{HEAD}.lora_B.weight"], A.T)
    again, _ = lora.load_peft(tmp_path / "out", TIED, LLAMA)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    for one, other in zip(*map(jax.tree.leaves, (again, adapters)), strict=True):
        np.testing.assert_array_equal(one, other)
    apart, _ = lora.load_peft(tmp_path / "out", UNTIED, LLAMA)
    merged = lora.merge(UNTIED, apart)
    np.testing.assert_allclose(merged["lm_head/kernel"], merged[PATH].T, rtol=1e-6, atol=1e-6)


def test_lookups_alone_are_written_alone(tmp_path):
    """By name, and for a program that has a head of its own."""
    folder = adapter(tmp_path / "in", "table")
    adapters, _ = lora.load_peft(folder, TIED, LLAMA, tied="both")
    lora.save_peft(tmp_path / "one", adapters, LLAMA, params=TIED, tied="untie")
    lora.save_peft(tmp_path / "two", adapters, LLAMA, params=UNTIED)
    for name in ("one", "two"):
        assert sorted(tensors_of(tmp_path / name)) == sorted(tensors_of(folder))


def test_a_table_of_both_ends_that_was_trained_whole(tmp_path):
    query, _ = lora.load_peft(adapter(tmp_path / "in", "tokens"), TIED, LLAMA)
    rows = query.pop(PATH)
    others = {PATH: jnp.asarray(OTHER)}
    with pytest.raises(lora.LoraError, match="may be the head as well"):
        lora.save_peft(tmp_path / "out", query, LLAMA, others=others, params=TIED)
    lora.save_peft(tmp_path / "out", query, LLAMA, others=others, params=TIED, tied="both")
    tensors = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(tensors[f"{P}{HEAD}.weight"], OTHER)
    np.testing.assert_array_equal(tensors[f"{P}{TABLE}.weight"], OTHER)
    _, found = lora.load_peft(tmp_path / "out", TIED, LLAMA)
    np.testing.assert_array_equal(found[PATH], OTHER)
    lora.save_peft(tmp_path / "rows", query | {PATH: rows}, LLAMA, params=TIED)  # of both ends in PEFT too


def test_heads_that_cannot_be_written(tmp_path):
    folder = adapter(tmp_path / "in", "table")
    adapters, _ = lora.load_peft(folder, TIED, LLAMA, tied="both")
    no_head = KeyMap(embedding(PATH, TABLE), linear("model/layers/0/self_attn/q_proj/kernel", QUERY))
    with pytest.raises(lora.LoraError, match="the key map does not say what torch calls it: add an entry"):
        lora.save_peft(tmp_path / "out", adapters, no_head, tied="both")
    axes = lora.KernelAxes((), (0,), (1,))
    lengths = {PATH: lora.Dora(R).init(jax.random.key(0), TIED[PATH], axes)}
    with pytest.raises(lora.LoraError, match="an adapter of DORA, which is no such one of the head: merge it"):
        lora.save_peft(tmp_path / "out", lengths, LLAMA, tied="both")
    both, _ = lora.load_peft(adapter(tmp_path / "each", "each"), UNTIED, LLAMA)
    with pytest.raises(lora.LoraError, match="lm_head has an adapter of its own"):
        lora.save_peft(tmp_path / "out", both, LLAMA, tied="both")
    with pytest.raises(lora.LoraError, match="profile='loralib' has no tied heads"):
        lora.save_peft(tmp_path / "out", adapters, LLAMA, tied="both", profile="loralib")
    assert not (tmp_path / "out").exists()
