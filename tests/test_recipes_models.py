"""`lora.recipes`: published folders as functions and parameters. tests/interop_peft compares with transformers."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.recipes import attention, decoder, loading
from lora_jax.recipes.config import parse_config

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
    },
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gemma3": {
        "model_type": "gemma3_text",
        **{"sliding_window": 4, "sliding_window_pattern": 2, "tie_word_embeddings": False},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}
SLOW = pytest.mark.slow
PACKED = [("llama", 4), ("qwen3_moe", 4), ("qwen3_moe", 8)]
IDS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 32


def facts_of(name, **changes):
    return SIZES | MODELS[name] | {"eos_token_id": [31]} | changes


def tensors_of(facts, seed=0):
    """Random tensors with the names that transformers 4 has in its files."""
    rng = np.random.default_rng(seed)
    config = parse_config(facts)
    found = {}
    for path, match in lora.recipes.model.KEY_MAP.match(decoder.shapes(config)).items():
        for index, name in match.tensors().items():
            layer = np.zeros(match.shape, np.uint8)[match.where(index)]
            tensor = rng.normal(size=match.to_torch(layer).shape, scale=0.3).astype(np.float32)
            if not match.entry.is_of_experts:
                found[name] = tensor
            for e, expert in enumerate(tensor if match.entry.is_of_experts else ()):
                module, _, last = name.rpartition(".")
                parts = {"gate_proj": expert[: len(expert) // 2], "up_proj": expert[len(expert) // 2 :]}
                parts = parts if last == "gate_up_proj" else {"down_proj": expert}
                found |= {f"{module}.{e}.{part}.weight": np.ascontiguousarray(w) for part, w in parts.items()}
        assert path.endswith(("kernel", "bias", "scale", "embedding"))
    return found


def write(folder, facts, tensors, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            facts = facts_of(name)
            made[name] = write(tmp_path_factory.mktemp("models") / name, facts, tensors_of(facts))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def models(folders):
    made = {}

    def model(name):
        if name not in made:
            made[name] = lora.recipes.load(folders(name))
        return made[name]

    return model


def close(found, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=1e-4)


# What is computed -----------------------------------------------------------------------------------------------------


def by_hand(facts, tensors, ids):
    """The logits of one row in float64, token by token and head by head; of torch's tensors by their names."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    kind = facts["model_type"]
    gemma, heads, r = kind.startswith("gemma"), facts["num_attention_heads"], facts["head_dim"]
    group, n = heads // facts["num_key_value_heads"], len(ids)

    def norm(x, name):
        scale = t[name] + gemma
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    def act(x):
        if gemma:
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))

    def turned(x, theta, factor):  # [n, r]
        found = np.empty_like(x)
        for at in range(n):
            for i in range(r // 2):
                angle = at * theta ** (-2 * i / r) / factor
                a, b = x[at, i], x[at, i + r // 2]
                found[at, i], found[at, i + r // 2] = (
                    a * np.cos(angle) - b * np.sin(angle),
                    b * np.cos(angle) + a * np.sin(angle),
                )
        return found

    def attention(x, layer, local):
        theta, factor = 10_000.0, 1.0
        if kind == "gemma3_text" and not local:
            theta, factor = 1e6, facts["rope_scaling"]["factor"]
        out = []
        for head in range(heads):
            q, k, v = (
                linear(x, f"{layer}.self_attn.{name}_proj")[:, i * r : (i + 1) * r]
                for name, i in (("q", head), ("k", head // group), ("v", head // group))
            )
            if f"{layer}.self_attn.q_norm.weight" in t:
                q, k = norm(q, f"{layer}.self_attn.q_norm.weight"), norm(k, f"{layer}.self_attn.k_norm.weight")
            scores = turned(q, theta, factor) @ turned(k, theta, factor).T
            scores /= np.sqrt(facts.get("query_pre_attn_scalar", 256 if kind == "gemma3_text" else r))
            if cap := facts.get("attn_logit_softcapping"):
                scores = cap * np.tanh(scores / cap)
            for i in range(n):
                for j in range(n):
                    if j > i or (local and i - j >= facts["sliding_window"]):
                        scores[i, j] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(shares / shares.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(out, -1), f"{layer}.self_attn.o_proj")

    def mlp(x, name):
        return linear(act(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def experts(x, name):
        out = np.zeros_like(x)
        for i, row in enumerate(x):
            scores = np.exp(row @ t[f"{name}.gate.weight"].T)
            best = np.argsort(-scores)[: facts["num_experts_per_tok"]]
            for e in best:
                out[i] += scores[e] / scores[best].sum() * mlp(row, f"{name}.experts.{e}")
        return out

    x = t["model.embed_tokens.weight"][ids] * (np.sqrt(facts["hidden_size"]) if gemma else 1)
    for i in range(facts["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        local = {"mistral": True, "gemma2": i % 2 == 0, "gemma3_text": (i + 1) % 2 != 0}.get(kind, False)
        y = attention(norm(x, f"{layer}.input_layernorm.weight"), layer, local)
        feed = experts if kind == "qwen3_moe" else mlp
        if kind in ("gemma2", "gemma3_text"):
            x = x + norm(y, f"{layer}.post_attention_layernorm.weight")
            y = feed(norm(x, f"{layer}.pre_feedforward_layernorm.weight"), f"{layer}.mlp")
            x = x + norm(y, f"{layer}.post_feedforward_layernorm.weight")
        else:
            x = x + y
            x = x + feed(norm(x, f"{layer}.post_attention_layernorm.weight"), f"{layer}.mlp")
    logits = norm(x, "model.norm.weight") @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T
    return 30.0 * np.tanh(logits / 30.0) if kind == "gemma2" else logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_by_hand(name, models):
    model, facts = models(name), facts_of(name)
    expected = [by_hand(facts, tensors_of(facts), row) for row in IDS]
    close(jax.jit(model.logits)(model.params, IDS), expected)
    assert np.abs(expected).max() > 1


def test_rates_of_scaled_positions():
    """The kept, the stretched and the mixed part of the spectrum, from the formulas of the papers."""
    plain = 10_000.0 ** (-np.arange(8) / 8)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    facts = facts_of("llama", head_dim=16, rope_scaling=llama3 | {"original_max_position_embeddings": 64})
    found = parse_config(facts).ropes[0].rates(16)
    wavelengths = 2 * np.pi / plain
    for rate, own, wavelength in zip(found, plain, wavelengths, strict=True):
        if wavelength < 64 / 4:
            assert rate == own
        elif wavelength > 64:
            assert rate == own / 8
        else:
            mixed = (64 / wavelength - 1) / (4 - 1)
            assert rate == pytest.approx((1 - mixed) * own / 8 + mixed * own)
    rope = parse_config(facts_of("llama", head_dim=16, rope_scaling=YARN)).ropes[0]
    assert rope.amplitude == pytest.approx(0.1 * np.log(4.0) + 1)
    close(rope.rates(16)[[0, -1]], [plain[0], plain[-1] / 4])


@pytest.mark.parametrize("name", ["gemma3", pytest.param("llama", marks=SLOW)])
def test_packed_rows_are_separate_rows(name, models):
    model = models(name)
    packed = np.concatenate([IDS[0, :7], IDS[1, :5]])[None]
    positions = np.concatenate([np.arange(7), np.arange(5)])[None]
    segments = np.array([[1] * 7 + [2] * 5])
    logits = jax.jit(model.logits)
    found, apart = logits(model.params, packed, positions, segments)[0], logits(model.params, IDS)
    close(found[:7], apart[0, :7])
    close(found[7:], apart[1, :5])


@pytest.mark.parametrize("name", ["gemma2", pytest.param("llama", marks=SLOW)])
def test_queries_in_blocks_change_nothing(name, models, monkeypatch):
    model = models(name)

    def loss(table, ids):
        params = {**model.params, "model": {**model.params["model"], "embed_tokens": {"embedding": table}}}
        return jnp.square(model.logits(params, ids)).mean()

    table = model.params["model"]["embed_tokens"]["embedding"]
    whole = jax.jit(jax.value_and_grad(loss))(table, IDS)
    monkeypatch.setattr(attention, "FEWEST", 5)  # 12 queries in three blocks, the last of them not full
    monkeypatch.setattr(attention, "SCORES", 2 * 4 * 12 * 12)
    text = str(jax.make_jaxpr(loss)(table, IDS))
    assert "12,12]" not in text, "all scores at once"
    jax.tree.map(close, jax.jit(jax.value_and_grad(loss))(table, IDS), whole)


def test_remat_changes_nothing(models):
    model = models("mistral")
    gradients = [
        jax.jit(jax.grad(lambda p, remat=remat: jnp.square(model.logits(p, IDS, remat=remat)).mean()))(model.params)
        for remat in (True, False)
    ]
    jax.tree.map(close, *gradients)


# config.json ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "llama4"}, "model_type is 'llama4', expected one of llama, mistral.*near is 'llama'"),
        ("llama", {"model_type": None}, "model_type is None"),
        ("llama", {"model_type": "qwen2_5_vl", "text_config": {}}, "those of gemma3 and mistral3 are read"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "expected .*LlamaForCausalLM"),
        ("llama", {"quantization_config": {"bits": 4}}, "packed by None, expected one of"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "packed by 'awq'.*before they were packed"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "packed by bitsandbytes"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', expected one of silu"),
        ("llama", {"hidden_size": 0}, "hidden_size is 0, expected a whole number"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("llama", {"num_key_value_heads": 3}, "cannot share 3 heads"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1, expected 0.0"),
        ("llama", {"sliding_window": 5}, "sliding_window is 5, and nothing here knows what it changes"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier is 0.2.*ignore="),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "for all layers of 'llama'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', expected one of"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' lack factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0, expected a number above 0"),
        ("llama", {"rope_scaling": YARN | {"mrope_section": [1]}}, "'mrope_section' is .* do not have"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_theta": "big"}, "rope_theta is 'big'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, expected False"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"layer_types": ["full_attention"]}, "a list of 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"num_local_experts": 8}, r"are \[4, 8\]"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "at most the 4 experts"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, message):
    with pytest.raises(lora.LoraError, match=f"(?s){message}"):
        parse_config(facts_of(name, **changes))


def test_what_is_missing_is_refused_by_name():
    for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"):
        facts = facts_of("llama")
        del facts[name]
        with pytest.raises(lora.LoraError, match=f"lacks '{name}'"):
            parse_config(facts)


def test_fields_that_change_nothing(tmp_path):
    facts = facts_of("llama", transformers_version="4.40", use_cache=True, unknown=None, pretraining_tp=2)
    assert parse_config(facts) == parse_config(facts_of("llama"))
    assert parse_config(facts | {"my_note": "x"}, ignore=["my_note"]) == parse_config(facts)
    with pytest.raises(lora.LoraError, match=r"there is no .*config\.json"):
        lora.recipes.load(tmp_path)


def test_both_versions_of_transformers_say_the_same():
    four = facts_of("llama", rope_theta=5e5, rope_scaling=YARN)
    five = facts_of("llama", rope_parameters=YARN | {"rope_theta": 5e5})
    assert parse_config(four) == parse_config(five)
    linear = MODELS["gemma3"]["rope_scaling"]
    five = facts_of("gemma3", layer_types=["sliding_attention", "full_attention"])
    del five["rope_scaling"], five["sliding_window_pattern"]
    five["rope_parameters"] = {"full_attention": linear | {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert parse_config(facts_of("gemma3")) == parse_config(five)
    moe = facts_of("qwen3_moe")
    assert parse_config({"num_local_experts": moe.pop("num_experts"), **moe}) == parse_config(facts_of("qwen3_moe"))


def test_windows_of_layers():
    qwen = SIZES | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 3}
    assert parse_config(qwen).windows == (None,) * 4
    assert parse_config(qwen | {"use_sliding_window": True}).windows == (None, None, None, 8)
    with pytest.raises(lora.LoraError, match="use_sliding_window is false"):
        parse_config(qwen | {"layer_types": ["sliding_attention"] * 4})
    with pytest.raises(lora.LoraError, match="there is no sliding_window"):
        parse_config(facts_of("gemma2", sliding_window=None, layer_types=["sliding_attention"] * 2))
    assert parse_config(facts_of("mistral", sliding_window=None)).windows == (None, None)


# Files ----------------------------------------------------------------------------------------------------------------


def test_tensors_that_are_missing_or_that_nothing_reads(tmp_path):
    facts, tensors = facts_of("qwen3_moe"), tensors_of(facts_of("qwen3_moe"))

    def problem(changed, match, **more):
        with pytest.raises(lora.LoraError, match=match):
            lora.recipes.load(write(tmp_path / "x", facts | more, changed))

    def without(*names):
        return {name: tensor for name, tensor in tensors.items() if name not in names}

    problem(without("model.norm.weight"), r"(?s)lacks 1 tensor\(s\).*model\.norm\.weight")
    last = "model.layers.1.mlp.experts.3.up_proj.weight"
    problem(without(last), rf"(?s)lacks 1 tensor\(s\).*{last}")
    problem(tensors | {"score.weight": np.zeros(2, np.float32)}, r"(?s)1 tensor\(s\) that nothing reads.*score\.weight")
    problem(tensors, r"(?s)tensor\(s\) that nothing reads.*layers\.1", num_hidden_layers=1)
    problem(tensors, r"(?s)lacks .*layers\.2", num_hidden_layers=3)
    problem(tensors, "needs", vocab_size=33)
    problem(tensors, "has shape", moe_intermediate_size=13)
    problem(tensors | {"model.norm.weight": np.zeros(16, np.int32)}, "is of I32, expected one of")


def test_a_head_beside_a_tied_table(tmp_path, models):
    facts, tensors = facts_of("gemma2"), tensors_of(facts_of("gemma2"))
    table = tensors["model.embed_tokens.weight"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    same = write(tmp_path / "same", facts, tensors | {"lm_head.weight": table.copy()} | frequencies)
    jax.tree.map(np.testing.assert_array_equal, lora.recipes.load(same).params, models("gemma2").params)
    with pytest.raises(lora.LoraError, match="tie_word_embeddings is true, but"):
        lora.recipes.load(write(tmp_path / "other", facts, tensors | {"lm_head.weight": table + 1}))


def test_shards_and_dtypes(tmp_path, models):
    facts, tensors = facts_of("gemma3"), tensors_of(facts_of("gemma3"))
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    model = lora.recipes.load(write(tmp_path / "x", facts, half, shards=3))
    expected = jax.tree.map(lambda w: w.astype(jnp.bfloat16), models("gemma3").params)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(model.hidden, model.params, IDS).dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, model.params, IDS).dtype == jnp.float32
    wide = lora.recipes.load(tmp_path / "x", dtype=jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), wide.params, expected)
    with pytest.raises(lora.LoraError, match="expected one of floats"):
        lora.recipes.load(tmp_path / "x", dtype=jnp.int8)
    with pytest.raises(lora.LoraError, match="expected 4, 8, 16 or None"):
        lora.recipes.load(tmp_path / "x", bits=3)


@pytest.mark.filterwarnings("ignore:packing changes blocks:lora_jax.LoraWarning")  # of these tiny random weights
@pytest.mark.parametrize(("name", "bits"), [("llama", 8), *(pytest.param(*case, marks=SLOW) for case in PACKED)])
def test_packed_while_loading_is_packed_afterwards(name, bits, folders, models):
    model = lora.recipes.load(folders(name), bits=bits)
    expected = lora.bases.quantize(models(name).params, lora.recipes.packing(bits))
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    dense = lora.bases.dense(model.params)
    close(jax.jit(model.logits)(model.params, IDS), jax.jit(models(name).logits)(dense, IDS))


@SLOW
@pytest.mark.filterwarnings("ignore:packing changes blocks:lora_jax.LoraWarning")
def test_packed_models_are_trained_and_generate(folders):
    model = lora.recipes.load(folders("llama"), bits=4)
    dense = model.replace(params=lora.bases.dense(model.params))
    adapters = lora.init(jax.random.key(0), model.params, model.plan(lora.Lora(rank=2)))

    def gradient(own):
        hidden = lora.lora_apply(own.logits)
        return jax.jit(jax.grad(lambda adapters: jnp.square(hidden(own.params, adapters, IDS)).mean()))(adapters)

    jax.tree.map(close, gradient(model), gradient(dense))
    prompts = [[3, 1, 4], [5]]
    assert model.generate(prompts, adapters, count=4, eos=()) == dense.generate(prompts, count=4, eos=())


@SLOW
@pytest.mark.filterwarnings("ignore:packing changes blocks:lora_jax.LoraWarning")
def test_one_tensor_at_a_time_is_in_memory(folders, monkeypatch):
    """Before each tensor is read, the devices hold what is packed so far, and nothing else."""
    read, found = loading.read_weight, []

    def alive():
        return sum(array.nbytes for array in jax.live_arrays())

    def counted(*args):
        found.append(alive() - before)
        return read(*args)

    before = alive()
    monkeypatch.setattr(loading, "read_weight", counted)
    model = lora.recipes.load(folders("llama"), bits=4)
    largest = 4 * max(SIZES["hidden_size"] * SIZES["intermediate_size"], 32 * 16)  # a tensor of the files, in fp32
    whole = sum(array.nbytes for array in jax.tree.leaves(model.params))
    assert len(found) > 20
    assert found == sorted(found), "nothing stays that is not part of the model"
    assert max(found) <= whole <= found[-1] + 2 * largest


@pytest.mark.filterwarnings("ignore:packing changes blocks:lora_jax.LoraWarning")
@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=SLOW)])
def test_sharded_while_loading(bits, tmp_path):
    facts = facts_of("llama", hidden_size=128, intermediate_size=256)
    folder = write(tmp_path / "x", facts, tensors_of(facts))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model, whole = lora.recipes.load(folder, mesh=mesh, bits=bits), lora.recipes.load(folder, bits=bits)
    jax.tree.map(np.testing.assert_array_equal, *(lora.bases.dense(one.params) for one in (model, whole)))
    own = model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert model.specs["model"]["layers"]["mlp"]["up_proj"]["kernel"] == P(None, "fsdp", "tensor")
    assert own.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", "tensor")), 3)
    array = own if bits is None else own.codes
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 64, 128)}
    ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
    close(jax.jit(model.logits)(model.params, ids), jax.jit(whole.logits)(whole.params, IDS))


def test_specs_of_ones_own(folders):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = lora.recipes.abstract(folders("llama")).specs
    specs["model"]["embed_tokens"]["embedding"] = P("x")
    model = lora.recipes.load(folders("llama"), mesh=mesh, specs=specs)
    table = model.params["model"]["embed_tokens"]["embedding"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(4, 16)}
    explicit = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(lora.LoraError, match="axes of type Explicit"):
        lora.recipes.load(folders("llama"), mesh=explicit)
    specs["model"]["norm"]["scale"] = P("y")
    with pytest.raises(lora.LoraError, match="no axis 'y'"):
        lora.recipes.load(folders("llama"), mesh=mesh, specs=specs)
    specs["model"]["norm"]["scale"] = P()
    specs["model"]["layers"]["input_layernorm"]["scale"] = P(None, "x", None)
    with pytest.raises(lora.LoraError, match="at most 2 entries"):
        lora.recipes.load(folders("llama"), mesh=mesh, specs=specs)
    with pytest.raises(lora.LoraError, match="`mesh` is missing"):
        lora.recipes.load(folders("llama"), specs=specs)
    del specs["lm_head"]
    with pytest.raises(lora.LoraError, match="different paths"):
        lora.recipes.load(folders("llama"), mesh=mesh, specs=specs)


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", pytest.param("qwen3_moe", marks=SLOW)])
def test_adapters_of_all_linear_layers(name, models, tmp_path):
    model = models(name)
    plan = model.plan(lora.Lora(rank=2))
    assert len(plan) == (6 if name == "qwen3_moe" else 7)
    adapters = lora.init(jax.random.key(0), model.params, plan)
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    merged = lora.merge(model.params, adapters)
    logits, adapted = jax.jit(model.logits), jax.jit(lora.lora_apply(model.logits))
    found = adapted(model.params, adapters, IDS)
    close(found, logits(merged, IDS), atol=1e-4)
    assert np.abs(found - logits(model.params, IDS)).max() > 1e-2
    lora.save_peft(tmp_path / "adapter", adapters, model.key_map)
    again, _ = lora.load_peft(tmp_path / "adapter", model.params, model.key_map)
    close(adapted(model.params, again, IDS), found)


def test_shapes_are_enough_for_a_plan(folders, models):
    model = lora.recipes.abstract(folders("gemma3"), dtype=jnp.float32)
    assert str(model.plan(lora.Lora(rank=2))) == str(models("gemma3").plan({model.linears: lora.Lora(rank=2)}))
    assert jax.tree.map(lambda a: a.shape, model.params) == jax.tree.map(lambda a: a.shape, models("gemma3").params)


def test_the_head_for_losses_without_logits(models):
    model = models("gemma2")
    hidden = jax.jit(model.hidden)(model.params, IDS)
    labels = np.roll(IDS, -1, axis=1)
    loss = lora.losses.linear_cross_entropy(
        hidden, model.head(model.params), labels, soft_cap=model.config.logit_cap, reduction="sum"
    )
    shares = jax.nn.log_softmax(jax.jit(model.logits)(model.params, IDS))
    close(loss, -jnp.take_along_axis(shares, labels[..., None], axis=-1).sum(), atol=1e-3)


# Generation -----------------------------------------------------------------------------------------------------------


def greedily(logits, prompt, count, eos):
    ids = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 12), np.int32)  # one length for all: what comes after is not seen
        row[0, : len(ids)] = ids
        token = int(logits(row)[0, len(ids) - 1].argmax())
        if token in eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["gemma3", pytest.param("qwen3_moe", marks=SLOW)])
def test_generated_is_the_argmax_of_the_whole_forward_pass(name, models):
    model = models(name)
    adapters = lora.init(jax.random.key(0), model.params, model.plan({".*/o_proj/kernel": lora.Lora(rank=2)}))
    adapters = jax.tree.map(lambda a: a + 0.2, adapters)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    logits = jax.jit(lora.lora_apply(model.logits))
    found = {}
    for given in ({}, adapters):
        expected = [greedily(lambda row, own=given: logits(model.params, own, row), row, 6, [31]) for row in prompts]
        found[len(given)] = model.generate(prompts, given, count=6)
        assert found[len(given)] == expected
    assert found[0] != found[1]


def test_generation_stops_and_draws(models):
    model = models("mistral")
    prompts = [[3, 1, 4], [9, 2]]
    whole = model.generate(prompts, count=6, eos=())
    assert [len(row) for row in whole] == [6, 6]
    stop = whole[0][2]
    cut = model.generate(prompts, count=6, eos=stop)
    assert cut == [row[: row.index(stop)] if stop in row else row for row in whole]
    drawn = [model.generate(prompts, count=6, eos=(), temperature=2.0, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.generate(prompts, count=6, eos=(), temperature=1.0, top_p=1e-6, key=jax.random.key(0)) == whole


def test_top_p_draws_from_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 500)
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (1.0, 4)):
        draw = jax.vmap(lambda key, p=top_p: lora.recipes.generate._choose(logits, key, True, 1.0, p))
        assert set(np.unique(draw(keys))) == set(range(kept))


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "at least one token each"),
        ([[1], []], {}, "at least one token each"),
        ([[1, 32]], {}, "but the model has 32"),
        ([[-1]], {}, "but the model has 32"),
        ([[1]], {"count": 0}, "count=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"temperature": 1.0}, "give key="),
    ],
)
def test_what_generate_refuses(prompts, settings, message, models):
    with pytest.raises(lora.LoraError, match=message):
        models("mistral").generate(prompts, **settings)


@SLOW
def test_it_is_imported_when_it_is_asked_for():
    code = "import sys, lora_jax as l; a = 'lora_jax.recipes' in sys.modules; l.recipes.load; print(a)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_loading_writes_into_one_buffer():
    """The memory of a stacked parameter is taken once, and each layer is written into it."""
    whole = loading._empty(jnp.ones((1, 2)), 3)
    at = whole.unsafe_buffer_pointer()
    for layer in range(3):
        whole = loading._write(whole, jnp.full((1, 2), float(layer)), layer)
        assert whole.unsafe_buffer_pointer() == at
    np.testing.assert_array_equal(whole, [[0, 0], [1, 1], [2, 2]])


LOADING = """
import re, sys, jax, lora_jax as lora

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

small, large, bits = sys.argv[1:]
lora.recipes.load(small, bits=int(bits))  # all programs
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
model = lora.recipes.load(large, bits=int(bits))
print(resident("VmHWM") - before - sum(array.nbytes for array in jax.tree.leaves(model.params)))
"""


@SLOW
@pytest.mark.rare
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process and begins it anew")
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_peak_is_the_model_and_two_tensors(bits, tmp_path):
    """Of memory that a process takes, with that which the allocator keeps."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "vocab_size": 16_384}
    facts = facts_of("llama", attention_bias=False, mlp_bias=False, tie_word_embeddings=True, **sizes)
    layer = tensors_of(facts | {"num_hidden_layers": 1})
    layer = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in layer.items()}
    write(tmp_path / "small", facts | {"num_hidden_layers": 1}, layer)
    many = {name.replace("layers.0", f"layers.{i}"): tensor for i in range(6) for name, tensor in layer.items()}
    write(tmp_path / "large", facts | {"num_hidden_layers": 6}, many, shards=4)
    arguments = [sys.executable, "-c", LOADING, str(tmp_path / "small"), str(tmp_path / "large"), str(bits)]
    ran = subprocess.run(arguments, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kept = 2**25  # of what was freed, by the allocator
    assert int(ran.stdout) <= 2 * max(tensor.nbytes for tensor in layer.values()) + kept, "beside the model"
