"""The real mlx-lm: models that it loads with adapters of ours compute our logits, and what it trained is read.

Needs mlx, which has wheels for Linux and macOS: `make test-mlx`.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-mlx")
pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-mlx")
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from test_recipes_models import SIZES, tensors_of, write  # noqa: E402

import lora_jax as lora  # noqa: E402
from lora_jax.interop.mlx.adapters import load_mlx, read_mlx, save_mlx  # noqa: E402
from lora_jax.interop.module_adapters import by_module, module_adapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
IDS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 32
FACTS = SIZES | {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": False}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
MODELS = {
    "llama": FACTS | {"model_type": "llama"},
    "tied": FACTS | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3_moe": FACTS | {"model_type": "qwen3_moe"} | MOE,
}
LINEARS = ".*(q_proj|v_proj|o_proj|up_proj|down_proj|lm_head)/kernel"
KEY_MAP = lora.recipes.model.KEY_MAP


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    return {name: write(where / name, facts, tensors_of(facts)) for name, facts in MODELS.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: lora.recipes.load(folder) for name, folder in folders.items()}


def random_adapters(model, rules):
    plan = lora.plan(model.logits, model.params, IDS, rules=rules)
    adapters = lora.init(jax.random.key(0), model.params, plan)
    rng = np.random.default_rng(1)
    mask = lora.trainable_mask(adapters)
    return jax.tree.map(
        lambda leaf, trained: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype) if trained else leaf,
        adapters,
        mask,
    )


def ours(model, adapters):
    return np.asarray(jax.jit(lora.lora_apply(model.logits))(model.params, adapters, IDS))


def theirs(folder, adapters: Path | None = None):
    model, _ = load_model(folder)
    if adapters is not None:
        load_adapters(model, str(adapters))
    return np.asarray(model(mx.array(IDS)))


LORA = lora.Lora(rank=4, alpha=8)
CASES = {
    "llama": ("llama", {LINEARS: LORA}),
    "patterns": ("llama", {".*q_proj/kernel": lora.Lora(rank=3, alpha=5), LINEARS: lora.RsLora(rank=4, alpha=8)}),
    "dora": ("llama", {LINEARS: lora.Dora(rank=4, alpha=8)}),
    "table": ("tied", {".*embed_tokens/embedding": LORA, ".*q_proj/kernel": LORA}),
    "experts": ("qwen3_moe", {".*(q_proj|experts/.*)/kernel": LORA}),
    "gates only": ("qwen3_moe", {".*experts/gate_up_proj/kernel": LORA}),
}


@pytest.mark.parametrize("case", CASES)
def test_mlx_computes_our_logits(case, folders, models, tmp_path):
    name, rules = CASES[case]
    model = models[name]
    adapters = random_adapters(model, rules)
    save_mlx(tmp_path / "out", adapters, KEY_MAP, params=model.params)
    found = theirs(folders[name], tmp_path / "out")
    assert np.abs(found - theirs(folders[name])).max() > 1e-2
    np.testing.assert_allclose(found, ours(model, adapters), atol=1e-4)
    again = load_mlx(tmp_path / "out", model.params, KEY_MAP, tied="both")
    for one, other in zip(*(jax.tree.leaves(lora.merge(model.params, a)) for a in (adapters, again)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_just_these_modules_get_factors(folders, models, tmp_path):
    """Whole names are keys, so nothing else becomes a LoRA, whatever the number of layers: here one of the two."""
    model = models["llama"]
    adapters = random_adapters(model, {".*q_proj/kernel": LORA})
    save_mlx(tmp_path / "out", jax.tree.map(lambda leaf: leaf.at[1].set(0), adapters), KEY_MAP)
    loaded, _ = load_model(folders["llama"])
    load_adapters(loaded, str(tmp_path / "out"))
    made = [name for name, _ in tree_flatten(loaded.parameters()) if name.endswith(".lora_a")]
    assert made == ["model.layers.0.self_attn.q_proj.lora_a"]


TRAINED = {
    "llama": ("llama", "lora", None),
    "relative keys": ("llama", "lora", ["self_attn.q_proj", "mlp.down_proj"]),
    "dora": ("llama", "dora", ["self_attn.q_proj"]),
    "experts": (
        "qwen3_moe",
        "lora",
        ["self_attn.v_proj", *(f"mlp.switch_mlp.{p}_proj" for p in ("gate", "up", "down"))],
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_mlx_trained_is_read(case, folders, models, tmp_path):
    """Two steps of Adam by mlx itself, saved as its trainer saves; experts have an A for each half then."""
    name, kind, keys = TRAINED[case]
    model, _ = load_model(folders[name])
    parameters = {"rank": 3, "scale": 10.0, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    mx.random.seed(0)
    model.freeze()
    layers = 2 if kind == "dora" else 1  # our stack of layers has magnitudes in all of them or in none
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    optimizer = optimizers.Adam(learning_rate=1e-2)
    loss = nn.value_and_grad(model, lambda model, ids: nn.losses.cross_entropy(model(ids), ids, reduction="mean"))
    for _ in range(2):
        optimizer.update(model, loss(model, mx.array(IDS))[1])
    (tmp_path / "adapters").mkdir()
    trained = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters/adapters.safetensors"), trained)
    config = {
        "fine_tune_type": kind,
        "num_layers": layers,
        "lora_parameters": parameters,
        "lr_schedule": None,
        "seed": 0,
    }
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(config))
    adapters = load_mlx(tmp_path / "adapters", models[name].params, KEY_MAP)
    found = np.asarray(model(mx.array(IDS)))
    assert np.abs(found - theirs(folders[name])).max() > 1e-3
    np.testing.assert_allclose(ours(models[name], adapters), found, atol=1e-4)
    # Without a model, and back: the same tensors, but for experts, whose two A are both in each half then.
    again = module_adapters("save", *by_module(read_mlx(tmp_path / "adapters")), formats=(kind.upper(),))
    assert sorted(again.modules) == sorted(read_mlx(tmp_path / "adapters").modules)
