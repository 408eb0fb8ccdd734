"""Kinds of the real HF PEFT that are a LoRA in another form: read as that, and written as LoRA, with PEFT's outputs."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_interop import key_map_of, loaded, made, moved, outputs, params_of

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")
from peft import save_as_lora  # noqa: E402
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig  # noqa: E402
from peft.tuners.lora.intruders import reduce_intruder_dimension  # noqa: E402

import lora_jax as lora  # noqa: E402
from lora_jax.interop.peft.formats.refused import REFUSED  # noqa: E402
from lora_jax.interop.peft.formats.registry import FORMATS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BLOCKS = BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
KINDS = {
    "miss": lambda **more: peft.MissConfig(r=3, init_weights=False, **more),
    "miss_even": lambda **more: peft.MissConfig(r=4, init_weights=True, **more),
    "miss_mini": lambda **more: peft.MissConfig(r=4, mini_r=4, init_weights="mini", **more),
    "gralora": lambda **more: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, **more),
    "gralora_hybrid": lambda **more: peft.GraloraConfig(r=6, alpha=6, gralora_k=2, hybrid_r=3, **more),
    "delora": lambda **more: peft.DeloraConfig(r=3, init_weights=False, rank_pattern={"q_proj": 2}, **more),
    "bdlora": lambda **more: peft.LoraConfig(r=4, lora_alpha=6, use_bdlora=BLOCKS, **more),
    "kasa": lambda **more: peft.LoraConfig(r=3, lora_alpha=6, kasa_config=KasaConfig(), **more),
    "kasa_rslora": lambda **more: peft.LoraConfig(
        r=3, lora_alpha=6, kasa_config=KasaConfig(), use_rslora=True, rank_pattern={"q_proj": 2}, **more
    ),
    "velora": lambda **more: peft.LoraConfig(r=3, lora_alpha=6, velora_config=VeloraConfig(num_groups=4), **more),
    "monteclora": lambda **more: peft.LoraConfig(r=3, lora_alpha=6, monteclora_config=MontecloraConfig(), **more),
    "mica": lambda **more: peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="mica", **more),
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
CASES = [
    *((kind, "llama") for kind in KINDS if kind != "bdlora"),
    *((kind, "gpt2") for kind in ("gralora", "gralora_hybrid")),
]


def written(kind, name, folder, **more):
    """What PEFT computes with all that is trained moved at random, and its merged weights; saved to a folder."""
    targets = more.pop("target_modules", TARGETS[name])
    if name == "gpt2":
        more["fan_in_fan_out"] = True
    model = moved(peft.get_peft_model(made(name), KINDS[kind](target_modules=targets, **more)))
    model.save_pretrained(folder)
    expected = outputs(model, name)
    return expected, model.merge_and_unload().state_dict()


def assert_same(name, tmp_path, expected, state, rank=None):
    """Applied, merged, written and merged into a checkpoint: what PEFT computes."""
    params, names = params_of(made(name))
    key_map = key_map_of(name)
    adapters, others = lora.load_peft(tmp_path / "theirs", params, key_map)
    assert not others
    assert {type(adapter) for adapter in adapters.values()} == {lora.LoraAdapter}
    if rank is not None:
        assert {adapter.a.shape[-1] for adapter in adapters.values()} == {rank}
    merged = lora.merge(params, adapters)
    matches = key_map.match({path: leaf.shape for path, leaf in params.items()})
    for path, match in matches.items():
        found = match.to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[names[path]].numpy(), atol=1e-5, rtol=1e-5, err_msg=path)
    assert any(np.abs(merged[path] - params[path]).max() > 1e-3 for path in adapters)
    lora.save_peft(tmp_path / "ours", adapters, key_map)
    np.testing.assert_allclose(outputs(loaded(made(name), tmp_path / "ours"), name), expected, atol=1e-5)
    made(name).save_pretrained(tmp_path / "base")
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    model = type(made(name)).from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(outputs(model, name), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_read_as_the_lora_that_it_is(kind, name, tmp_path):
    expected, state = written(kind, name, tmp_path / "theirs")
    ranks = {"miss": 3, "miss_even": 4, "gralora": 8, "gralora_hybrid": 15, "kasa": 6}
    assert_same(name, tmp_path, expected, state, ranks.get(kind))


def test_block_diagonal_factors(tmp_path):
    """A of one module and B of another one, each with its blocks alone in the file."""
    expected, state = written("bdlora", "llama", tmp_path / "theirs", target_modules=["q_proj", "down_proj"])
    shapes = {name: t.shape for name, t in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items()}
    assert (4, 12) in shapes.values()
    assert (16, 2) in shapes.values()
    assert_same("llama", tmp_path, expected, state, rank=4)


def test_what_kasa_leaves_of_the_base(tmp_path):
    """Two ranks of the published weight, which are needed for that: no shapes and no plan will do."""
    written("kasa", "llama", tmp_path / "theirs")
    params, _ = params_of(made("llama"))
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    with pytest.raises(lora.LoraError, match=r"began with 'kasa' as a part of the weights.*found shapes"):
        lora.load_peft(tmp_path / "theirs", shapes, key_map_of("llama"))


def test_miss_with_products_of_the_base(tmp_path):
    config = peft.MissConfig(r=4, init_weights="bat", target_modules=["q_proj"])
    peft.get_peft_model(made("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(lora.LoraError, match="init_weights is 'bat', with which MiSS multiplies blocks of the weight"):
        lora.load_peft(tmp_path, params_of(made("llama"))[0], key_map_of("llama"))


LOKR = {"products": (1, 4), "whole_second": (1, 8), "whole_first": (2, 4)}  # rank and factor


@pytest.mark.parametrize("case", LOKR)
def test_lokr_of_two_products(case, tmp_path):
    """`decompose_both`: the first factor is read whole, and written so."""
    rank, factor = LOKR[case]
    config = peft.LoKrConfig(
        r=rank, alpha=5, decompose_both=True, decompose_factor=factor, target_modules=TARGETS["llama"]
    )
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path / "theirs")
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors")}
    assert ("lokr_w1_a" in names) == (case != "whole_first")
    params, torch_names = params_of(made("llama"))
    adapters, _ = lora.load_peft(tmp_path / "theirs", params, key_map_of("llama"))
    assert {type(adapter) for adapter in adapters.values()} == {lora.LokrAdapter}
    lora.save_peft(tmp_path / "ours", adapters, key_map_of("llama"))
    expected = outputs(model, "llama")
    np.testing.assert_allclose(outputs(loaded(made("llama"), tmp_path / "ours"), "llama"), expected, atol=1e-5)
    merged, state = lora.merge(params, adapters), model.merge_and_unload().state_dict()
    for path, match in key_map_of("llama").match({path: leaf.shape for path, leaf in params.items()}).items():
        found = match.to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[torch_names[path]].numpy(), atol=1e-5, rtol=1e-5, err_msg=path)


def test_every_kind_of_peft_has_an_answer():
    """Each is read, or refused by name with what to do."""
    read = {format.peft_type for format in FORMATS.values()}
    kinds = {kind.value for kind in peft.PeftType}
    assert read <= kinds
    assert read.isdisjoint(REFUSED)
    assert kinds <= read | {*REFUSED}
    assert {*REFUSED} - kinds <= {"BONE"}  # which earlier versions had


@pytest.mark.parametrize("kind", ["OFT", "BOFT", "HRA", "HIRA", "SHIRA", "C3A", "RANDLORA", "VBLORA"])
def test_folders_that_are_refused_say_why(kind, tmp_path):
    more = {"VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2}, "C3A": {"block_size": 4}}.get(kind, {})
    config = peft.get_peft_config({"peft_type": kind, "target_modules": ["q_proj"], **more})
    config.save_pretrained(tmp_path)
    with pytest.raises(lora.LoraError, match=f"peft_type is '{kind}', which is not read: .*in PEFT"):
        lora.load_peft(tmp_path, params_of(made("llama"))[0], key_map_of("llama"))


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_intruder_dimensions_are_those_of_peft(threshold, tmp_path):
    """`to_lora` counts what `reduce_intruder_dimension` finds."""
    config = peft.LoraConfig(r=3, lora_alpha=9, init_lora_weights=False, target_modules=TARGETS["llama"])
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path)
    lines = []
    reduce_intruder_dimension(model, top_k=5, threshold_epsilon=threshold, logging_sink=lines.append)
    expected = {}
    for line in lines:
        name, _, found = line.partition(": ")
        if name.startswith("base_model.model.") and "ntruders" in found:
            expected[name.removeprefix("base_model.model.")] = int(found.rpartition(" ")[2]) if "Intr" in found else 0
    params, _ = params_of(made("llama"))
    adapters, _ = lora.load_peft(tmp_path, params, key_map_of("llama"))
    _, report = lora.to_lora(adapters, params=params, top=5, threshold=threshold)
    assert {path.removesuffix("/kernel").replace("/", "."): w.intruders for path, w in report.items()} == expected
    assert report.intruders > 0


@pytest.mark.parametrize("kind", ["loha", "randlora"])
def test_the_nearest_of_a_rank_is_that_of_peft(kind, tmp_path):
    """What PEFT's own `save_as_lora` truncates, and a kind that is refused here for that call."""
    more = {"target_modules": ["q_proj", "down_proj"]}
    config = peft.LoHaConfig(r=3, alpha=5, **more) if kind == "loha" else peft.RandLoraConfig(r=2, **more)
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path / "theirs")
    save_as_lora(tmp_path / "lora", model, rank=4)
    params, _ = params_of(made("llama"))
    key_map = key_map_of("llama")
    theirs, _ = lora.load_peft(tmp_path / "lora", params, key_map)
    if kind == "randlora":
        with pytest.raises(lora.LoraError, match=r"'RANDLORA', which is not read: .*peft.save_as_lora"):
            lora.load_peft(tmp_path / "theirs", params, key_map)
        return
    ours, report = lora.to_lora(lora.load_peft(tmp_path / "theirs", params, key_map)[0], rank=4)
    merged = [lora.merge(params, adapters) for adapters in (ours, theirs)]
    for path in ours:
        np.testing.assert_allclose(merged[0][path], merged[1][path], atol=1e-5)
    assert 0 < report.loss < 1
