"""`lora-jax train --compile-for`: the step of a published model, of its config.json alone."""

import json

import pytest

import lora_jax as lora
from lora_jax.recipes.compile_for import compile_for
from lora_jax.recipes.options import Options

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-compiled")
FACTS = {
    "model_type": "llama",
    **{"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
}
LINEARS = 2 * 512 * (4 + 2 + 2 + 4) * 128 + 2 * 3 * 512 * 1024
OPTIONS = Options(max_length=256, batch_tokens=4 * 256, mesh="fsdp=4")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FACTS))
    return tmp_path


@pytest.mark.parametrize(("topology", "bits", "bytes_a_number"), [("v5e:2x2", 4, 0.53), ("h100:4", 16, 2)])
def test_a_published_model_fits(topology, bits, bytes_a_number, folder):
    report = compile_for(topology, folder, Options(**(vars(OPTIONS) | {"bits": bits})))
    assert report.fits
    others = 2 * (2 * 2048 * 512 + 5 * 512)  # the embedding, the head and the norms
    expected = (bytes_a_number * LINEARS + 2 * 2 * 2048 * 512) / 4
    assert expected * 0.98 <= report.parts["base"] <= expected * 1.02 + others / 100


def test_a_step_of_dpo(folder):
    """It has one copy of the base, the reference's and the policy's, and computes the forward pass of both."""
    options = Options(**(vars(OPTIONS) | {"batch_tokens": 8 * 256}))
    answers, pairs = (compile_for("v5e:2x2", folder, options, pairs=pairs) for pairs in (False, True))
    assert pairs.fits
    assert pairs.parts["base"] == answers.parts["base"]
    cycles = [sum(report.cycles.values()) for report in (answers, pairs)]
    assert cycles[0] < cycles[1]
    with pytest.raises(lora.LoraError, match=r"the two answers of pairs.*give batch_tokens=2048"):
        compile_for("v5e:2x2", folder, OPTIONS, pairs=True)


def test_a_mesh_of_another_machine(folder):
    with pytest.raises(lora.LoraError, match="of 4 devices, and v5e:4x4 has 16"):
        compile_for("v5e:4x4", folder, OPTIONS)
