"""A training run of `lora.recipes`, and the commands `train`, `generate` and `eval`, on a tiny random model."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import make_folder
from code_blocks import ROOT, blocks_of, commands_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pairs import FAST, LIMIT, ended
from test_recipes_models import facts_of, tensors_of, write

import lora_jax as lora
from lora_jax import cli
from lora_jax.cli import commands
from lora_jax.cli import train as train_command
from lora_jax.recipes import meter, objectives, options, packed_rows, records, training_run
from lora_jax.recipes.held_out import write_samples
from lora_jax.recipes.tokens import Tokenized, TokenizedPairs
from lora_jax.recipes.training_run import prepare

pytestmark = pytest.mark.xdist_group("finetune")  # two runs are trained, and read by several tests
SMALL = lora.recipes.Options(rank=4, max_length=32, batch_tokens=8 * 32, lr=3e-2, eval_every=2, samples=0, epochs=3)
WHERE = ("barn", "lake", "wood")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model of a few thousand parameters, and conversations and preferences that it can learn."""
    folder = tmp_path_factory.mktemp("finetune")
    facts = facts_of("llama", vocab_size=272, eos_token_id=[264])
    write(folder / "model", facts, tensors_of(facts))
    make_folder(folder / "model", "chatml")
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": WHERE[n % 3]}]}
        for n in range(40)
    ]
    pairs = [{"prompt": f"{n} ", "chosen": "yes", "rejected": "no"} for n in range(40)]
    for name, lines in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(places):
    return lora.recipes.Tokenizer.load(places / "model")


@pytest.fixture(scope="module")
def model(places):
    return lora.recipes.load(places / "model")


@pytest.fixture(scope="module")
def chats(places, tokenizer):
    return lora.recipes.tokenized(lora.recipes.read_examples(places / "chats.jsonl"), tokenizer, 32)


@pytest.fixture(scope="module")
def pairs(places, tokenizer):
    return lora.recipes.tokenized_pairs(lora.recipes.read_examples(places / "pairs.jsonl"), tokenizer, 32)


@pytest.fixture(scope="module")
def whole_run(model, chats, tmp_path_factory):
    """A run from its beginning to its end, which others are compared with."""
    train, held_out = lora.recipes.hold_out(chats, 0.2)
    folder = tmp_path_factory.mktemp("whole")
    return lora.recipes.finetune(model, train, held_out, folder / "run", SMALL), train, held_out


def losses(result, name="loss"):
    return {line["step"]: line[name] for line in result.log if name in line}


# A run ----------------------------------------------------------------------------------------------------------------


def test_the_loss_of_examples_that_were_never_seen_falls(whole_run, model):
    result, _, held_out = whole_run
    assert result.after < 0.95 * result.before
    assert result.steps == max(losses(result))
    assert result.step == min(losses(result, "eval_loss").items(), key=lambda item: item[1])[0]
    loss = jax.jit(objectives.answer_loss(model))
    batches = list(training_run.make_batches(held_out, SMALL, None))
    found = lora.recipes.evaluate(loss, result.adapters, model.params, batches)
    assert found == pytest.approx(result.after, rel=1e-6)
    assert lora.recipes.evaluate(loss, {}, model.params, batches) == pytest.approx(result.before, rel=1e-6)


def test_the_loss_is_that_of_answers_alone(model, chats):
    """Each example by itself, by the plain loss over logits."""
    total = count = 0.0
    for n in range(6):
        ids, learned = (a[chats.starts[n] : chats.starts[n + 1]] for a in (chats.ids, chats.learned))
        logp = jax.nn.log_softmax(model.logits(model.params, jnp.asarray(ids[None, :-1])))[0]
        picked = np.asarray(logp)[np.arange(len(ids) - 1), ids[1:]]
        total, count = total - picked[learned[1:]].sum(), count + learned[1:].sum()
    some = chats.select(range(6))
    found = lora.recipes.evaluate(
        objectives.answer_loss(model), {}, model.params, training_run.make_batches(some, SMALL, None)
    )
    assert found == pytest.approx(total / count, rel=1e-5)


def test_the_log_has_the_rates_of_the_formula_and_all_examples_once_an_epoch(whole_run):
    whole, train, held_out = whole_run
    up = round(SMALL.warmup * whole.steps)
    expected = {
        n: SMALL.lr * (n / (up + 1) if n <= up else (1 + math.cos(math.pi * (n - 1 - up) / (whole.steps - up))) / 2)
        for n in range(1, whole.steps + 1)
    }
    assert losses(whole, "lr") == pytest.approx(expected, rel=1e-5)
    assert sum(losses(whole, "tokens").values()) == SMALL.epochs * train.lengths.sum()
    sides = [{tuple(data.ids[a:b]) for a, b in itertools.pairwise(data.starts)} for data in (train, held_out)]
    assert not sides[0] & sides[1]


class Broken(training_run.Reporter):
    """Breaks a run off after a step, as a process that is killed does."""

    def __init__(self, step):
        self.step = step

    def line(self, line):
        if line["step"] == self.step and "loss" in line:
            raise KeyboardInterrupt


def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(whole_run, model, tmp_path):
    whole, train, held_out = whole_run
    with pytest.raises(KeyboardInterrupt):
        lora.recipes.finetune(model, train, held_out, tmp_path / "run", SMALL, Broken(5))
    assert max(line["step"] for line in records.read_log(tmp_path / "run" / "log.jsonl")) >= 4
    result = lora.recipes.finetune(model, train, held_out, tmp_path / "run", SMALL)
    for name in ("loss", "eval_loss", "lr", "tokens"):
        assert losses(result, name) == losses(whole, name)
    assert result.before == whole.before
    again = lora.recipes.finetune(model, train, held_out, tmp_path / "run", SMALL)
    assert (again.step, again.after) == (whole.step, whole.after)
    jax.tree.map(np.testing.assert_array_equal, again.adapters, whole.adapters)


@pytest.mark.slow
def test_a_run_that_was_broken_off_before_its_first_checkpoint_begins_anew(whole_run, model, tmp_path):
    whole, train, held_out = whole_run
    with pytest.raises(KeyboardInterrupt):
        lora.recipes.finetune(model, train, held_out, tmp_path / "run", SMALL, Broken(1))
    short = dataclasses.replace(SMALL, max_steps=1)
    result = lora.recipes.finetune(model, train, held_out, tmp_path / "run", short)
    assert [line["step"] for line in result.log] == [0, 1, 1]
    assert result.before == whole.before


def test_nothing_waits_for_a_step_but_the_reading_of_the_one_before(model, chats, tmp_path, monkeypatch):
    """The device has its next step while the host reads what is measured, and makes the next batch."""
    every, happened, of_step = 3, [], {}

    class Watched(meter.Meter):
        """Notes of which step an array is; they are kept, so that no other one gets their place in memory."""

        def took(self, n, metrics, batch):
            happened.append(("given", n))
            more = self._more
            self._more = lambda *args: of_step.setdefault(("more", n), more(*args))
            of_step["step", n] = metrics
            super().took(n, metrics, batch)
            self._more = more

    def noted(read):
        def reading(array, *args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                steps = [n for (_, n), found in of_step.items() if any(array is one for one in found.values())]
                happened.append(("read", *steps))
            return read(array, *args, **kwargs)

        return reading

    array = type(jnp.zeros(()))
    for name in ("__array__", "__float__", "__int__", "__bool__", "item"):
        monkeypatch.setattr(array, name, noted(getattr(array, name)))
    monkeypatch.setattr(training_run, "Meter", Watched)
    own = dataclasses.replace(SMALL, eval_every=every, max_steps=3 * every)
    result = lora.recipes.finetune(model, chats, None, tmp_path, own)
    assert result.steps == 3 * every
    given = [happened.index(("given", n)) for n in range(1, result.steps + 1)]
    for n in range(2, result.steps + 1):
        between = [what for what in happened[given[n - 2] : given[n - 1]] if what[0] == "read"]
        if n == 2 or (n - 1) % every == 0:
            continue  # the first save looks at the step, and a checkpoint reads the state
        assert between == [("read", n - 2)] * len(between), n
        assert len(between) == (5 if (n - 2) % every else 0), "loss, norm, skipped, rate and tokens, each once"


def test_examples_longer_than_the_model_was_made_for_are_said(model, chats):
    longest = int(chats.lengths.max())
    short = model.replace(config=dataclasses.replace(model.config, length=longest - 1))
    with pytest.warns(
        lora.LoraWarning, match=f"has {longest} tokens, and the model was made for texts of {longest - 1}"
    ):
        prepare(short, chats, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 16])
def test_a_run_goes_on_over_another_mesh(bits, places, chats, tmp_path):
    """As it would have gone on over its own, but for how sums are rounded."""
    train, held_out = lora.recipes.hold_out(chats, 0.2)
    one = dataclasses.replace(SMALL, dropout=0.1, bits=bits)
    other = dataclasses.replace(one, mesh="data=2,fsdp=2,tensor=2")
    models = [lora.recipes.load(places / "model", mesh=mesh, bits=bits) for mesh in (None, options.make_mesh(other))]
    whole = lora.recipes.finetune(models[0], train, held_out, tmp_path / "whole", one)
    with pytest.raises(KeyboardInterrupt):
        lora.recipes.finetune(models[0], train, held_out, tmp_path / "run", one, Broken(5))
    result = lora.recipes.finetune(models[1], train, held_out, tmp_path / "run", other)
    kept = [n for n in losses(whole) if n <= 4]
    assert [losses(result)[n] for n in kept] == [losses(whole)[n] for n in kept], "these it had"
    assert losses(result) == pytest.approx(losses(whole), rel=1e-3)
    assert result.after == pytest.approx(whole.after, rel=1e-3)


@pytest.mark.slow
def test_over_a_mesh_it_is_the_same(whole_run, places, tmp_path):
    whole, train, held_out = whole_run
    own = dataclasses.replace(SMALL, mesh="data=2,fsdp=2,tensor=2")
    model = lora.recipes.load(places / "model", mesh=options.make_mesh(own))
    result = lora.recipes.finetune(model, train, held_out, tmp_path, own)
    assert losses(result) == pytest.approx(losses(whole), rel=1e-4)
    assert result.after == pytest.approx(whole.after, rel=1e-4)


@pytest.mark.parametrize("other", [{"microbatches": 4}, {"remat": False}], ids=str)
@pytest.mark.slow
def test_memory_and_time_change_no_result(other, whole_run, model, tmp_path):
    whole, train, held_out = whole_run
    result = lora.recipes.finetune(model, train, held_out, tmp_path, dataclasses.replace(SMALL, **other))
    assert losses(result) == pytest.approx(losses(whole), rel=1e-4)


def test_without_remat_each_layer_is_computed_once(model, chats):
    train, _ = lora.recipes.hold_out(chats, 0.2)
    batch = next(training_run.make_batches(train, SMALL, None))
    plan = model.plan(options.rules(SMALL, model))
    adapters = lora.init(jax.random.key(0), model.params, plan)

    def gates(remat: bool) -> int:  # one in each pass over the layers
        loss = objectives.make_loss(model, dataclasses.replace(SMALL, remat=remat), pairs=False)
        return str(jax.make_jaxpr(jax.grad(lambda a: loss(a, model.params, batch)[0]))(adapters)).count("= logistic ")

    assert (gates(remat=True), gates(remat=False)) == (2, 1)


@pytest.mark.parametrize("kind", ["rslora", "dora", "lora-fa", "vera", "loha", "lokr"])
@pytest.mark.slow
def test_other_kinds_learn_and_are_saved(kind, model, chats, tmp_path):
    own = dataclasses.replace(SMALL, kind=kind, max_steps=4, eval_every=4)
    result = lora.recipes.finetune(model, *lora.recipes.hold_out(chats, 0.2), tmp_path / "run", own)
    assert result.after < result.before
    lora.save_peft(tmp_path / "peft", result.adapters, model.key_map)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.slow
def test_over_a_packed_base(bits, places, chats, tmp_path):
    model = lora.recipes.load(places / "model", bits=bits)
    result = lora.recipes.finetune(
        model, *lora.recipes.hold_out(chats, 0.2), tmp_path, dataclasses.replace(SMALL, dropout=0.1)
    )
    assert result.after < 0.95 * result.before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_is_saved(model, chats, tmp_path):
    broken = model.replace(params=jax.tree.map(lambda w: w * jnp.float32(1e30), model.params))
    with pytest.raises(lora.LoraError, match=r"the loss is nan at step 1.*lower lr"):
        lora.recipes.finetune(broken, chats, None, tmp_path, SMALL)


@pytest.mark.slow
def test_what_ends_a_run_is_told_before_anything_waits(model, chats, tmp_path, monkeypatch):
    """What is being saved waits for other hosts, which may wait for this one."""
    seen, wait = [], training_run.Checkpoints.wait

    class Full(training_run.Reporter):
        def line(self, line):
            raise OSError(28, "No space left on device")

        def failed(self, error):
            seen.append(error.errno)

    def waits(checkpoints):
        seen.append("waits")
        return wait(checkpoints)

    monkeypatch.setattr(training_run.Checkpoints, "wait", waits)
    with pytest.raises(OSError, match="No space left"):
        lora.recipes.finetune(model, chats, None, tmp_path / "run", dataclasses.replace(SMALL, max_steps=2), Full())
    assert seen == [28, "waits"]


@pytest.mark.slow
def test_other_held_out_examples_are_refused(whole_run, model, chats, tmp_path):
    """The best adapters are chosen by them, among checkpoints that were measured with the first ones."""
    _, train, held_out = whole_run
    short = dataclasses.replace(SMALL, max_steps=1)
    lora.recipes.finetune(model, train, held_out, tmp_path, short)
    with pytest.raises(lora.LoraError, match="was begun with other held-out examples"):
        lora.recipes.finetune(model, train, train, tmp_path, short)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": "eight"}, "rank is 'eight', expected a whole number"),
        ({"epochs": 1.5}, "epochs is 1.5, expected a whole number"),
        ({"lr": True}, "lr is True, expected a number"),
        ({"skip_bad": "no"}, "skip_bad is 'no', expected true or false"),
        ({"kind": "lora2"}, "kind is 'lora2', expected one of lora, rslora"),
        ({"bits": 5}, "bits is 5, expected one of 4, 8, 16"),
        ({"targets": None}, "targets is None, expected text"),
    ],
)
def test_options_of_another_type(changes, said):
    with pytest.raises(lora.LoraError, match=said):
        dataclasses.replace(SMALL, **changes).check()


def test_epochs_that_are_never_reached_are_not_packed(model, chats, monkeypatch):
    packed, pack = [], packed_rows.pack
    monkeypatch.setattr(packed_rows, "pack", lambda *args: packed.append(args[3]) or pack(*args))
    batches = training_run.make_batches(chats, SMALL, None, 10**9)
    assert training_run._steps(batches, dataclasses.replace(SMALL, epochs=10**9, max_steps=5)) == 5
    assert max(packed) < 5


def test_a_step_exchanges_no_numbers_between_processes(model, chats, monkeypatch):
    """It would wait for the step before: a process is told how many rows the whole batch has."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    monkeypatch.setattr("lora_jax.sharding.batches._check_equal_over_processes", None)
    batch = next(training_run.make_batches(chats, SMALL, sharding))
    placed = training_run._placed(batch, sharding, training_run._rows(chats, SMALL))
    np.testing.assert_array_equal(placed["ids"], batch["ids"])


def test_too_little_memory_is_said_before_training(model, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_jax.recipes.memory.free_bytes", lambda: 1000)
    with pytest.raises(lora.LoraError, match=r"a step takes .*B beside what is there, and 1\.0 kB are free"):
        lora.recipes.finetune(model, chats, None, tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(whole_run, places, tmp_path):
    """Each reads its own rows; one of them writes."""
    whole, *_ = whole_run
    script = tmp_path / "command.py"
    script.write_text("import sys\nfrom lora_jax import cli\nsys.exit(cli.main())\n")
    own = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(SMALL).items()
           if name not in ("remat", "skip_bad", "mesh", "log_to")]  # fmt: skip
    launch = [sys.executable, "examples/launch.py", "--local", "2", "--devices-per-process", "2", str(script)]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*launch, *command(places, tmp_path / "run"), *own, "--eval-split", "0.2", "--mesh", "data=2,fsdp=2"],
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": FAST},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in records.read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert {line["step"]: line["loss"] for line in lines} == pytest.approx(losses(whole), rel=1e-4)
    assert {line["step"]: line["tokens"] for line in lines} == losses(whole, "tokens"), "of both processes"
    assert (tmp_path / "run" / "peft" / "adapter_model.safetensors").exists()


TOGETHER = """
import os, sys
from lora_jax import cli
from lora_jax.recipes import records

port, index, what, *arguments = sys.argv[1:]
os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index}
added = records.Log.add

def full(log, line):
    if line["step"] == 2 and index == "1":
        raise OSError(28, "No space left on device", "run")
    added(log, line)

if what == "full":
    records.Log.add = full
sys.exit(cli.main(["train", *arguments, "--distributed"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        pytest.param("missing", "chats.jsonl cannot be read: No such file or directory.", marks=pytest.mark.rare),
        pytest.param("other", "the examples differ from those of process 0: give the same", marks=pytest.mark.rare),
        ("full", "OSError: [Errno 28] No space left on device: 'run'"),
    ],
)
def test_what_goes_wrong_on_one_host_ends_all(what, said, places, tmp_path):
    """With a line that names it, whatever the others are doing; what was saved stays."""
    for i in range(2):
        (tmp_path / f"host{i}").mkdir()
        shutil.copy(places / "chats.jsonl", tmp_path / f"host{i}")
    examples = tmp_path / "host1" / "chats.jsonl"
    if what == "missing":
        examples.unlink()
    if what == "other":
        examples.write_text("".join(examples.read_text().splitlines(keepends=True)[:-1]))
    own = [str(places / "model"), "chats.jsonl", str(tmp_path / "run"), "--rank", "4", "--max-length", "32"]
    own += ["--batch-tokens", "64", "--samples", "0", "--eval-every", "1"]
    codes, outputs = ended(TOGETHER, tmp_path, what, *own)
    assert codes == [1, 1], outputs
    assert all(f"error: process 1 of 2, on {socket.gethostname()}: {said}" in output for output in outputs), outputs
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert steps == (["step_1"] if what == "full" else [])


# Preferences ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preferences_are_learned_in_parts_and_over_a_mesh(places, pairs, model, tmp_path):
    train, held_out = lora.recipes.hold_out(pairs, 0.2)
    own = dataclasses.replace(SMALL, lr=0.1, eval_every=3, batch_tokens=32 * 32)
    one = lora.recipes.finetune(model, train, held_out, tmp_path / "one", own)
    assert one.before == pytest.approx(math.log(2), abs=1e-6)
    assert one.after < 0.9 * one.before
    assert losses(one, "accuracy")[one.steps] > 0.9
    parts = lora.recipes.finetune(model, train, held_out, tmp_path / "parts", dataclasses.replace(own, microbatches=2))
    over = dataclasses.replace(own, mesh="data=8")
    placed = lora.recipes.load(places / "model", mesh=options.make_mesh(over))
    mesh = lora.recipes.finetune(placed, train, held_out, tmp_path / "mesh", over)
    for other in (parts, mesh):
        assert losses(other) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.slow
def test_the_loss_of_dpo_is_that_of_the_paper_with_two_models(model, pairs):
    """Rafailov et al. 2023, equation 7, of one pair after another; the policy has the adapters in its weights."""
    noise = np.random.default_rng(0)
    adapters = lora.init(jax.random.key(0), model.params, model.plan(lora.Lora(4, 8)))
    adapters = jax.tree.map(lambda a: a + 0.3 * jnp.asarray(noise.normal(size=a.shape), a.dtype), adapters)
    merged = lora.merge(model.params, adapters)
    logits = jax.jit(model.logits)

    def log_prob(params, data, n):
        ids, learned = (a[data.starts[n] : data.starts[n + 1]] for a in (data.ids, data.learned))
        padded = np.zeros((1, 32), np.int32)  # what comes after changes nothing
        padded[0, : len(ids)] = ids
        logp = np.asarray(jax.nn.log_softmax(logits(params, padded)))[0]
        return logp[np.arange(len(ids) - 1), ids[1:]][learned[1:]].sum()

    some, expected = pairs.select(range(10)), []
    for n in range(len(some)):
        ratios = [log_prob(merged, side, n) - log_prob(model.params, side, n) for side in (some.chosen, some.rejected)]
        expected.append(math.log1p(math.exp(-0.1 * (ratios[0] - ratios[1]))))
    assert np.ptp(expected) > 1e-3
    batches = training_run.make_batches(some, SMALL, None)
    found = lora.recipes.evaluate(objectives.preference_loss(model), adapters, model.params, batches)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 1), (8, 8)])
def test_rows_that_pairs_cannot_share(rows, parts, model, pairs):
    own = dataclasses.replace(SMALL, batch_tokens=rows * 32, microbatches=parts)
    with pytest.raises(
        lora.LoraError, match=f"the two answers of pairs.*give batch_tokens={max(rows + 1, 2 * parts) * 32}"
    ):
        prepare(model, pairs, own)


@pytest.mark.parametrize(
    ("axes", "parts", "rows", "of_pairs"),
    [({}, 1, 4, 4), ({"data": 8}, 1, 8, 16), ({"data": 2, "fsdp": 2, "tensor": 2}, 1, 4, 8), ({"fsdp": 3}, 2, 6, 12)],
)
def test_without_batch_tokens_the_rows_fit_the_machine(axes, parts, rows, of_pairs):
    given = dataclasses.replace(SMALL, batch_tokens=0, microbatches=parts)
    given.check()
    assert options.with_rows(given, axes).rows == rows
    assert options.with_rows(given, axes, together=2).rows == of_pairs
    assert options.with_rows(given, axes).batch_tokens == rows * 32


def test_a_step_of_dpo_has_one_copy_of_the_base(model, pairs):
    """The reference is the same arrays: the compiled step takes each parameter once."""
    run = prepare(model, pairs, SMALL)
    assert run.memory.parts["base"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


# Held-out examples, schedules -----------------------------------------------------------------------------------------


def tokens_of(rows, first=1):
    ids = np.concatenate([np.asarray(row, np.int32) for row in rows])
    starts = np.cumsum([0, *map(len, rows)])
    learned = np.concatenate([np.arange(len(row)) >= first for row in rows])
    return Tokenized(ids, learned, starts)


def test_examples_of_one_prompt_are_on_one_side():
    rows = [[n % 10, 5, 6, 100 + n] for n in range(60)]
    train, held_out = lora.recipes.hold_out(tokens_of(rows, first=3), 0.25, seed=1)
    sides = [{int(side.ids[start]) for start in side.starts[:-1]} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 60
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(60)]
    _, other = lora.recipes.hold_out(tokens_of(shuffled, first=3), 0.25, seed=1)
    assert sorted(other.ids.tolist()) == sorted(held_out.ids.tolist()), "whatever their order"
    assert lora.recipes.hold_out(tokens_of(rows), 0.0)[1] is None
    with pytest.raises(lora.LoraError, match="leaves none to train with"):
        lora.recipes.hold_out(tokens_of(rows[:1]), 0.5)
    both = TokenizedPairs(tokens_of(rows, 3), tokens_of(rows, 3))
    assert len(lora.recipes.hold_out(both, 0.25, seed=1)[1]) == len(held_out)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_the_learning_rate_goes_up_and_then_down(schedule, steps):
    own = lora.recipes.Options(lr=0.5, warmup=0.2, schedule=schedule)
    rates = np.array([options.learning_rate(own, steps)(n) for n in range(steps)])
    up = round(0.2 * steps)
    assert rates[0] > 0
    assert rates[up if steps > 1 else 0] == pytest.approx(0.5)
    assert (np.diff(rates[: up + 1]) > 0).all()
    assert (np.diff(rates[up:]) < 0).all() or schedule == "constant"
    assert rates[-1] > 0


def test_samples_go_on_from_the_prompt(model, chats, tokenizer):
    [first, second] = write_samples(model, {}, tokenizer, chats, 2, length=4)
    assert (first.prompt.endswith("assistant\n"), first.answer, second.answer) == (True, "barn", "lake")
    assert first.before == first.after


# The commands ---------------------------------------------------------------------------------------------------------


def command(places, output):
    return ["train", *map(str, (places / "model", places / "chats.jsonl", output))]


FLAGS = ["--rank", "2", "--max-length", "32", "--batch-tokens", "256", "--lr", "1e-2", "--max-steps", "4"]


@pytest.fixture(scope="module")
def trained(places):
    out = places / "run"
    assert cli.main([*command(places, out), *FLAGS, "--merged"]) == 0
    return out


def test_the_command_writes_what_others_read(trained, places, model, chats, capsys):
    assert sorted(path.name for path in trained.iterdir()) == [
        *("checkpoints", "config.toml", "curves.png", "log.jsonl", "merged", "peft")
    ]
    adapters, _ = lora.load_peft(trained / "peft", model.params, model.key_map)
    merged = lora.recipes.load(trained / "merged")
    ids = jnp.asarray(chats.ids[None, :12])
    adapted = lora.lora_apply(model.logits)(model.params, adapters, ids)
    np.testing.assert_allclose(merged.logits(merged.params, ids), adapted, atol=1e-4)
    assert np.abs(adapted - model.logits(model.params, ids)).max() > 1e-3
    args = [str(places / "model"), str(trained / "peft")]
    assert (
        cli.main(["eval", *args, str(places / "chats.jsonl"), "--max-length", "32", "--batch-tokens", "256", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    loss = jax.jit(objectives.answer_loss(model))
    assert found["loss"] == pytest.approx(
        lora.recipes.evaluate(loss, adapters, model.params, training_run.make_batches(chats, SMALL, None)), rel=1e-5
    )
    assert cli.main(["generate", *args, "3?", "--count", "3"]) == 0
    answer = capsys.readouterr().out
    assert answer
    assert cli.main(["convert", args[1], str(trained / "mlx"), "--to", "mlx"]) == 0
    capsys.readouterr()
    assert cli.main(["generate", args[0], str(trained / "mlx"), "3?", "--count", "3"]) == 0
    assert capsys.readouterr().out == answer
    shutil.rmtree(trained / "mlx")
    assert cli.main(["generate", args[0], str(trained), "3?"]) == 1
    assert "holds folders of adapters, 'peft'" in capsys.readouterr().err
    assert cli.main(["generate", args[0], str(trained / "checkpoints"), "3?"]) == 1
    assert "by lora-jax convert" in capsys.readouterr().err


@pytest.mark.slow
def test_settings_of_a_file_are_those_of_the_command_line(trained, places, tmp_path, capsys):
    """And a run is repeated from the file that is beside it."""
    out = tmp_path / "again"
    assert (
        cli.main(
            [
                "train",
                *map(str, (places / "model", places / "chats.jsonl", out)),
                "--config",
                str(trained / "config.toml"),
            ]
        )
        == 0
    )
    first, second = (records.read_log(folder / "log.jsonl") for folder in (trained, out))
    assert [line.get("loss") for line in first] == [line.get("loss") for line in second]
    capsys.readouterr()
    config = tmp_path / "own.yaml"
    names = {"model": places / "model", "data": places / "chats.jsonl", "output": tmp_path / "third"}
    lines = [f"{name}: {path}" for name, path in names.items()]
    config.write_text("\n".join([*lines, "max-length: 32", "batch_tokens: 256"]))
    assert cli.main(["train", "--config", str(config), "--rank", "3", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Lora(rank=3" in printed
    assert "stack=0" not in printed, "advice that no option takes"
    assert "keep=" not in printed
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_the_commands_of_the_page(places, tmp_path, monkeypatch):
    """Those of docs/train.md, with a tiny model under the names that they have."""
    monkeypatch.chdir(tmp_path)
    for name, there in (
        ("SmolLM2-135M-Instruct", "model"),
        ("headlines.jsonl", "chats.jsonl"),
        ("rest.jsonl", "chats.jsonl"),
        ("held.jsonl", "chats.jsonl"),
        ("pairs.jsonl", "pairs.jsonl"),
    ):
        (tmp_path / name).symlink_to(places / there)
    shells = [block for block in blocks_of(ROOT / "docs" / "train.md") if block.language == "sh"]
    commands = [words[1:] for block in shells for words in commands_of(block) if words[0] == "lora-jax"]
    assert len(commands) >= 10
    tiny = {
        "train": ["--max-length", "32", "--batch-tokens", "512", "--max-steps", "2", "--samples", "0"],
        "generate": ["--count", "2"],
        "eval": ["--max-length", "32", "--batch-tokens", "512"],
    }
    for command, *arguments in commands:
        if "--compile-for" not in arguments:  # tests/compiled does that
            begun = ["--config", f"{arguments[2]}/config.toml"] if "--resume" in arguments else []
            assert cli.main([command, *arguments, *begun, *tiny[command]]) == 0, (command, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", "--raw"], "the prompt has no tokens"),
        (["a", "--temperature", "nan"], "temperature=nan"),
        (["a\ud800"], "half of a surrogate pair"),
        (["a", "--seed", str(2**70)], "seed is 1180591620717411303424, expected a whole number from 0"),
        (["a", "--count", str(10**12)], "count=1000000000000"),
    ],
)
def test_prompts_and_settings_that_cannot_be(arguments, said, places, capsys):
    assert cli.main(["generate", str(places / "model"), *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_loss_that_is_too_large_for_a_perplexity(places, monkeypatch, capsys):
    monkeypatch.setattr(lora.recipes, "evaluate", lambda *_: 1000.0)
    args = [str(places / "model"), str(places / "chats.jsonl"), "--max-length", "32"]
    assert cli.main(["eval", *args]) == 0
    assert "Loss 1000.0000, perplexity inf" in capsys.readouterr().out


def test_adapters_that_could_not_be_saved_are_said_before_anything_is_read(places, tmp_path, capsys):
    """PEFT has no DoRA of experts, and one rank for the LoKr of all of them."""
    facts = facts_of("qwen3_moe", vocab_size=272, eos_token_id=[264])
    write(tmp_path / "model", facts, {})
    make_folder(tmp_path / "model", "chatml")
    args = [str(tmp_path / "model"), str(tmp_path / "there_is_none.jsonl"), str(tmp_path / "out"), *FLAGS]
    assert cli.main(["train", *args, "--kind", "dora"]) == 1
    assert "experts/down_proj/kernel' is of DORA; PEFT has it for modules" in capsys.readouterr().err
    assert cli.main(["train", *args, "--kind", "lokr"]) == 1
    assert "PEFT has one for all" in capsys.readouterr().err
    assert cli.main(["train", *args]) == 1
    assert "there_is_none.jsonl cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_resume(trained, places, capsys):
    args = [*command(places, trained), *FLAGS]
    assert cli.main(args) == 1
    assert "has a training run: go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*args, "--resume", "--lr", "2e-2"]) == 1
    assert "lr was 0.01, now 0.02" in capsys.readouterr().err
    before = (trained / "log.jsonl").read_text()
    assert cli.main([*args, "--resume", "--merged"]) == 0, "a scheduler may give the same command again"
    assert (trained / "log.jsonl").read_text() == before


def at_step(step, act):
    """Do something at a step of the command `train`, in the place of its bar."""

    def line(self, line):
        if line["step"] == step and "loss" in line:
            act()

    return line


@pytest.mark.slow
def test_the_exit_codes_of_a_run_that_is_ended(trained, places, tmp_path, monkeypatch, capsys):
    """143 once all is saved, as a shell has it of SIGTERM; and what comes then is what would have come."""
    args = [*command(places, tmp_path / "out"), *FLAGS, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(train_command._Console, "line", at_step(1, lambda: signal.raise_signal(signal.SIGTERM)))
        assert cli.main(args) == 143
        assert "Told to end at step 1, which is saved" in capsys.readouterr().out
        patch.setattr(train_command._Console, "line", at_step(2, lambda: signal.raise_signal(signal.SIGINT)))
        # Where the tests run in the background, a shell has Ctrl-C ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert cli.main(args) == 130
        signal.signal(signal.SIGINT, before)
        assert "stopped by Ctrl-C" in capsys.readouterr().err
    mesh = ["--mesh", "data=4,tensor=2"]
    assert cli.main([*args, *mesh]) == 0
    found, expected = (records.read_log(folder / "log.jsonl") for folder in (tmp_path / "out", trained))
    for name in ("loss", "eval_loss"):
        sides = [[(line["step"], line[name]) for line in lines if name in line] for lines in (found, expected)]
        np.testing.assert_allclose(*sides, rtol=1e-4)


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_what_is_compiled_for_another_machine(fits, code, places, monkeypatch, capsys):
    """The first example says what is trained; whether it fits is the exit code as well."""
    asked = []

    class Report:
        def __init__(self, *args, **kwargs):
            asked.append((args[0], kwargs["pairs"]))
            self.fits = fits

    monkeypatch.setattr(train_command, "compiled", Report)
    for data in ("chats", "pairs"):
        args = ["train", *map(str, (places / "model", places / f"{data}.jsonl", places / "none")), *FLAGS]
        assert cli.main([*args, "--compile-for", "v5e:4x4"]) == code
    assert asked == [("v5e:4x4", False), ("v5e:4x4", True)]
    assert not (places / "none").exists()


def test_a_folder_of_a_run_that_never_began_is_taken_again(places, tmp_path, capsys):
    """An error before the first step leaves the settings alone, which may be what was wrong."""
    (tmp_path / "bad.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    assert cli.main(["train", str(places / "model"), str(tmp_path / "bad.jsonl"), str(out), *FLAGS]) == 1
    assert cli.main([*command(places, out), *FLAGS, "--targets", "nothing"]) == 1
    assert "the pattern 'nothing' matches no parameter" in capsys.readouterr().err
    assert records.read_config(out / "config.toml")["targets"] == "nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank = 3", "has no training run"),
        ('date = "3"', "date is '3', expected the day"),
        ("rank = [1]", "rank is [1]"),
    ],
)
def test_a_config_of_ones_own_in_the_output_folder_is_no_run(text, said, places, tmp_path, capsys):
    (tmp_path / "config.toml").write_text(text)
    assert cli.main([*command(places, tmp_path), *FLAGS, "--resume"]) == 1
    assert said in capsys.readouterr().err
    assert (tmp_path / "config.toml").read_text() == text


def test_a_config_may_hold_text_that_begins_with_a_hyphen(tmp_path):
    (tmp_path / "own.toml").write_text('targets = "-x"')
    assert commands.with_config(["train", "M", "D", "O", "--config", str(tmp_path / "own.toml")])[-1] == "--targets=-x"


def test_settings_of_any_text_are_read_as_they_were_written(tmp_path):
    """A run with an emoji in a path has to find its own settings again."""
    places = dict.fromkeys(("model", "data", "output", "eval_data"), '\U0001f600 "\\\x7f\t\u00e9')
    records.write_config(tmp_path / "config.toml", SMALL, places)
    assert records.read_config(tmp_path / "config.toml") == {**places, **dataclasses.asdict(SMALL)}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('rank = "eight"', "rank is 'eight', expected a whole number"),
        ("rank = true", "rank is True, expected a whole number"),
        ("epochs = 1.5", "epochs is 1.5, expected a whole number"),
        ('skip_bad = "yes"', "skip_bad is 'yes', expected true or false"),
        ("merged = 1", "merged is 1, expected true or false"),
        ("eval_data = 3", "eval_data is 3, expected text"),
        ('lr = "fast"', "lr is 'fast', expected a number"),
    ],
)
def test_settings_of_another_type_in_a_file(line, said, tmp_path):
    """They are errors even where the command line says something else."""
    (tmp_path / "own.toml").write_text(line)
    with pytest.raises(lora.LoraError, match=f"own.toml: {re.escape(said)}"):
        records.read_config(tmp_path / "own.toml")


@pytest.mark.parametrize(("given", "found"), [("HuggingFaceTB/SmolLM2", "not there"), (__file__, "a file")])
@pytest.mark.parametrize("name", ["train", "generate", "eval"])
def test_a_model_that_is_no_folder(name, given, found, places, tmp_path, capsys):
    """Such as its name on the Hub: the line says how to bring it."""
    more = [str(tmp_path / "out"), "--batch-tokens", "8192"] if name == "train" else []
    assert cli.main([name, given, str(places / "chats.jsonl"), *more]) == 1
    said = capsys.readouterr().err
    assert f"{given} is {found}, expected a folder with config.json" in said
    assert "hf download NAME --local-dir FOLDER" in said


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_tokenizer_that_does_not_fit_is_said_before_examples_are_read(command, places, tmp_path, capsys):
    shutil.copytree(places / "model", tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts | {"vocab_size": 100}))
    data = [str(tmp_path / "there_is_none.jsonl"), *([str(tmp_path / "out")] if command == "train" else [])]
    assert cli.main([command, str(tmp_path / "model"), *data, "--max-length", "32"]) == 1
    assert "does not fit the model: its last token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rank", "0"], "rank"),
        (["--lr", "0"], "lr is 0.0, expected a number above 0"),
        (
            ["--max-length", "9999", "--batch-tokens", "4096"],
            r"batch_tokens is 4096, expected at least one row of max_length=9999",
        ),
        (["--mesh", "data=3"], "of 3 devices, but 8 are there"),
        (["--mesh", "fish=8"], "mesh has the part 'fish=8'"),
        (
            ["--mesh", "data=8", "--max-length", "2048", "--batch-tokens", "4096"],
            "a step has 2 rows.*give batch_tokens=16384",
        ),
        (["--targets", "nothing"], "the pattern 'nothing' matches no parameter"),
        (["--config", "there_is_none.toml"], "there_is_none.toml cannot be read"),
        (["--config", "wrong.toml"], "there is no option 'rang'; near are rank"),
        (["--config"], "--config is the last argument"),
    ],
)
def test_mistakes_are_said(arguments, said, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("rang = 3")
    small = [] if "--max-length" in arguments else ["--max-length", "32", "--batch-tokens", "256"]
    code = cli.main([*command(places, tmp_path / "out"), *small, *arguments])
    error = capsys.readouterr().err
    assert code == 1
    assert re.search(said, error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no examples"),
        ('{"text": "a"}\n{"messages": []}\n', "line 2"),
        ("not json\n", "line 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1"),
    ],
)
def test_files_that_are_no_examples(text, said, places, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(text)
    assert cli.main(["train", *map(str, (places / "model", tmp_path / "data.jsonl", tmp_path / "out")), *FLAGS]) == 1
    assert said in capsys.readouterr().err
