"""`lora-jax compose` beyond sums: methods, ranks, bases, and what is only computed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import run
from test_export import published
from test_peft import DATA, MLP, case, config_of

import lora_jax as lora
from lora_jax.interop.peft.load import load_by_module

A, B = DATA / "rslora_patterns", DATA / "lora_emb"


def on(folder, tmp_path, **entries):
    """A copy of a folder with other entries in its config."""
    config = json.loads((folder / "adapter_config.json").read_text()) | entries
    copy = tmp_path / f"copy_of_{folder.name}_{len(list(tmp_path.iterdir()))}"
    copy.mkdir()
    (copy / "adapter_config.json").write_text(json.dumps(config))
    (copy / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return copy


def written(folder, name="rslora_patterns"):
    """The change that a folder makes to each parameter."""
    params = case(name)[0]
    merged = lora.merge(params, lora.load_peft(folder, params, MLP)[0])
    return {path: np.asarray(merged[path] - params[path]) for path in params}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "ties", "--density", "0.5", "--rank", "2"], {"method": "ties", "density": 0.5, "rank": 2}),
        (["--method", "dare", "--density", "0.5", "--rank", "2", "--seed", "3"],
         {"method": "dare", "density": 0.5, "rank": 2, "key": jax.random.key(3)}),
        (["--method", "svd", "--compat", "peft", "--rank", "1"], {"method": "svd", "compat": "peft", "rank": 1}),
        (["--energy", "0.9"], {"energy": 0.9}),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_methods(options, expected, capsys, tmp_path):
    """What is written is what the library computes; a dry run prints the same and writes nothing."""
    code, out, err = run(capsys, "compose", f"{A}:0.7", f"{A}:-0.3", tmp_path / "out", *options, "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "2 adapters would be written."
    assert not (tmp_path / "out").exists()
    code, again, err = run(capsys, "compose", f"{A}:0.7", f"{A}:-0.3", tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert again.splitlines()[:-1] == out.splitlines()[:-1]
    adapters = load_by_module(A)[0]
    found = lora.compose([(adapters, 0.7), (adapters, -0.3)], **expected)
    params = {path: jnp.zeros(adapter.kernel_shape()) for path, adapter in adapters.items()}
    for path, change in lora.merge(params, found).items():
        np.testing.assert_allclose(written(tmp_path / "out")[f"{path}/kernel"], change, atol=1e-5)
    assert "lin0" in out


def test_as_json(capsys, tmp_path):
    code, out, _ = run(capsys, "compose", A, A, tmp_path / "out", "--rank", "2", "--json")
    found = json.loads(out)
    assert (code, found["output"]) == (0, str(tmp_path / "out"))
    assert found["ranks"].keys() == found["kept"].keys()
    assert {*found["ranks"].values()} <= {1, 2}
    assert all(0 < share <= 1 for share in found["kept"].values())


@pytest.mark.slow
def test_sums_of_lengths_take_the_base(capsys, tmp_path):
    """Which is read one weight at a time."""
    published(tmp_path / "base", "dora")
    dora = DATA / "dora"
    code, _, err = run(capsys, "compose", f"{dora}:0.7", f"{dora}:-0.2", tmp_path / "out")
    assert code == 1
    assert "depends on W" in err
    assert "--base" in err
    code, _, err = run(capsys, "compose", f"{dora}:0.7", f"{dora}:-0.2", tmp_path / "out", "--base", tmp_path / "base")
    assert (code, err) == (0, "")
    half, whole = written(tmp_path / "out", "dora"), written(dora, "dora")
    for path, change in whole.items():
        np.testing.assert_allclose(half[path], 0.5 * change, atol=1e-5)
    assert any(np.abs(change).max() > 0.1 for change in whole.values())
    code, _, err = run(capsys, "compose", A, tmp_path / "no", "--base", tmp_path / "base", "--method", "ties")
    assert (code, "--base is for --method sum" in err) == (1, True)


def test_bases_that_differ(capsys, tmp_path):
    """Are refused, unless they are said to be the same; what all parts say is written."""
    one, same, other = (
        on(A, tmp_path, base_model_name_or_path=name, task_type="CAUSAL_LM") for name in ("m/one", "m/one", "m/two")
    )
    code, _, err = run(capsys, "compose", one, other, tmp_path / "out")
    assert code == 1
    assert f"{one} was trained on 'm/one' and {other} on 'm/two': changes of different bases do not add up" in err
    assert not (tmp_path / "out").exists()
    assert run(capsys, "compose", one, other, tmp_path / "out", "--any-base")[0] == 0
    assert config_of(tmp_path / "out")["base_model_name_or_path"] is None
    assert run(capsys, "compose", one, same, A, tmp_path / "again")[0] == 0
    config = config_of(tmp_path / "again")
    assert (config["base_model_name_or_path"], config["task_type"]) == ("m/one", "CAUSAL_LM")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "tie"], "expected one of sum, magnitude_prune"),
        (["--method", "ties", "--rank", "2"], "give density=0.5"),
        (["--method", "ties", "--density", "2", "--rank", "2"], "expected a share above 0"),
        (["--rank", "90"], "the largest rank is"),
        (["--rank", "2", "--energy", "0.5"], "give one of them"),
    ],
)
def test_what_is_refused(options, says, capsys, tmp_path):
    code, out, err = run(capsys, "compose", A, A, tmp_path / "out", *options)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert says in err
    assert not (tmp_path / "out").exists()
