"""The real diffusers and LyCORIS: they read what is written here, and what they write is read here.

Tiny random models, a UNet with convolutions and a Flux transformer. A model whose weights are W and what our adapters
add to it says the same as the model with their adapters beside. Needs torch, diffusers, peft and lycoris-lora:
`make test-image`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: make test-image")
lycoris = pytest.importorskip("lycoris", reason="needs lycoris-lora: make test-image")
peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-image")
torch = pytest.importorskip("torch", reason="needs torch: make test-image")
import transformers  # noqa: E402
from diffusers.loaders import (  # noqa: E402
    FluxLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)

import lora_jax as lora  # noqa: E402
from lora_jax.interop.image.adapters import inspect_image, load_image, save_diffusers, save_kohya  # noqa: E402
from lora_jax.interop.image.names import parse  # noqa: E402
from lora_jax.interop.image.spellings import spellings  # noqa: E402
from lora_jax.key_maps import KeyMap, conv, linear  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs, of one another's versions
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
torch.set_num_threads(1)
FILE = "pytorch_lora_weights.safetensors"


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def text_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, projection_dim=8
    )
    return transformers.CLIPTextModel(config).eval()


def said_by_unet(model: Any) -> Any:
    torch.manual_seed(1)
    return model(torch.randn(2, 4, 8, 8), torch.tensor([3, 40]), torch.randn(2, 5, 8)).sample


def said_by_flux(model: Any) -> Any:
    torch.manual_seed(1)
    return model(
        hidden_states=torch.randn(2, 4, 4),
        encoder_hidden_states=torch.randn(2, 3, 8),
        pooled_projections=torch.randn(2, 8),
        timestep=torch.tensor([0.1, 0.7]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def said_by_text(model: Any) -> Any:
    return model(torch.tensor([[1, 4, 7, 2]])).last_hidden_state


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "unet": (unet, said_by_unet),
    "transformer": (flux, said_by_flux),
    "text_encoder": (text_encoder, said_by_text),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def says(component: str, model: Any) -> Any:
    with quiet():
        return MODELS[component][1](model).numpy()


def key_map_of(model: Any, part_of: Callable[[str], bool] = lambda name: True) -> tuple[KeyMap, dict[str, Any]]:
    """Return a key map for a model of torch, with a parameter for each of these modules, and the parameters."""
    entries, params = [], {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and part_of(name):
            make, order = (linear, (1, 0)) if isinstance(module, torch.nn.Linear) else (conv, (2, 3, 1, 0))
            entries.append(make(f"{name}/kernel", name))
            params[name] = {"kernel": module.weight.detach().numpy().transpose(order).copy()}
    return KeyMap(*entries), params


def random_adapters(params: Any, kind: str, scale: float = 0.7, rank: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    found: dict[str, Any] = {}
    for name, leaves in params.items():
        w = leaves["kernel"]
        axes = lora.KernelAxes((), tuple(range(w.ndim - 1)), (w.ndim - 1,))
        *inputs, outputs = w.shape
        a, b = random(*inputs, rank), random(rank, outputs)
        if kind == "lora":
            found[f"{name}/kernel"] = lora.LoraAdapter(a, b, axes, scale)
        elif kind == "dora":
            lengths = np.linalg.norm(w.reshape(-1, outputs), axis=0) * (1 + 0.1 * random(outputs))
            found[f"{name}/kernel"] = lora.DoraAdapter(a, b, lengths, axes, scale)
        elif kind == "loha":
            found[f"{name}/kernel"] = lora.LohaAdapter(a, b, random(*inputs, rank), random(rank, outputs), axes, scale)
        elif kind == "lokr" and w.ndim == 2:
            rule = lora.Lokr(rank=1, alpha=scale)
            fresh = rule.init(jax.random.key(0), w, axes)
            arrays = {name: random(*a.shape) for name, a in fresh.arrays().items() if name != "ratio" and a is not None}
            found[f"{name}/kernel"] = type(fresh)(
                **{"axes": axes, "ratio": scale, "inputs": tuple(inputs), "outputs": (outputs,), **arrays}
            )
    return found


def merged(model: Any, params: Any, adapters: dict[str, Any], key_map: KeyMap) -> Any:
    """Return the model of torch with what the adapters add to its weights."""
    tensors = lora.to_torch(lora.merge(params, adapters), key_map)
    left = model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=False)
    assert not left.unexpected_keys
    return model


def differ(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).max() > 1e-3)


# Ours to diffusers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_diffusers_reads_what_is_written_for_it(kind: str, tmp_path: Path) -> None:
    model = unet()
    key_map, params = key_map_of(model)
    adapters = random_adapters(params, kind)
    save_diffusers(tmp_path / FILE, adapters, key_map)
    before, expected = says("unet", model), says("unet", merged(unet(), params, adapters, key_map))
    for with_metadata in (True, False):
        theirs = unet()
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
        assert alphas is None
        assert metadata is not None
        with quiet():
            theirs.load_lora_adapter(state, prefix="unet", metadata=metadata if with_metadata else None)
        np.testing.assert_allclose(says("unet", theirs), expected, **CLOSE)
    assert differ(before, expected)


def test_a_flux_transformer_in_diffusers(tmp_path: Path) -> None:
    model = flux()
    key_map, params = key_map_of(model)
    adapters = random_adapters(params, "lora")
    save_diffusers(tmp_path / FILE, adapters, key_map, component="transformer")
    state, metadata = FluxLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    with quiet():
        model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    expected = says("transformer", merged(flux(), params, adapters, key_map))
    np.testing.assert_allclose(says("transformer", model), expected, **CLOSE)
    assert differ(says("transformer", flux()), expected)


# Ours to kohya's names, by diffusers' converters ----------------------------------------------------------------------


def in_stabilitys_names(key_map: KeyMap) -> KeyMap:
    names = {module: spelling.name for module, spelling in spellings([entry.name for entry in key_map.entries])}
    assert len(names) == len(key_map.entries)
    return KeyMap(*(type(e)(e.path, names[e.name], e.axes, e.kind) for e in key_map.entries))


def test_stabilitys_names_are_those_that_diffusers_converts() -> None:
    """A model with blocks of all kinds, as SDXL's; each module's number is in its tensor."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 4, 4),
        layers_per_block=2,
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
        transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    key_map, params = key_map_of(model)
    state = {}
    for i, entry in enumerate(in_stabilitys_names(key_map).entries):
        name = f"lora_unet_{entry.name.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": torch.tensor([[float(i)]]), f"{name}.lora_up.weight": torch.zeros(1, 1)}
    found, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(state, unet_config=model.config)
    modules = [*params]
    numbers = {
        parse(name).module: modules[int(tensor)] for name, tensor in found.items() if parse(name).array == "down"
    }
    assert len(numbers) == len(modules) > 300
    assert [*numbers] == [*numbers.values()]


@pytest.mark.parametrize("names", ["diffusers", "stability"])
def test_diffusers_converts_what_is_written_for_kohya(names: str, tmp_path: Path) -> None:
    key_map, params = key_map_of(unet())
    adapters = random_adapters(params, "lora")
    text_map, text_params = key_map_of(text_encoder())
    text = random_adapters(text_params, "lora", scale=1.3)
    written = key_map if names == "diffusers" else in_stabilitys_names(key_map)
    path = tmp_path / "cats.safetensors"
    save_kohya(path, adapters, written, beside={"text_encoder": (text, text_map)})
    model, encoder = unet(), text_encoder()
    mixin = StableDiffusionLoraLoaderMixin if names == "diffusers" else StableDiffusionXLLoraLoaderMixin
    config = {} if names == "diffusers" else {"unet_config": model.config}
    state, alphas = mixin.lora_state_dict(path, **config)
    with quiet():
        mixin.load_lora_into_unet(state, network_alphas=alphas, unet=model)
        mixin.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=encoder, prefix="text_encoder")
    expected = says("unet", merged(unet(), params, adapters, key_map))
    np.testing.assert_allclose(says("unet", model), expected, **CLOSE)
    expected = says("text_encoder", merged(text_encoder(), text_params, text, text_map))
    np.testing.assert_allclose(says("text_encoder", encoder), expected, **CLOSE)
    assert differ(says("text_encoder", text_encoder()), expected)
    for own, adapter in load_image(path, params, key_map).items():  # and here, by the names of diffusers
        np.testing.assert_array_equal(adapter.a, adapters[own].a)


def test_diffusers_converts_the_joined_modules_of_flux(tmp_path: Path) -> None:
    """Its converter has the widths of the published model for single blocks, so these are left out."""
    model = flux()
    key_map, params = key_map_of(model, lambda name: name.startswith("transformer_blocks."))
    adapters = random_adapters(params, "lora")
    names = dict(spellings([*params, "single_transformer_blocks.0.proj_out"]))
    entries = [
        linear(entry.path, names[entry.name].name, part=names[entry.name].part if names[entry.name].parts > 1 else None)
        for entry in key_map.entries
        if entry.name in names
    ]
    adapters = {entry.path: adapters[entry.path] for entry in entries}
    path = tmp_path / "cats.safetensors"
    save_kohya(path, adapters, KeyMap(*entries), component="transformer")
    again = load_image(path, params, key_map, component="transformer")
    for own, adapter in adapters.items():
        np.testing.assert_array_equal(again[own].a, adapter.a)
    state = FluxLoraLoaderMixin.lora_state_dict(path)
    with quiet():
        model.load_lora_adapter(state, prefix="transformer")
    expected = says("transformer", merged(flux(), params, adapters, key_map))
    np.testing.assert_allclose(says("transformer", model), expected, **CLOSE)


# Diffusers' files to ours ---------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "plain": {"r": 4, "lora_alpha": 4},
    "scaled": {"r": 4, "lora_alpha": 3, "alpha_pattern": {"to_k": 5}, "rank_pattern": {"to_k": 2}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 3, "use_dora": True},
}


def randomised(model: Any) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("options", OPTIONS)
def test_what_diffusers_writes_is_read(options: str, tmp_path: Path) -> None:
    theirs = unet()
    key_map, params = key_map_of(theirs)
    targets = ["to_q", "to_k", "conv1", "proj_in", "ff.net.2"]
    with quiet():
        theirs.add_adapter(peft.LoraConfig(target_modules=targets, **OPTIONS[options]))
        randomised(theirs)
        theirs.save_lora_adapter(tmp_path / "one")
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path / "two",
            unet_lora_layers=peft.get_peft_model_state_dict(theirs),
            unet_lora_adapter_metadata={**theirs.peft_config["default"].to_dict()},
        )
    expected = says("unet", theirs)
    adapters = load_image(tmp_path / "two", params, key_map)
    assert {type(adapter).__name__ for adapter in adapters.values()} == {
        "DoraAdapter" if options == "dora" else "LoraAdapter"
    }
    np.testing.assert_allclose(says("unet", merged(unet(), params, adapters, key_map)), expected, **CLOSE)
    assert inspect_image(tmp_path / "two").components == {"unet": len(adapters)}


# LyCORIS --------------------------------------------------------------------------------------------------------------

ALGORITHMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "locon": ({"algo": "locon", "conv_dim": 2}, {"LoraAdapter"}),
    "locon with cores": ({"algo": "locon", "use_tucker": True}, {"LoraAdapter"}),
    "locon, rs": ({"algo": "locon", "rs_lora": True}, {"LoraAdapter"}),
    "dora": ({"algo": "locon", "dora_wd": True}, {"DoraAdapter"}),
    "dora with cores": ({"algo": "locon", "dora_wd": True, "use_tucker": True}, {"DoraAdapter"}),
    "loha": ({"algo": "loha"}, {"LohaAdapter"}),
    "loha with cores": ({"algo": "loha", "use_tucker": True}, {"LohaAdapter"}),
    "lokr": ({"algo": "lokr", "factor": 2}, {"LoraAdapter"}),  # with convolutions
    "lokr of linear layers": ({"algo": "lokr", "factor": 4, "enable_conv": False}, {"LokrAdapter"}),
    "lokr with cores": ({"algo": "lokr", "factor": 2, "use_tucker": True, "decompose_both": True}, {"LoraAdapter"}),
    "whole lokr": ({"algo": "lokr", "full_matrix": True, "enable_conv": False}, {"LokrAdapter"}),
}


def wrapped(model: Any, **options: Any) -> Any:
    """Return a network of LyCORIS around a model, with random numbers."""
    targets = ["Linear"] if options.pop("enable_conv", True) is False else ["Linear", "Conv2d"]
    lycoris.LycorisNetwork.apply_preset({"target_module": targets, "enable_conv": True})
    torch.manual_seed(3)
    network = lycoris.LycorisNetwork(
        model,
        multiplier=1.0,
        lora_dim=2,
        conv_lora_dim=options.pop("conv_dim", 2),
        alpha=3.0,
        conv_alpha=1.5,
        use_tucker=options.pop("use_tucker", False),
        network_module=options.pop("algo"),
        weight_decompose=options.pop("dora_wd", False),
        **options,
    )
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_lycoris_writes_is_read(algorithm: str, tmp_path: Path) -> None:
    options, kinds = ALGORITHMS[algorithm]
    theirs = unet()
    key_map, params = key_map_of(theirs)
    network = wrapped(theirs, **options)
    network.save_weights(tmp_path / "file.safetensors", torch.float32, {})
    expected = says("unet", theirs)
    adapters = load_image(tmp_path / "file.safetensors", params, key_map)
    assert {type(adapter).__name__ for adapter in adapters.values()} == kinds
    np.testing.assert_allclose(says("unet", merged(unet(), params, adapters, key_map)), expected, **CLOSE)
    assert differ(says("unet", unet()), expected)


@pytest.mark.parametrize(
    "algorithm", ["diag-oft", "boft", "glora", "full", "ia3", "dora on inputs", "loha with lengths"]
)
def test_what_has_no_place_is_refused_by_name(algorithm: str, tmp_path: Path) -> None:
    options = {
        "dora on inputs": {"algo": "locon", "dora_wd": True, "wd_on_out": False},
        "loha with lengths": {"algo": "loha", "dora_wd": True},
    }.get(algorithm, {"algo": algorithm})
    theirs = unet()
    key_map, params = key_map_of(theirs)
    wrapped(theirs, **options, enable_conv=False).save_weights(tmp_path / "file.safetensors", torch.float32, {})
    with pytest.raises(lora.LoraError, match=r"OFT|GLoRA|trained whole|IA3|lengths of"):
        load_image(tmp_path / "file.safetensors", params, key_map)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_lycoris_reads_what_is_written_for_kohya(kind: str, tmp_path: Path) -> None:
    model = unet()
    key_map, params = key_map_of(model)
    adapters = random_adapters(params, kind)
    save_kohya(tmp_path / "file.safetensors", adapters, key_map)
    before, expected = says("unet", model), says("unet", merged(unet(), params, adapters, key_map))
    lycoris.LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        with quiet():
            network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "file.safetensors"), model)
            assert len(network.loras) == len(adapters)
            network.apply_to()
        np.testing.assert_allclose(says("unet", model), expected, **CLOSE)
    finally:
        lycoris.LycorisNetwork.LORA_PREFIX = "lycoris"
    assert differ(before, expected)
