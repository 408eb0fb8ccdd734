"""The comparison of methods at tiny sizes; and the encoder that is written out for what is no adapter of a weight."""

import dataclasses
import functools
from pathlib import Path

import assets
import compare_methods as comparison
import finetune_sharded as sharded
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import snippets

import lora_jax as lora

pytestmark = pytest.mark.slow  # an example

SETTING = comparison.QUICK
FEW = tuple(m for m in comparison.QUICK_METHODS if m.name in ("LoRA", "AdaLoRA"))


@pytest.fixture(scope="module")
def task():
    return comparison.quick_task(SETTING)


@pytest.fixture(scope="module")
def flax_task():
    """Two layers, of the encoder that is not written out."""
    return peers.Task(**vars(sharded.tiny_task()), heads=4)


@pytest.fixture(scope="module")
def batch(flax_task):
    return snippets.pad(flax_task.splits["train"].tokens[:5], 5)


def close(a, b):
    return bool(jnp.abs(a - b).max() < 1e-5)


def test_the_encoder_that_is_written_out_is_the_encoder(flax_task, batch):
    assert close(peers.encode(flax_task.params, *batch, heads=4), flax_task.encode(flax_task.params, *batch))


def test_a_bottleneck_starts_without_a_change(flax_task, batch):
    states, start = peers.bottleneck(flax_task, 3)
    trained, plain = start(jax.random.key(0)), flax_task.encode(flax_task.params, *batch)
    assert close(states(trained, flax_task.params, *batch), plain)
    up = trained["layer_1"]["output"]["up"]
    up["kernel"] = up["kernel"].at[0, 0].add(1.0)
    assert not close(states(trained, flax_task.params, *batch), plain)


@pytest.mark.parametrize("method", [peers.prefix, peers.prompt])
def test_vectors_that_are_not_seen_change_nothing(flax_task, batch, method):
    states, start = method(flax_task, 3)
    trained, (ids, mask) = start(jax.random.key(0)), batch
    extra = {"prompt": trained["prompt"]} if method is peers.prompt else {"prefixes": trained}
    plain = flax_task.encode(flax_task.params, ids, mask)
    for seen in (False, True):
        wide = np.concatenate([np.full((5, 3), seen), mask], 1)
        out = peers.encode(flax_task.params, ids, wide, 4, **extra)
        assert close(out, plain) != seen
    assert close(states(trained, flax_task.params, ids, mask), out)


def test_a_prefix_of_a_sentence_s_own_keys_and_values_changes_nothing(flax_task):
    """Each of them is then there twice, and has half of the weight."""
    sentence = flax_task.splits["train"].tokens[0]
    ids = jnp.array([sentence])
    p = flax_task.params
    x = peers.norm(p["norm"], peers.embed(p, ids))
    prefixes = {}
    for name in peers.layers(p):
        prefixes[name] = {kind: peers.dense(p[name]["attention"][kind], x)[0] for kind in ("key", "value")}
        x = peers.block(p[name], x, ids > 0, 4)
    twice = peers.encode(p, ids, np.ones((1, 2 * len(sentence)), bool), 4, prefixes=prefixes)
    assert close(twice, flax_task.encode(p, ids, ids > 0))


def numbers(task, name):
    """What the method trains, with the head."""
    [method] = [m for m in comparison.QUICK_METHODS if m.name == name]
    _, start = method.make(task, method.sizes[0])
    return comparison.trained_numbers({"encoder": start(jax.random.key(0)), "head": jnp.zeros(16 * 2 + 2)})


def test_what_is_trained_is_counted(task):
    d, inner, r, head = 16, 32, 4, 16 * 2 + 2
    assert numbers(task, "LoRA") == r * (4 * 2 * d + 2 * (d + inner)) + head
    assert numbers(task, "LoRA-FA") == r * (4 * d + d + inner) + head
    assert numbers(task, "IA3") == 2 * d + inner + head
    assert numbers(task, "prefix") == 4 * 2 * d + head
    assert numbers(task, "probe") == head


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was(task, tmp_path, monkeypatch):
    build = comparison.build
    compiled = functools.cache(lambda method, size: build(task, method, size, SETTING))
    monkeypatch.setattr(comparison, "build", lambda _, method, size, __: compiled(method, size))
    whole = comparison.Results.open(tmp_path / "whole.json", SETTING)
    comparison.compare(task, SETTING, whole, FEW)
    assert len(whole.runs) == len(FEW) * SETTING.seeds

    train, left = comparison.train, iter(range(3))

    def killed(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train(*arguments)

    path = tmp_path / "part.json"
    monkeypatch.setattr(comparison, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(task, SETTING, comparison.Results.open(path, SETTING), FEW)
    part = comparison.Results.open(path, SETTING)
    assert part.runs == whole.runs[:3]
    monkeypatch.setattr(comparison, "train", train)
    comparison.compare(task, SETTING, part, FEW)
    assert part.runs == whole.runs

    monkeypatch.setattr(comparison, "train", killed)
    comparison.compare(task, SETTING, comparison.Results.open(path, SETTING), FEW)  # nothing is left to run
    with pytest.raises(lora.LoraError, match=r"has results of .*'steps': 2.* expected .*'steps': 80"):
        comparison.Results.open(path, comparison.Setting())

    found = comparison.rows(part, FEW)
    comparison.draw(found, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    lines = comparison.table(found).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["LoRA, rank 4", "AdaLoRA, rank 4"]
    assert "±" in lines[2]
    assert lines[2].endswith("1.00")


def test_the_best_rate_is_that_of_the_validation_sentences_and_only_it_is_tested(task, tmp_path, monkeypatch):
    method = dataclasses.replace(FEW[0], rates=(1e-3, 2e-3, 3e-3))
    scores = {1e-3: (0.6, 0.5), 2e-3: (0.8, 0.5), 3e-3: (0.8, 0.7)}

    def train(task, program, setting, seed, rate):
        return {}, {"trained": 1} | dict(zip(("validation", "loss"), scores[rate], strict=True))

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison, "build", lambda *_: None)
    monkeypatch.setattr(comparison, "ask", lambda *_: 0.5)
    monkeypatch.setattr(comparison, "time_in_turn", lambda *_: {"LoRA": [1.0]})
    results = comparison.Results.open(tmp_path / "methods.json", SETTING)
    comparison.compare(task, SETTING, results, [method])
    assert [(run["rate"], run["seed"], "nyt" in run) for run in results.runs] == [
        (1e-3, 0, True),  # the best so far
        (2e-3, 0, True),
        (3e-3, 0, False),
        (2e-3, 1, True),
    ]


def test_the_picture_in_docs_is_of_these_methods():
    published = Path(comparison.__file__).parents[1] / "docs" / "methods.json"
    setting = comparison.Setting()
    found = comparison.rows(comparison.Results.open(published, setting))
    assert all(len(accuracy) == setting.seeds for row in found for accuracy in row.accuracy.values())
    assert sum(row.time is not None for row in found) == len(comparison.METHODS)


def test_samples_of_sentences():
    split = snippets.Split([[1] * n for n in (2, 9, 3, 4, 5, 6, 7)], np.array([1, 1, 1, 0, 0, 1, 1], np.int32))
    assert list(map(len, snippets.shorter(split, 6).tokens)) == [2, 3, 4, 5, 6]
    assert snippets.shorter(split, 6).labels.tolist() == [1, 1, 0, 0, 1]
    half = snippets.balanced(split, 4)
    assert sorted(half.labels) == [0, 0, 1, 1]
    assert len({len(row) for row in half.tokens}) == 4
    assert len(snippets.balanced(split, 100)) == len(split)


@pytest.mark.assets
@pytest.mark.skipif(
    assets.cached(assets.VADER_TRANSFER) is None, reason="the snippets are not in the cache; `make assets` brings them"
)
def test_the_sentences_of_the_transfer_are_right():
    amazon, nyt = map(snippets.read, assets.fetch(assets.VADER_TRANSFER))
    assert (len(amazon), sum(label for _, label in amazon)) == (1_750 + 1_235, 1_750)
    assert (len(nyt), sum(label for _, label in nyt)) == (1_187 + 1_783, 1_187)
