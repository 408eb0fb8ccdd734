"""examples/dpo.py and grpo.py: they compute what the papers say, with one copy of the base, and they learn."""

import dpo
import grpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sums

import lora_jax as lora
from lora_jax.analysis import hlo


@pytest.fixture(scope="module")
def model():
    return sums.random_model()


@pytest.fixture(scope="module")
def adapters(model):
    """Adapters as if they were trained."""
    made = lora.init(jax.random.key(0), model.params, model.plan(lora.Lora(rank=4, alpha=8)))
    noise = np.random.default_rng(0)
    mask = lora.trainable_mask(made)
    return jax.tree.map(lambda a, m: a + 0.3 * m * jnp.asarray(noise.normal(size=a.shape), a.dtype), made, mask)


@pytest.fixture(scope="module")
def answers():
    """Eight prompts with answers of all lengths, 0 to 3 tokens, of which those of 3 have no stop."""
    prompts, texts = sums.PROMPTS[::13], ["5", "12", "", "123", "7", "31", "0", "999"]
    return sums.examples(prompts, [sums.encode(text) for text in texts])


@pytest.fixture(scope="module")
def log_probs(model, adapters, answers):
    """Those of the answers' tokens, by the whole logits of merged weights and of the base, in fp64 [2, N, A]."""
    ids, labels = answers

    def of(params):
        logits = np.asarray(model.logits(params, ids[:, :-1]), np.float64)[:, sums.PROMPT - 1 :]
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return np.where(labels == sums.NOTHING, 0, found)

    return of(lora.merge(model.params, adapters)), of(model.params)


def test_texts_have_labels_up_to_their_stop():
    ids, labels = sums.examples([sums.encode("7+5="), sums.encode("1+2=")], [sums.encode("12"), sums.encode("3")])
    assert ["".join(sums.SYMBOLS[i] for i in row) for row in ids] == ["7+5=12.", "1+2=3.."]
    assert labels.tolist() == [[1, 2, sums.STOP], [3, sums.STOP, sums.NOTHING]]
    assert sums.is_right(sums.encode("7+5="), sums.encode("12"))
    assert not any(sums.is_right(sums.encode("7+5="), sums.encode(text)) for text in ("13", "1", "012", ""))
    assert sorted(sums.HELD_OUT + sums.TRAINED) == sorted(sums.PROMPTS)


def test_the_loss_of_dpo_is_that_of_the_paper(model, adapters, answers, log_probs):
    """Equation 7, of whole answers; beside it, the loss of the chosen one's tokens."""
    ids, labels = (a.reshape(4, 2, -1) for a in answers)
    policy, reference = (p.sum(-1).reshape(4, 2) for p in log_probs)
    rewards = dpo.BETA * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    assert np.ptp(margins) > 0.01
    wanted = np.mean(np.log1p(np.exp(-margins)))
    plain, anchored = (dpo.make_loss(model)(adapters, model.params, ids, labels, weight) for weight in (0.0, 2.0))
    np.testing.assert_allclose(plain[0], wanted, rtol=1e-5)
    np.testing.assert_allclose([plain[1]["dpo"], anchored[1]["dpo"]], wanted, rtol=1e-5)
    np.testing.assert_allclose(plain[1]["margin"], margins.mean(), rtol=1e-4)
    lengths = (labels[:, 0] != sums.NOTHING).sum(-1)
    np.testing.assert_allclose(anchored[0], wanted - 2 * np.mean(policy[:, 0] / lengths), rtol=1e-5)


def test_the_loss_of_grpo_is_that_of_the_paper(model, adapters, answers, log_probs):
    """Equation 3, token by token: the mean over the tokens of each answer, then over the answers."""
    ids, labels = answers
    noise = np.random.default_rng(1)
    advantage, old = noise.normal(size=8), log_probs[0] + noise.normal(size=labels.shape, scale=0.3)
    gains, kls, ratios = [], [], []
    for n in range(8):
        length = (labels[n] != sums.NOTHING).sum()
        for t in range(length):
            log_p, log_ref = log_probs[0][n, t], log_probs[1][n, t]
            r = np.exp(log_p - old[n, t])
            ratios.append(r)
            clipped = np.clip(r, 1 - grpo.EPS, 1 + grpo.EPS)
            kl = np.exp(log_ref - log_p) - (log_ref - log_p) - 1
            gains.append((min(r * advantage[n], clipped * advantage[n]) - grpo.BETA * kl) / length / 8)
            kls.append(kl / length / 8)
    assert min(ratios) < 1 - grpo.EPS < 1 + grpo.EPS < max(ratios)
    batch = {"ids": ids, "labels": labels, "advantages": advantage.astype(np.float32), "old": old.astype(np.float32)}
    loss, log_p = grpo.make_loss(model)
    found, shown = loss(adapters, model.params, batch)
    np.testing.assert_allclose(found, -sum(gains), rtol=1e-4)
    np.testing.assert_allclose(shown["kl"], sum(kls), rtol=1e-4)
    np.testing.assert_allclose(log_p(adapters, model.params, batch), log_probs[0], rtol=1e-4, atol=1e-5)


def test_k3_is_the_divergence_in_the_mean():
    """Over all of a distribution, weighted by it: sum p (q / p - 1 - log(q / p)) = KL(p || q)."""
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.3, 0.3, 0.4])
    each = grpo.k3(jnp.log(p), jnp.log(q))
    assert (each > 0).all()
    np.testing.assert_allclose((p * np.asarray(each)).sum(), (p * np.log(p / q)).sum(), rtol=1e-5)


def test_advantages_are_within_a_group():
    rewards = np.array([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1.0]])
    found = grpo.advantages(rewards)
    np.testing.assert_allclose(found[0], [1, -1, -1, 1], rtol=1e-3)
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-9)
    assert found[2, 3] > 1 > 0 > found[2, 0]


# One base -------------------------------------------------------------------------------------------------------------


def losses_of(model):
    """Each example's loss, with a batch for it."""
    ids, labels = sums.examples(sums.PROMPTS[:4], [sums.encode(str(n)) for n in range(4)])
    groups = {"ids": ids, "labels": labels, "advantages": np.ones(4, np.float32)}
    groups["old"] = np.zeros(labels.shape, np.float32)
    return {
        "dpo": (dpo.make_loss(model), (ids.reshape(2, 2, -1), labels.reshape(2, 2, -1), np.float32(1))),
        "grpo": (grpo.make_loss(model)[0], (groups,)),
    }


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


HANDED_ON = {"parameter", "get-tuple-element", "tuple", "while", "call", "bitcast"}
SLICED = HANDED_ON | {
    "dynamic-slice",
    "slice",
    "transpose",
    "copy",
    "fusion",
    "reshape",
}  # of one layer, to be multiplied by


@pytest.mark.parametrize("name", ["dpo", "grpo"])
@pytest.mark.slow
def test_policy_and_reference_are_one_program_with_one_base(name):
    """The compiled step is given each weight once, hands it on as it is, and makes nothing of a weight's shape."""
    model = sums.random_model(hidden_size=40, intermediate_size=136)  # sizes that nothing else has
    loss, batch = losses_of(model)[name]
    optimizer = lora.freeze_base(optax.adam(1e-3))
    adapters = lora.init(jax.random.key(0), model.params, model.plan(lora.Lora(rank=2)))
    state = lora.TrainState.create(adapters, optimizer)
    compiled = lora.jit_step(loss, optimizer).lower(state, model.params, *batch).compile()

    found, base = compiled.memory_analysis(), nbytes(model.params)
    unused = jax.tree.leaves(adapters)[0].nbytes
    assert found.argument_size_in_bytes <= base + nbytes(state) + nbytes(batch)
    assert found.argument_size_in_bytes > base
    assert found.output_size_in_bytes < nbytes(state) + 1024 < base + unused

    module = hlo.parse(compiled.as_text())
    weights = [leaf.shape for leaf in jax.tree.leaves(model.params) if leaf.ndim > 2]
    layers = {shape[1:] for shape in weights} | {(40, 64), (40, 32), (64, 40)}  # heads are one axis in products
    given = [
        shape
        for one in module.computations[module.entry]
        if one.operation == "parameter"
        for _, shape, _ in hlo.arrays(one.results)
        if shape in weights
    ]
    assert sorted(given) == sorted(weights)
    for one in (one for ones in module.computations.values() for one in ones):
        for _, shape, _ in hlo.arrays(one.results):
            assert shape not in weights or one.operation in HANDED_ON, one
            assert shape not in layers or one.operation in SLICED, one


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return sums.make_base()


@pytest.fixture
def with_base(base, monkeypatch):
    monkeypatch.setattr(sums, "make_base", lambda: base)


@pytest.mark.slow
def test_dpo_learns_to_prefer_right_answers(with_base, base, tmp_path, capsys):
    found = dpo.main(tmp_path, steps=12)
    assert found["unchanged"]
    for name in dpo.ANCHORS:
        (_, first), *_, (_, last) = found["dpo"][name]
        assert first == pytest.approx(np.log(2), abs=1e-5)
        assert last < 0.5 * first
    (_, before), *_, (_, after) = found["chance"][list(dpo.ANCHORS)[-1]]
    assert 0.4 < before < 0.6
    assert after > before + 0.2, "of sums without pairs"
    asked = sums.HELD_OUT * 20
    answers = sums.sample(base, found["adapters"], asked, jax.random.key(5))
    share = np.mean([sums.is_right(*pair) for pair in zip(asked, answers, strict=True)])
    assert abs(share - after) < 5 * (after * (1 - after) / 400) ** 0.5, "the chance is that of the answers it samples"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "bit-identical: True" in capsys.readouterr().out


@pytest.mark.slow
def test_grpo_raises_the_reward(with_base, tmp_path, capsys):
    found = grpo.main(tmp_path, steps=16)
    assert found["unchanged"]
    rewards = np.array([reward for _, reward in found["reward"]])
    spread = (0.25 / (grpo.P * grpo.G)) ** 0.5  # of the mean reward of a step, by chance alone
    assert 0.4 < rewards[:2].mean() < 0.65
    assert rewards[-3:].mean() > rewards[:2].mean() + 6 * spread
    assert found["held out"][-1][1] > found["held out"][0][1] + 0.2, "of sums without rewards"
    assert all(kl >= 0 for _, kl in found["kl"])
    assert found["kl"][-1][1] > found["kl"][0][1]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "bit-identical: True" in capsys.readouterr().out
