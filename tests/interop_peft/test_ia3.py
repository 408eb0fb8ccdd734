"""(IA)^3 of the real HF PEFT, both ways: on outputs with their biases, and on inputs."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_interop import adapted, key_map_of, loaded, made, moved, outputs, params_of

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")

import lora_jax as lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

MODULES = {  # those of each model, and those of them with factors on their inputs
    "llama": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], r".*layer\.\d+\.output\.dense"),
}


def with_biases(name):
    """A model whose biases are not zero."""
    model = made(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            if tensor.endswith("bias"):
                parameter += torch.randn(parameter.shape, generator=generator) / 4
    return model


@pytest.mark.parametrize("name", MODULES)
def test_what_peft_writes_is_read_here(name, tmp_path):
    params, names = params_of(with_biases(name))
    key_map = key_map_of(name)
    targets, inputs = MODULES[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=name == "gpt2")
    model = moved(peft.get_peft_model(with_biases(name), config))
    model.save_pretrained(tmp_path / "theirs")
    adapters, others = lora.load_peft(tmp_path / "theirs", params, key_map)
    assert not others
    assert any(path.endswith("bias") for path in adapters) == (name != "llama")
    lora.save_peft(tmp_path / "ours", adapters, key_map, params=params)
    theirs, ours = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    expected = outputs(model, name)
    np.testing.assert_allclose(outputs(loaded(with_biases(name), tmp_path / "ours"), name), expected, atol=1e-5)
    merged, state = lora.merge(params, adapters), model.merge_and_unload().state_dict()
    for path, match in key_map.match({path: leaf.shape for path, leaf in params.items()}).items():
        found = match.to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[names[path]].numpy(), atol=1e-5, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_peft_reads_what_is_written_here(name, tmp_path):
    """Ia3 of the linear kernels; those with a bias need one for that too, which is said, and not guessed."""
    params, names = params_of(with_biases(name))
    key_map = key_map_of(name)
    matches = key_map.match({path: leaf.shape for path, leaf in params.items()})
    adapters = {}
    for i, path in enumerate(adapted(matches)):
        fresh = lora.Ia3().init(jax.random.key(i), params[path], matches[path].axes)
        adapters[path] = jax.tree.map(lambda g, i=i: g + jax.random.normal(jax.random.key(i), g.shape) / 3, fresh)
    if name == "qwen2":
        with pytest.raises(lora.LoraError, match="and PEFT has one vector for both: merge them instead"):
            lora.save_peft(tmp_path, adapters, key_map, params=params)
        biases = {path.replace("kernel", "bias"): adapter.gain for path, adapter in adapters.items()}
        axes = lora.KernelAxes((), (), (0,))
        adapters |= {path: lora.Ia3Adapter(gain, axes, ()) for path, gain in biases.items() if path in params}
    lora.save_peft(tmp_path, adapters, key_map, params=params)
    model = loaded(with_biases(name), tmp_path)
    assert model.peft_config["default"].peft_type == "IA3"
    merged, theirs = lora.merge(params, adapters), with_biases(name)
    state = {names[path]: torch.tensor(match.to_torch(np.asarray(merged[path]))) for path, match in matches.items()}
    theirs.load_state_dict(state, strict=False)
    np.testing.assert_allclose(outputs(model, name), outputs(theirs, name), atol=3e-5, rtol=1e-5)
    assert np.abs(outputs(model, name) - outputs(with_biases(name), name)).max() > 1e-3
