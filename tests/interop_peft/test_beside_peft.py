"""Training by `lora.recipes.finetune` beside transformers and HF PEFT: the same losses, gradients and adapters.

transformers gets the texts twice: packed in the same rows, and each in a row of its own with its own mask and its own
shift of labels, so that what packing and the loss have to be is not taken from here.
"""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from chat_templates import make_folder

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")
import transformers as hf  # noqa: E402
from test_recipes import IDS, OF_PEFT, SIZES, logits_of, of_torch  # noqa: E402
from test_recipes import folders as folders  # noqa: E402

import lora_jax as lora  # noqa: E402
from benchmarks import beside_peft  # noqa: E402
from benchmarks.beside_peft import TorchRun, packed_inputs, padded_inputs, random_tokens  # noqa: E402
from lora_jax import cli  # noqa: E402
from lora_jax.recipes.options import rules  # noqa: E402
from lora_jax.recipes.training_run import make_batches  # noqa: E402

RUN = lora.recipes.Options(
    rank=3, alpha=6, lr=1e-2, warmup=0.0, weight_decay=0.1, max_length=24, batch_tokens=48, epochs=3, max_steps=20
)
TOKENS = random_tokens(48, SIZES["vocab_size"], RUN.max_length)
OF_ITSELF = ".*is_gradient_checkpointing"  # a warning of transformers, which PEFT brings about with any adapters
pytestmark = pytest.mark.filterwarnings(f"ignore:{OF_ITSELF}:FutureWarning")


def write_start(folder, model, options):
    """Write the adapters that a run begins with, as PEFT has them."""
    adapters = lora.init(jax.random.key(options.seed), model.params, model.plan(rules(options, model)))
    lora.save_peft(folder, adapters, model.key_map, task_type="CAUSAL_LM")
    return folder


def train(model, folder, options):
    """Train with `finetune`, and write what comes of it; return the adapters, and loss and norm of each step."""
    with jax.default_matmul_precision("highest"):
        result = lora.recipes.finetune(model, TOKENS, None, folder, options)
    lora.save_peft(folder / "peft", result.adapters, model.key_map, task_type="CAUSAL_LM")
    return result.adapters, losses_and_norms(result.log)


def losses_and_norms(log):
    return np.array([(line["loss"], line["grad_norm"]) for line in log if "loss" in line])


def train_torch(run, inputs, tokens, options):
    """Take the steps of a `TorchRun`, and return loss and norm of each."""
    batches = make_batches(tokens, options, None, options.epochs)
    return np.array([run.step(inputs(next(batches))) for _ in range(options.max_steps)])


def pefts_logits(folder, adapters):
    """Return the logits of transformers with a folder of adapters, which PEFT reads without a warning."""
    base = of_torch(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OF_ITSELF, FutureWarning)
        return logits_of(peft.PeftModel.from_pretrained(base, adapters).eval())


def our_logits(model, adapters):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lora.lora_apply(model.logits))(model.params, adapters, IDS)


def read(model, folder):
    adapters, others = lora.load_peft(folder, model.params, model.key_map)
    assert not others
    return adapters


def apart(ours, theirs, start):
    """Return how far two results are from each other, as a share of the way that they have come."""

    def length(one, other):
        difference = jax.tree.map(lambda x, y: float(np.square(x - y).sum()), one, other)
        return jax.tree.reduce(lambda a, b: a + b, difference) ** 0.5

    return length(ours, theirs) / length(ours, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PEFT)
def test_twenty_steps_are_those_of_torch(name, folders, tmp_path):
    model = lora.recipes.load(folders(name))
    start = write_start(tmp_path / "start", model, RUN)
    adapters, ours = train(model, tmp_path / "ours", RUN)
    assert len(ours) == RUN.max_steps
    assert RUN.clip < ours[:, 1].max()
    for inputs in packed_inputs, padded_inputs:
        run = TorchRun(folders(name), start, RUN, RUN.max_steps, attention="eager")
        theirs = train_torch(run, inputs, TOKENS, RUN)
        np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=2e-4)
        run.model.save_pretrained(tmp_path / inputs.__name__)
        assert apart(adapters, read(model, tmp_path / inputs.__name__), read(model, start)) < 1e-4


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", OF_PEFT)
def test_after_five_steps_the_folder_has_pefts_logits(name, folders, tmp_path):
    model = lora.recipes.load(folders(name))
    adapters, _ = train(model, tmp_path, dataclasses.replace(RUN, max_steps=5))
    found = our_logits(model, adapters)
    np.testing.assert_allclose(found, pefts_logits(folders(name), tmp_path / "peft"), atol=1e-4, rtol=0)
    assert np.abs(found - our_logits(model, {})).max() > 0.1


@pytest.mark.slow
def test_the_command_trains_as_torch_does(tmp_path):
    """From a folder and a file of conversations to the folder that PEFT reads, over eight devices."""
    folder, data, out = tmp_path / "model", tmp_path / "chats.jsonl", tmp_path / "out"
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES | {"vocab_size": 272, "eos_token_id": 264, "tie_word_embeddings": True})
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    make_folder(folder, "chatml")
    chats = [[("user", f"{n}?"), ("assistant", ("even", "odd")[n % 2])] for n in range(60)]
    lines = ({"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats)
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    given = "--rank 3 --alpha 6 --lr 0.01 --warmup 0 --weight-decay 0.1 --max-length 72 --batch-tokens 576"
    given += " --epochs 3 --max-steps 5 --eval-split 0 --samples 0"
    assert cli.main(["train", *map(str, (folder, data, out)), *given.split()]) == 0
    ours = losses_and_norms(map(json.loads, (out / "log.jsonl").read_text().splitlines()))

    options = dataclasses.replace(RUN, max_length=72, batch_tokens=576, max_steps=5)
    model, tokenizer = lora.recipes.load(folder), lora.recipes.Tokenizer.load(folder)
    tokens = lora.recipes.tokenized(lora.recipes.read_examples(data), tokenizer, options.max_length)
    run = TorchRun(folder, write_start(tmp_path / "start", model, options), options, options.max_steps)
    np.testing.assert_allclose(ours, train_torch(run, padded_inputs, tokens, options), rtol=1e-4)
    theirs = logits_of(run.model.eval())
    np.testing.assert_allclose(pefts_logits(folder, out / "peft"), theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs - logits_of(of_torch(folder))).max() > 0.01


@pytest.mark.slow
def test_the_benchmark_says_losses_and_times(capsys):
    beside_peft.main(beside_peft.Config(tiny=True, steps=4, threads=torch.get_num_threads()))
    lines = capsys.readouterr().out.splitlines()
    [said] = [line for line in lines if line.startswith("Losses are at most")]
    assert float(said.split()[4]) < 1e-5
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if row and row[0].isdecimal()] == ["2", *"1234"]  # rows of a batch, and the steps
    for name in (beside_peft.OURS, beside_peft.PLAIN, beside_peft.RECOMPUTED):
        [row] = [line for line in lines if line.startswith(f"{name}  ")]
        assert float(row.split()[-1]) > 0
