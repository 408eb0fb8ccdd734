"""Files of adapters for image models: every form against its change in float64, names, and what is refused."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.interop.image import tensors as image_tensors
from lora_jax.interop.image.adapters import inspect_image, load_image, save_diffusers, save_kohya
from lora_jax.interop.image.joined import rows_of
from lora_jax.interop.image.names import ModuleNames, parse
from lora_jax.interop.image.reader import read_image
from lora_jax.interop.image.spellings import spellings
from lora_jax.interop.image.writers import write_diffusers, write_kohya
from lora_jax.interop.module_adapters import Lazy, module_adapters
from lora_jax.interop.peft.formats.format import Module
from lora_jax.key_maps import KeyMap, conv, experts, linear

IN, OUT, RANK = 6, 4, 2
MAP = KeyMap(
    linear("mid/q/kernel", "mid_block.attentions.0.to_q"),
    linear("mid/out/kernel", "mid_block.attentions.0.to_out.0"),
    conv("down/{i}/kernel", "down_blocks.{i}.resnets.0.conv1"),
)
PARAMS = {
    "mid": {name: {"kernel": np.zeros((IN, OUT), np.float32)} for name in ("q", "out")},
    "down": {"0": {"kernel": np.zeros((3, 3, IN, OUT), np.float32)}},
}
Q, OUT_PATH, CONV = "mid/q/kernel", "mid/out/kernel", "down/0/kernel"
Q_NAME, CONV_NAME = "lora_unet_mid_block_attentions_0_to_q", "lora_unet_down_blocks_0_resnets_0_conv1"
RNG = np.random.default_rng(0)


def random(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def written(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, path, metadata)
    return path


def change(adapter: Any, weight: Any) -> Any:
    """Return what an adapter adds to a weight, in torch's layout."""
    merged = np.asarray(adapter.merge(jnp.asarray(weight)), np.float64) - weight
    return merged.T if merged.ndim == 2 else merged.transpose(3, 2, 0, 1)


# Every form, and its change as LyCORIS defines it ---------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "lora": ({"lora_down.weight": (RANK, IN), "lora_up.weight": (OUT, RANK)}, "lora"),
    "loha": ({f"hada_w{i}_{x}": (OUT, RANK) if x == "a" else (RANK, IN) for i in "12" for x in "ab"}, "loha"),
    "lokr": ({"lokr_w1": (2, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}, "lokr"),
    "lokr whole": ({"lokr_w1": (2, 3), "lokr_w2": (2, 2)}, "lokr"),
    "lokr in four": ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}, "lokr"),
    "lokr, w1 in two": ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2": (2, 2)}, "lokr"),
    "conv": ({"lora_down.weight": (RANK, IN, 3, 3), "lora_up.weight": (OUT, RANK, 1, 1)}, "lora"),
    "conv as matrices": ({"lora_down.weight": (RANK, IN * 9), "lora_up.weight": (OUT, RANK)}, "lora"),
    "conv with a core": (
        {"lora_down.weight": (3, IN, 1, 1), "lora_mid.weight": (RANK, 3, 3, 3), "lora_up.weight": (OUT, RANK, 1, 1)},
        "lora",
    ),
    "loha of a conv": (
        {f"hada_w{i}_{x}": (OUT, RANK) if x == "a" else (RANK, IN * 9) for i in "12" for x in "ab"},
        "loha",
    ),
    "loha with cores": (
        {f"hada_w{i}_{x}": (RANK, OUT if x == "a" else IN) for i in "12" for x in "ab"}
        | {f"hada_t{i}": (RANK, RANK, 3, 3) for i in "12"},
        "loha",
    ),
    "lokr of a conv": ({"lokr_w1": (2, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2 * 9)}, "lora"),
    "whole lokr of a conv": ({"lokr_w1": (2, 3), "lokr_w2": (2, 2, 3, 3)}, "lora"),
    "whole lokr of a conv, wide": ({"lokr_w1": (4, 1), "lokr_w2": (1, 6, 3, 3)}, "lora"),
    "lokr of a conv in five": (
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2)},
        "lora",
    ),
}


def defined(tensors: dict[str, Any], alpha: float) -> Any:
    """Return the change of a module by its definition, [out, in, *window] or [out, in * window], in float64."""
    t = {name.removesuffix(".weight"): np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    if "lora_mid" in t:
        down, up = t["lora_down"][:, :, 0, 0], t["lora_up"][:, :, 0, 0]
        return alpha / len(down) * np.einsum("oi,ijhw,jc->ochw", up, t["lora_mid"], down)
    if "lora_down" in t:
        down, up = t["lora_down"], t["lora_up"].reshape(OUT, -1)
        return alpha / len(down) * np.tensordot(up, down, 1)
    if "hada_t1" in t:
        one, two = (np.einsum("ijhw,io,jc->ochw", t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in "12")
        return alpha / RANK * one * two
    if "hada_w1_a" in t:
        return alpha / RANK * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = np.einsum("ijhw,io,jc->ochw", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    ranks = [len(t[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in t]
    whole = np.kron(w1, w2) if w2.ndim == 2 else np.einsum("ab,cdhw->acbdhw", w1, w2).reshape(OUT, IN, *w2.shape[2:])
    return whole * (alpha / ranks[0] if ranks else 1)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_change(form: str, tmp_path: Path) -> None:
    shapes, kind = FORMS[form]
    is_conv = "conv" in form or "cores" in form
    tensors = {ending: random(*shape) for ending, shape in shapes.items()}
    module = CONV_NAME if is_conv else Q_NAME
    names = {f"{module}.{ending}": tensor for ending, tensor in tensors.items()}
    path = written(tmp_path / "file.safetensors", names | {f"{module}.alpha": np.float32(3.0)})
    (own, adapter), *more = load_image(path, PARAMS, MAP).items()
    assert (own, more) == (CONV if is_conv else Q, [])
    assert type(adapter).__name__.lower() == f"{kind}adapter"
    weight = PARAMS["down"]["0"]["kernel"] if is_conv else PARAMS["mid"]["q"]["kernel"]
    found = change(adapter, weight)
    np.testing.assert_allclose(found, defined(tensors, 3.0).reshape(found.shape), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["own", "LORA"])
def test_shapes_are_known_before_anything_is_read(form: str, format: str) -> None:
    shapes, kind = FORMS[form]
    window = (3, 3) if "conv" in form or "cores" in form else ()
    arrays = {parse(f"lora_unet_x.{ending}").array: random(*shape) for ending, shape in shapes.items()}
    own = kind.upper() if format == "own" else format
    made = image_tensors.arrays_of(arrays, window, own)
    told = image_tensors.forms_of_arrays(
        {name: array.shape for name, array in arrays.items()}, dict.fromkeys(arrays, np.float32), window, own
    )
    assert {name: (array.shape, array.dtype) for name, array in made.items()} == {
        name: (form.shape, form.dtype) for name, form in told.items()
    }


def test_a_file_of_several_kinds_is_the_lora_that_they_are(tmp_path: Path) -> None:
    tensors = {
        Q_NAME: {ending: random(*shape) for ending, shape in FORMS["lokr"][0].items()},
        CONV_NAME: {ending: random(*shape) for ending, shape in FORMS["loha with cores"][0].items()},
        "lora_unet_mid_block_attentions_0_to_out_0": {e: random(*shape) for e, shape in FORMS["lora"][0].items()},
    }
    path = tmp_path / "file.safetensors"
    written(path, {f"{module}.{ending}": t for module, own in tensors.items() for ending, t in own.items()})
    found = load_image(path, PARAMS, MAP)
    assert {type(adapter) for adapter in found.values()} == {lora.LoraAdapter}
    for path_of, (module, own) in zip((Q, CONV, OUT_PATH), tensors.items(), strict=True):
        weight = PARAMS["down"]["0"]["kernel"] if path_of == CONV else PARAMS["mid"]["q"]["kernel"]
        rank = {Q: 1, CONV: RANK, OUT_PATH: RANK}[path_of]
        expected = defined(own, rank)  # no alpha: a scale of 1
        np.testing.assert_allclose(change(found[path_of], weight), expected, rtol=2e-5, atol=2e-6, err_msg=module)


def test_lengths_of_outputs(tmp_path: Path) -> None:
    weight, down, up, m = random(IN, OUT), random(RANK, IN), random(OUT, RANK), random(OUT, 1)
    names = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": m, "alpha": np.float32(1)}
    path = written(tmp_path / "file.safetensors", {f"{Q_NAME}.{ending}": t for ending, t in names.items()})
    adapter = load_image(path, PARAMS, MAP)[Q]
    assert isinstance(adapter, lora.DoraAdapter)
    v = weight.T.astype(np.float64) + 0.5 * up @ down
    expected = m * v / np.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(adapter.merge(jnp.asarray(weight))).T, expected, rtol=1e-5)


# Scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(None, 1), (0.0, 1), (1.0, 0.5), (-3.0, -1.5), (np.int64(4), 2), (np.ones((1,), jnp.bfloat16), 0.5)],
)
def test_the_scale_is_alpha_over_r(alpha: Any, scale: float, tmp_path: Path) -> None:
    tensors = {f"{Q_NAME}.{ending}": random(*shape) for ending, shape in FORMS["lora"][0].items()}
    if alpha is not None:
        tensors[f"{Q_NAME}.alpha"] = np.asarray(alpha, np.float32) if isinstance(alpha, float) else np.asarray(alpha)
    assert load_image(written(tmp_path / "file.safetensors", tensors), PARAMS, MAP)[Q].scale == scale


def options(**more: Any) -> dict[str, str]:
    entries = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["to_q"],
        "alora_invocation_tokens": None,
    }
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in (entries | more).items()})}


def diffusers_file(path: Path, metadata: dict[str, str] | None = None) -> Path:
    tensors = {"lora_A.weight": random(RANK, IN), "lora_B.weight": random(OUT, RANK)}
    names = {f"unet.mid_block.attentions.0.to_q.{ending}": tensor for ending, tensor in tensors.items()}
    return written(path, names, metadata)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        (None, 1),
        (options(), 4),
        (options(use_rslora=True, lora_alpha=1), 2**-0.5),
        (options(alpha_pattern={"to_q": 3}), 1.5),
    ],
)
def test_diffusers_says_the_scale_in_the_header(metadata: Any, scale: float, tmp_path: Path) -> None:
    adapter = load_image(diffusers_file(tmp_path / "file.safetensors", metadata), PARAMS, MAP)[Q]
    assert adapter.scale == np.float32(scale)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"lora_adapter_metadata": "{"}, "no JSON"),
        ({"lora_adapter_metadata": "[]"}, "expected an object"),
        (options(r=3), "by its metadata 3"),
        (options(use_dora=True), "of LORA, and by lora_adapter_metadata they are of DORA"),
        (options(init_lora_weights="pissa"), "changed the base too"),
        (options(some_new_option=3), "some_new_option"),
    ],
)
def test_options_that_do_not_fit(metadata: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(lora.LoraError, match=says):
        load_image(diffusers_file(tmp_path / "file.safetensors", metadata), PARAMS, MAP)


# Names ----------------------------------------------------------------------------------------------------------------

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
SPELLED = [
    (
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        None,
        f"{ATTENTION}.to_q",
    ),
    ("lycoris_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.alpha", None, f"{ATTENTION}.to_q"),
    ("lora_transformer_down_blocks_0_attentions_1_proj_in.lora_up.weight", None, "down_blocks.0.attentions.1.proj_in"),
    ("lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q.lora_down.weight", None, f"{ATTENTION}.to_q"),
    ("diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_q.lora_A.weight", None, f"{ATTENTION}.to_q"),
    ("model.diffusion_model.input_blocks.2.1.proj_in.lora_B", None, "down_blocks.0.attentions.1.proj_in"),
    (f"unet.{ATTENTION}.to_q.lora_A.weight", None, f"{ATTENTION}.to_q"),
    (f"unet.{ATTENTION}.to_q.lora.down.weight", None, f"{ATTENTION}.to_q"),
    (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", None, f"{ATTENTION}.to_q"),
    (f"unet.{ATTENTION}.processor.to_out_lora.up.weight", None, f"{ATTENTION}.to_out.0"),
    (f"transformer.{ATTENTION}.to_q.lora_A.default.weight", None, f"{ATTENTION}.to_q"),
    (f"base_model.model.{ATTENTION}.to_q.lora_B.weight", None, f"{ATTENTION}.to_q"),
    (f"{ATTENTION}.to_q.lokr_w1", None, f"{ATTENTION}.to_q"),
    (f"unet.{ATTENTION}.to_q.lora_magnitude_vector", None, f"{ATTENTION}.to_q"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "text_encoder", TEXT),
    ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "text_encoder", TEXT),
    ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.dora_scale", "text_encoder_2", TEXT),
    ("lora_te3_text_model_encoder_layers_0_self_attn_q_proj.hada_t1", "text_encoder_3", TEXT),
    (f"text_encoder.{TEXT}.lora_linear_layer.up.weight", "text_encoder", TEXT),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight", "text_encoder", TEXT),
    (f"text_encoder_2.{TEXT}.lora_B.weight", "text_encoder_2", TEXT),
    (f"text_encoders.clip_g.transformer.{TEXT}.lora_B.weight", "text_encoder_2", TEXT),
]
MODULES = [f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "down_blocks.0.attentions.1.proj_in", TEXT]
MODULES += [f"down_blocks.{i}.resnets.{j}.conv1" for i in range(2) for j in range(2)]


@pytest.mark.parametrize(("name", "component", "module"), SPELLED)
def test_all_spellings(name: str, component: str | None, module: str) -> None:
    found = parse(name)
    assert found.component == component
    assert [target.module for target in ModuleNames(MODULES).targets(found)] == [module]


UNET = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("down_blocks.1.resnets.0.time_emb_proj", "input_blocks.4.0.emb_layers.1"),
    ("down_blocks.1.resnets.1.conv_shortcut", "input_blocks.5.0.skip_connection"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
    ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
    ("up_blocks.0.resnets.2.conv1", "output_blocks.2.0.in_layers.2"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    ("up_blocks.1.attentions.0.proj_in", "output_blocks.3.1.proj_in"),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
]


def test_names_of_stabilitys_unet() -> None:
    assert [(module, spelling.name) for module, spelling in spellings([name for name, _ in UNET])] == UNET


FLUX = [
    ("transformer_blocks.3.attn.to_k", ("double_blocks.3.img_attn.qkv", 1, 3)),
    ("transformer_blocks.3.attn.add_v_proj", ("double_blocks.3.txt_attn.qkv", 2, 3)),
    ("transformer_blocks.3.ff_context.net.0.proj", ("double_blocks.3.txt_mlp.0", 0, 1)),
    ("single_transformer_blocks.7.proj_mlp", ("single_blocks.7.linear1", 3, 4)),
    ("single_transformer_blocks.7.proj_out", ("single_blocks.7.linear2", 0, 1)),
    ("proj_out", ("final_layer.linear", 0, 1)),
]


def test_names_of_flux() -> None:
    assert [(module, tuple(spelling)) for module, spelling in spellings([name for name, _ in FLUX])] == FLUX
    assert [rows_of(i, 4, 70, 10) for i in range(4)] == [slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 70)]


@pytest.mark.parametrize(
    ("modules", "name", "says"),
    [
        (["a.b_c", "a_b.c"], "lora_unet_a_b_c.alpha", "may be each of 'a.b_c', 'a_b.c'"),
        (["a.b"], "lora_unet_a_c.alpha", "no module is called; the nearest are 'a.b'"),
        (
            ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj"],
            "lora_unet_double_blocks_0_img_attn_qkv.alpha",
            "joins 3 modules, of which the model has",
        ),
    ],
)
def test_names_that_are_of_no_one_module(modules: list[str], name: str, says: str) -> None:
    with pytest.raises(lora.LoraError, match=says):
        ModuleNames(modules).targets(parse(name))


# Flux -----------------------------------------------------------------------------------------------------------------

D = 6
FLUX_MAP = KeyMap(
    *(linear(f"double/{x}", f"transformer_blocks.0.attn.to_{x}") for x in "qkv"),
    *(linear(f"text/{x}", f"transformer_blocks.0.attn.add_{x}_proj") for x in "qkv"),
    *(linear(f"single/{x}", f"single_transformer_blocks.0.attn.to_{x}") for x in "qkv"),
    linear("single/mlp", "single_transformer_blocks.0.proj_mlp"),
)
FLUX_PARAMS = {
    "double": {x: np.zeros((D, D), np.float32) for x in "qkv"},
    "text": {x: np.zeros((D, D), np.float32) for x in "qkv"},
    "single": {x: np.zeros((D, 4 * D if x == "mlp" else D), np.float32) for x in ("q", "k", "v", "mlp")},
}


def flux_file(path: Path, blocks: bool) -> tuple[Path, dict[str, Any]]:
    """Write joined modules as sd-scripts does, and return the change of each."""
    tensors, changes = {}, {}
    for group, name, widths in [
        ("double", "double_blocks_0_img_attn_qkv", dict.fromkeys("qkv", D)),
        ("single", "single_blocks_0_linear1", {"q": D, "k": D, "v": D, "mlp": 4 * D}),
    ]:
        n, total = len(widths) * RANK, sum(widths.values())
        down, up, start = random(n, D), random(total, n), 0
        for i, (x, width) in enumerate(widths.items()):
            if blocks:
                up[start : start + width, : i * RANK] = up[start : start + width, (i + 1) * RANK :] = 0
            changes[f"{group}/{x}"] = 0.5 * up[start : start + width].astype(np.float64) @ down
            start += width
        names = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(n / 2)}
        tensors |= {f"lora_unet_{name}.{ending}": tensor for ending, tensor in names.items()}
    return written(path, tensors), changes


@pytest.mark.parametrize("blocks", [True, False])
def test_joined_modules_of_flux(blocks: bool, tmp_path: Path) -> None:
    path, changes = flux_file(tmp_path / "file.safetensors", blocks)
    found = load_image(path, FLUX_PARAMS, FLUX_MAP, component="transformer")
    assert sorted(found) == sorted(changes)
    for own, adapter in found.items():
        assert adapter.a.shape[-1] == (RANK if blocks else RANK * (4 if "single" in own else 3))
        group, x = own.split("/")
        np.testing.assert_allclose(change(adapter, FLUX_PARAMS[group][x]), changes[own], rtol=1e-5, atol=1e-6)


def test_parts_of_joined_modules_are_written_as_blocks(tmp_path: Path) -> None:
    key_map = KeyMap(*(linear(f"double/{x}", "double_blocks.0.img_attn.qkv", part=i) for i, x in enumerate("qkv")))
    params = {"double": FLUX_PARAMS["double"]}
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {f"double/{x}": lora.LoraAdapter(random(D, RANK), random(RANK, D), axes, 0.5) for x in "qkv"}
    save_kohya(tmp_path / "file.safetensors", adapters, key_map, component="transformer", params=params)
    tensors = load_file(tmp_path / "file.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert tensors[f"{name}.lora_up.weight"].shape == (3 * D, 3 * RANK)
    assert tensors[f"{name}.alpha"] == 3 * RANK / 2
    found = load_image(tmp_path / "file.safetensors", FLUX_PARAMS, FLUX_MAP, component="transformer")
    for path, adapter in adapters.items():  # in diffusers' names they are apart again
        for field in ("a", "b"):
            np.testing.assert_array_equal(getattr(found[path], field), getattr(adapter, field))
        assert found[path].scale == adapter.scale


# Ours, to a file and back ---------------------------------------------------------------------------------------------

SHAPES = {Q: (IN, OUT), OUT_PATH: (IN, OUT), CONV: (3, 3, IN, OUT)}
AXES = {path: lora.KernelAxes((), tuple(range(len(shape) - 1)), (len(shape) - 1,)) for path, shape in SHAPES.items()}


def ours(kind: str, scale: float = 0.7) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, shape in SHAPES.items():
        axes, inputs = AXES[path], shape[:-1]
        a, b = random(*inputs, RANK), random(RANK, OUT)
        if kind == "lora":
            found[path] = lora.LoraAdapter(a, b, axes, scale)
        elif kind == "dora":
            found[path] = lora.DoraAdapter(a, b, np.abs(random(OUT)), axes, scale)
        elif kind == "loha":
            found[path] = lora.LohaAdapter(a, b, random(*inputs, RANK), random(RANK, OUT), axes, scale)
        elif path != CONV:
            second = {"b": random(1, 2)} if kind == "lokr" else {}
            w2 = random(3, 1) if kind == "lokr" else random(3, 2)
            found[path] = lora.LokrAdapter(random(2, 2), w2, axes, scale, inputs, (OUT,), **second)
    return found


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "whole lokr"])
def test_to_kohya_and_back(kind: str, tmp_path: Path) -> None:
    adapters = ours(kind)
    save_kohya(tmp_path / "file.safetensors", adapters, MAP)
    found = load_image(tmp_path / "file.safetensors", PARAMS, MAP)
    assert sorted(found) == sorted(adapters)
    for path, adapter in adapters.items():
        assert type(found[path]) is type(adapter)
        for field, array in adapter.arrays().items():
            if kind != "whole lokr" or field not in ("w1", "ratio"):  # its scale is in w1
                np.testing.assert_array_equal(getattr(found[path], field), array)
        np.testing.assert_allclose(
            change(found[path], np.ones(SHAPES[path], np.float32)),
            change(adapter, np.ones(SHAPES[path], np.float32)),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("scale", [0.7, 4.0])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "whole lokr"])
def test_to_diffusers_and_back(kind: str, scale: float, tmp_path: Path) -> None:
    adapters = ours(kind, scale)
    save_diffusers(tmp_path / "pytorch_lora_weights.safetensors", adapters, MAP)
    found = load_image(tmp_path, PARAMS, MAP)
    for path, adapter in adapters.items():
        own = found[path]
        assert own.scale == 1
        assert type(own) is (lora.LoraAdapter if kind == "loha" else type(adapter))
        if kind in ("lora", "dora") and scale == 4:  # no rounding
            np.testing.assert_array_equal(own.b, 4 * adapter.b)
        w = np.ones(SHAPES[path], np.float32)
        np.testing.assert_allclose(change(own, w), change(adapter, w), rtol=1e-5, atol=2e-6)


def test_no_change_stays_no_change(tmp_path: Path) -> None:
    """An alpha of 0 is read as none, so the factors have it."""
    save_kohya(tmp_path / "file.safetensors", ours("lora", 0.0), MAP)
    for path, adapter in load_image(tmp_path / "file.safetensors", PARAMS, MAP).items():
        assert not change(adapter, np.zeros(SHAPES[path], np.float32)).any()


def test_several_components_in_one_file(tmp_path: Path) -> None:
    text_map = KeyMap(linear("q/kernel", TEXT))
    text = {"q/kernel": lora.LoraAdapter(random(IN, 1), random(1, OUT), AXES[Q], 2.0)}
    params = {"q": {"kernel": np.zeros((IN, OUT), np.float32)}}
    path, unet = tmp_path / "file.safetensors", ours("lora")
    for save in (save_kohya, save_diffusers):
        save(path, unet, MAP, beside={"text_encoder": (text, text_map), "text_encoder_2": (text, text_map)})
        assert inspect_image(path).components == {"unet": 3, "text_encoder": 1, "text_encoder_2": 1}
        for component in ("text_encoder", "text_encoder_2"):
            found = load_image(path, params, text_map, component=component)
            np.testing.assert_array_equal(found["q/kernel"].a, text["q/kernel"].a)
        assert sorted(load_image(path, PARAMS, MAP)) == sorted(unet)
        with pytest.raises(lora.LoraError, match=r"no adapters of 'text_encoder_3'.*component= is one of these"):
            load_image(path, params, text_map, component="text_encoder_3")
    save_kohya(path, unet, MAP, beside={"text_encoder": (text, text_map)})
    assert any(name.startswith("lora_te_") for name in load_file(path))


def test_what_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_kohya(path, ours("lora", 0.5), MAP, metadata={"modelspec.title": "cats"}, dtype=jnp.float16)
    with safe_open(path, "np") as file:
        assert file.metadata() == {
            "format": "pt",
            "modelspec.title": "cats",
            "ss_network_alpha": "1",
            "ss_network_dim": "2",
            "ss_network_module": "networks.lora",
        }
    assert inspect_image(path).metadata == {
        "modelspec.title": "cats",
        "ss_network_alpha": "1",
        "ss_network_dim": "2",
        "ss_network_module": "networks.lora",
    }
    dtypes = {name.rpartition(".")[2]: tensor.dtype.name for name, tensor in load_file(path).items()}
    assert dtypes == {"weight": "float16", "alpha": "float32"}


def test_from_one_file_to_another_without_a_model(tmp_path: Path) -> None:
    save_diffusers(tmp_path / "first.safetensors", ours("lora"), MAP)
    found = read_image(tmp_path / "first.safetensors")
    write_kohya(tmp_path / "second.safetensors", {"unet": found})
    first, second = (load_image(tmp_path / f"{name}.safetensors", PARAMS, MAP) for name in ("first", "second"))
    for path, adapter in first.items():
        np.testing.assert_array_equal(second[path].a, adapter.a)
        np.testing.assert_array_equal(second[path].b, adapter.b)
    with pytest.raises(lora.LoraError, match="only the model tells where they were"):
        read_image(tmp_path / "second.safetensors")


def test_each_module_is_asked_for_once(tmp_path: Path) -> None:
    found = module_adapters("save(path, adapters, key_map)", ours("dora"), MAP, formats=("LORA", "DORA"))
    asked = Counter[str]()

    def make(name: str) -> Module:
        asked[name] += 1
        return found.modules[name]

    counted = found._replace(modules=Lazy([*found.modules], make))
    for i, write in enumerate((write_kohya, write_diffusers), 1):
        write(tmp_path / "file.safetensors", {"unet": counted}, dtype=jnp.bfloat16)
        assert asked == Counter(dict.fromkeys(found.modules, i))


def test_with_a_plan(tmp_path: Path) -> None:
    params = {"mid": {"q": {"kernel": jnp.zeros((IN, OUT))}}}
    plan = lora.plan(
        lambda p, x: x @ p["mid"]["q"]["kernel"], params, jnp.ones((1, IN)), rules={".*": lora.Lora(rank=2)}
    )
    save_kohya(tmp_path / "file.safetensors", {Q: ours("lora")[Q]}, MAP)
    assert load_image(tmp_path / "file.safetensors", plan, MAP)[Q].axes == plan[Q].axes
    save_kohya(tmp_path / "file.safetensors", ours("lora"), MAP)
    with pytest.raises(lora.LoraError, match="which no module is called"):
        load_image(tmp_path / "file.safetensors", plan, MAP)


# What is refused ------------------------------------------------------------------------------------------------------

GOOD = {"lora_down.weight": (RANK, IN), "lora_up.weight": (OUT, RANK)}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"oft_blocks": (2, 3, 3)}, "OFT, a rotation of W"),
        ({"oft_diag": (2, 3)}, "OFT, a rotation of W"),
        ({"boft_blocks": (2, 3)}, "BOFT"),
        ({"a1.weight": (2, 3)}, "GLoRA"),
        ({"on_input": (1,)}, "IA3"),
        ({"diff": (OUT, IN)}, "trained whole"),
        ({"diff_b": (OUT,)}, "trained whole"),
        ({"w_norm": (OUT,)}, "trained whole"),
        ({"reshape_weight": (2,)}, "more inputs than the model's"),
        ({"lora_B.bias": (OUT,)}, "a bias of factors"),
        ({"strange": (OUT,)}, "no tensor of LoRA, LoHa or LoKr"),
        ({"alpha": ()}, "an alpha alone"),
        ({"lora_down.weight": (RANK, IN)}, "and not up"),
        (GOOD | {"lora_up.weight": (OUT, 3)}, "do not fit one another"),
        (GOOD | {"lora_mid.weight": (3, RANK, 3, 3)}, "do not fit one another"),
        (GOOD | {"hada_w1_a": (OUT, RANK)}, "of no one kind"),
        (GOOD | {"alpha": (2,)}, "expected one number"),
        (GOOD | {"dora_scale": (1, IN)}, "lengths of its inputs"),
        (GOOD | {"dora_scale": (5, 1)}, "do not fit one another"),
        (GOOD | {"lora_down.weight": (0, IN), "lora_up.weight": (OUT, 0)}, "no numbers"),
        (GOOD | {"lora_A.weight": (RANK, IN)}, "the same under another name"),
        (FORMS["loha"][0] | {"dora_scale": (OUT, 1)}, "read beside LoRA alone"),
        (FORMS["loha"][0] | {"hada_t1": (RANK, RANK, 3, 3)}, "not hada_t2"),
        (FORMS["lokr"][0] | {"lokr_w2": (2, 2)}, "there twice"),
        (FORMS["lokr"][0] | {"lokr_w2_b": (2, 2)}, "do not fit one another"),
        ({"lokr_w1": (2, 3)}, "not lokr_w2_a, lokr_w2_b"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2)}, r"do not fit 'mid/q/kernel'"),
        ({"lora_down.weight": (RANK, IN + 1), "lora_up.weight": (OUT, RANK)}, r"do not fit 'mid/q/kernel'"),
        ({"lora_down.weight": (RANK, IN, 3, 3), "lora_up.weight": (OUT, RANK, 1, 1)}, r"do not fit 'mid/q/kernel'"),
    ],
)
def test_what_is_refused_by_name(shapes: dict[str, Any], says: str, tmp_path: Path) -> None:
    tensors = {f"{Q_NAME}.{ending}": np.ones(shape, np.float32) for ending, shape in shapes.items()}
    with pytest.raises(lora.LoraError, match=says):
        load_image(written(tmp_path / "file.safetensors", tensors), PARAMS, MAP)


def test_lengths_beside_none(tmp_path: Path) -> None:
    tensors = {f"{Q_NAME}.{ending}": random(*shape) for ending, shape in (GOOD | {"dora_scale": (OUT, 1)}).items()}
    tensors |= {f"{CONV_NAME}.{ending}": random(*shape) for ending, shape in FORMS["conv"][0].items()}
    with pytest.raises(lora.LoraError, match=r"lengths of its outputs \(DoRA\), and"):
        load_image(written(tmp_path / "file.safetensors", tensors), PARAMS, MAP)


def test_one_module_under_two_names(tmp_path: Path) -> None:
    names = ("lora_unet_mid_block_attentions_0_to_q", "lora_unet_middle_block_1_to_q")
    tensors = {f"{name}.{ending}": random(*shape) for name in names for ending, shape in GOOD.items()}
    with pytest.raises(lora.LoraError, match="are of one module"):
        load_image(written(tmp_path / "file.safetensors", tensors), PARAMS, MAP)


def test_dtypes_and_numbers(tmp_path: Path) -> None:
    tensors = {f"{Q_NAME}.{ending}": np.ones(shape, np.float64) for ending, shape in GOOD.items()}
    path = tmp_path / "file.safetensors"
    assert load_image(written(path, tensors), PARAMS, MAP, dtype=None)[Q].a.dtype == np.float32
    with pytest.raises(lora.LoraError, match="of I32, expected a floating dtype"):
        load_image(written(path, {name: tensor.astype(np.int32) for name, tensor in tensors.items()}), PARAMS, MAP)
    with pytest.raises(lora.LoraError, match="expected a finite number"):
        load_image(written(path, tensors | {f"{Q_NAME}.alpha": np.asarray(np.inf)}), PARAMS, MAP)
    with pytest.raises(lora.LoraError, match="numbers beyond float16"):
        save_kohya(
            path, {Q: lora.LoraAdapter(np.full((IN, 1), 1e6), random(1, OUT), AXES[Q], 1.0)}, MAP, dtype=np.float16
        )


def test_mistakes_of_calls(tmp_path: Path) -> None:
    path, adapters = tmp_path / "file.safetensors", ours("lora")
    for call, says in [
        (lambda: load_image(path, PARAMS, MAP), "there is no"),
        (lambda: load_image(path, MAP, PARAMS), "key_map"),
        (lambda: load_image(path, PARAMS, MAP, component="vae"), "expected one of 'unet'"),
        (lambda: save_kohya(path, adapters, MAP, component="vae"), "expected one of 'unet'"),
        (lambda: save_kohya(path, adapters, MAP, beside={"transformer": (adapters, MAP)}), "of the same model"),
        (lambda: save_kohya(path, adapters, MAP, beside={"text_encoder": adapters}), r"expected \(adapters, key_map\)"),
        (lambda: save_diffusers(path, {}, MAP), "there are no adapters"),
    ]:
        with pytest.raises(lora.LoraError, match=says):
            call()
    ambiguous = KeyMap(linear("a/kernel", "a.b_c"), linear("b/kernel", "a_b.c"))
    both = {path: lora.LoraAdapter(random(IN, 1), random(1, OUT), AXES[Q], 1.0) for path in ("a/kernel", "b/kernel")}
    with pytest.raises(lora.LoraError, match=r"may be each of 'a\.b_c', 'a_b\.c'"):
        save_kohya(path, both, ambiguous)
    stacked = {"up": lora.LoraAdapter(random(2, IN, 1), random(2, 1, OUT), lora.KernelAxes((0,), (1,), (2,)), 1.0)}
    with pytest.raises(lora.LoraError, match="is of experts"):
        save_diffusers(path, stacked, KeyMap(experts("up", "up")))
    assert not path.exists()


def test_products_larger_than_any_models(tmp_path: Path) -> None:
    tensors = {f"{Q_NAME}.lokr_w1_a": np.ones((2**16, 1)), f"{Q_NAME}.lokr_w1_b": np.ones((1, 2**17))}
    tensors[f"{Q_NAME}.lokr_w2"] = np.ones((1, 1))
    with pytest.raises(lora.LoraError, match="entries, expected at most"):
        load_image(written(tmp_path / "file.safetensors", tensors), PARAMS, MAP)


def test_changed_files_are_read_or_refused(share: Any, tmp_path: Path) -> None:
    random_of_test, path = Random(0), tmp_path / "file.safetensors"
    files = []
    for form in ("conv with a core", "loha", "lokr in four"):
        module = CONV_NAME if "conv" in form else Q_NAME
        tensors = {f"{module}.{ending}": random(*shape) for ending, shape in FORMS[form][0].items()}
        files.append(written(path, tensors | {f"{module}.alpha": np.float32(1)}).read_bytes())
    files.append(diffusers_file(path, options()).read_bytes())
    flux_file(path, True)
    files.append(path.read_bytes())
    for _ in range(share(300)):
        data = bytearray(random_of_test.choice(files))
        for _ in range(random_of_test.randint(1, 4)):
            at = random_of_test.randrange(min(len(data), 900))
            data[at] = random_of_test.choice([random_of_test.randrange(256), *b'0123456789{}[]",:_.AB'])
        path.write_bytes(data[: random_of_test.choice([len(data), random_of_test.randrange(len(data))])])
        for params, key_map in ((PARAMS, MAP), (FLUX_PARAMS, FLUX_MAP)):
            with contextlib.suppress(lora.LoraError):
                assert load_image(path, params, key_map)


def test_files_of_any_names_and_shapes_are_read_or_refused(share: Any, tmp_path: Path) -> None:
    """Well-formed files whose tensors have names and shapes of one another."""
    chosen, path = Random(1), tmp_path / "file.safetensors"
    endings = [ending for shapes, _ in FORMS.values() for ending in shapes]
    endings += ["alpha", "dora_scale", "lora_magnitude_vector", "lora_A.weight", "lora_B.weight", "oft_blocks", "diff"]
    modules = [Q_NAME, CONV_NAME, "unet.mid_block.attentions.0.to_q", "lora_unet_double_blocks_0_img_attn_qkv"]
    modules += ["lora_unet_single_blocks_0_linear1", "transformer.transformer_blocks.0.attn.to_q", "", "x."]
    dtypes = [np.float32, np.float16, np.float64, jnp.bfloat16, np.int64]
    for _ in range(share(1000)):
        form = chosen.choice([*FORMS])
        module = CONV_NAME if "conv" in form or "cores" in form else Q_NAME
        module = chosen.choice(modules) if not chosen.randrange(3) else module
        own = [[module, *pair, np.float32] for pair in {**FORMS[form][0], "alpha": ()}.items()]
        for _ in range(chosen.choice([0, 1, 1, 2, 3])):
            tensor = chosen.choice(own)
            sizes = [*tensor[2]]
            place = chosen.randrange(len(sizes) + 1)
            changed = [*sizes[:place], chosen.randrange(5), *sizes[place + chosen.randrange(2) :]]
            others = [chosen.choice(modules), chosen.choice(endings), changed, chosen.choice(dtypes)]
            field = chosen.randrange(4)
            tensor[field] = others[field]
        tensors = {f"{name}.{ending}": np.ones(sizes, dtype) for name, ending, sizes, dtype in own}
        written(path, tensors, options() if not chosen.randrange(4) else None)
        for params, key_map in ((PARAMS, MAP), (FLUX_PARAMS, FLUX_MAP)):
            with contextlib.suppress(lora.LoraError):
                assert load_image(path, params, key_map)
        with contextlib.suppress(lora.LoraError):
            found = read_image(path)
            for name, module_of in found.modules.items():
                for field, array in module_of.arrays.items():
                    outline = found.outlines[name].arrays[field]
                    assert (outline.shape, outline.dtype) == (array.shape, array.dtype)
