"""The real HF PEFT: it reads what is written here without a warning, and what it writes is read here.

Tiny random models of transformers, one for each key map. Needs torch, transformers and peft: `make test-interop`.
"""

import dataclasses
import warnings

import assets
import finetune_sentiment as demo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snippets
from safetensors.numpy import load_file

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")
import transformers as hf  # noqa: E402
import twins  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lora_jax as lora  # noqa: E402
from lora_jax import key_maps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

DECODER = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}

MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(vocab_size=11, max_position_embeddings=16, **LAYERS)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, **HEADS)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, **HEADS)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**DECODER, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, **HEADS)),
    "qwen3moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**DECODER, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    ),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, **HEADS, tie_word_embeddings=False)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, **HEADS, tie_word_embeddings=False)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **LAYERS)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, tie_word_embeddings=False)
    ),
}
KEY_MAPS = {
    "bert": key_maps.BERT,
    "gpt2": key_maps.GPT2,
    "gemma": key_maps.GEMMA,
    "gemma2": key_maps.GEMMA,
    "vit": key_maps.VIT,
    "t5": key_maps.T5,
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def key_map_of(name):
    return KEY_MAPS.get(name, key_maps.LLAMA)


def inputs(name):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (2, 5), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if name == "t5" else {})


def outputs(model, name):
    with torch.no_grad():
        return model(**inputs(name))[0].numpy()


def params_of(model):
    """`{path: array}` by the types of the modules, and the torch name of each."""
    params, names, every = {}, {}, dict(model.named_parameters())
    for module_name, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            name, array = f"{module_name}.{leaf}", tensor.detach().numpy()
            path = module_name.replace(".", "/")
            if name not in every:
                continue  # the same as another one
            if leaf == "bias":
                path += "/bias"
            elif isinstance(module, torch.nn.Linear):
                path, array = f"{path}/kernel", array.T
            elif isinstance(module, Conv1D):
                path += "/kernel"
            elif isinstance(module, torch.nn.Embedding):
                path += "/embedding"
            elif isinstance(module, torch.nn.Conv2d):
                path, array = f"{path}/kernel", array.transpose(2, 3, 1, 0)
            elif leaf == "weight" and array.ndim == 1:
                path += "/scale"
            elif leaf == "weight":  # a router
                path, array = f"{path}/kernel", array.T
            elif array.ndim == 3 and "experts" in module_name:
                path, array = f"{path}/{leaf}/kernel", array.transpose(0, 2, 1)
            else:
                path += f"/{leaf}"
            params[path], names[path] = jnp.asarray(array), name
    return params, names


def adapted(matches):
    """The linear kernels that are adapted: those of the blocks."""
    return [
        path
        for path, match in matches.items()
        if match.entry.kind in ("linear", "conv1d", "experts") and "{i}" in match.entry.path and "/gate/" not in path
    ]


def trained(adapter, change):
    """An adapter with `change(array)` in the place of all that is trained."""
    return jax.tree.map(lambda a, moves: change(a) if moves else a, adapter, lora.trainable_mask(adapter))


def random_adapters(matches):
    """Of rank 3, with alpha 5, all of it changing something."""
    found = {}
    for i, path in enumerate(adapted(matches)):
        match = matches[path]
        fresh = lora.Lora(rank=3, alpha=5).factors(jax.random.key(i), match.shape, match.axes)
        found[path] = trained(fresh, lambda a, i=i: jax.random.normal(jax.random.key(1000 + i), a.shape) / 3)
    return found


def loaded(model, folder):
    """PEFT's model, with everything that it would warn of an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT's own
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_key_map_names_every_parameter(name):
    params, names = params_of(made(name))
    matches = key_map_of(name).match({path: leaf.shape for path, leaf in params.items()})
    assert {path: match.tensors()[()] for path, match in matches.items()} == names
    for path, match in matches.items():
        tensor = dict(made(name).named_parameters())[names[path]].detach().numpy()
        np.testing.assert_array_equal(match.from_torch(tensor, ()), params[path])
        np.testing.assert_array_equal(match.to_torch(np.asarray(params[path])), tensor)


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_what_is_written_here(name, tmp_path):
    params, names = params_of(made(name))
    key_map = key_map_of(name)
    adapters = random_adapters(key_map.match({path: leaf.shape for path, leaf in params.items()}))
    lora.save_peft(tmp_path, adapters, key_map)
    model = loaded(made(name), tmp_path)
    assert np.abs(outputs(model, name) - outputs(made(name), name)).max() > 1e-3, "the adapters change something"
    # The outputs are those of a model with the weights as they are merged here.
    merged, theirs = lora.merge(params, adapters), made(name)
    matches = key_map.match({path: leaf.shape for path, leaf in params.items()})
    state = {names[path]: torch.tensor(match.to_torch(np.asarray(merged[path]))) for path, match in matches.items()}
    theirs.load_state_dict(state, strict=False)
    # Two ways of torch to the same sums in fp32, whose rounding depends on the machine: 1.3e-5 was seen.
    np.testing.assert_allclose(outputs(model, name), outputs(theirs, name), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3moe"])
def test_what_peft_writes_is_read_here(name, tmp_path):
    """Saved by PEFT, read, written and read by PEFT again: the same outputs; and the same merged weights."""
    model = made(name)
    params, names = params_of(model)
    matches = key_map_of(name).match({path: leaf.shape for path, leaf in params.items()})
    targets = [names[path].removesuffix(".weight") for path in adapted(matches)]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_rslora=True,
        rank_pattern={targets[0]: 2}, fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    adapters, others = lora.load_peft(tmp_path / "theirs", params, key_map_of(name))
    assert len(adapters) == len(targets)
    assert not others
    lora.save_peft(tmp_path / "ours", adapters, key_map_of(name))
    np.testing.assert_allclose(outputs(loaded(made(name), tmp_path / "ours"), name), outputs(model, name), atol=1e-5)
    merged, state = lora.merge(params, adapters), model.merge_and_unload().state_dict()
    for path, match in matches.items():
        found = match.to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[names[path]].numpy(), atol=1e-5, rtol=1e-5, err_msg=path)


# The other kinds ------------------------------------------------------------------------------------------------------

OPTIONS = {  # how PEFT is asked for each, of rank 3
    "dora": lambda **more: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **more),
    "lora_bias": lambda **more: peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, **more),
    "tokens": lambda **more: peft.LoraConfig(r=3, lora_alpha=5, trainable_token_indices=[1, 7], **more),
    "adalora": lambda **more: peft.AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, **more),
    "loha": lambda **more: peft.LoHaConfig(r=3, alpha=5, **more),
    "lokr": lambda **more: peft.LoKrConfig(r=1, alpha=5, **more),
    "lokr_whole": lambda **more: peft.LoKrConfig(r=9, alpha=5, decompose_factor=2, **more),
    "vera": lambda **more: peft.VeraConfig(r=3, projection_prng_key=7, **more),
}
RULES = {
    "dora": lora.Dora(3, 5),
    "lora_bias": lora.Lora(3, 5),
    "tokens": lora.Lora(3, 5),
    "full": lora.Lora(3, 5),
    "adalora": lora.AdaLora(3, 5),
    "loha": lora.Loha(3, 5),
    "lokr": lora.Lokr(1, 5),
    "lokr_whole": lora.Lokr(9, 5, factor=2),
    "vera": lora.Vera(3, seed=7),
}
OF_KINDS = [
    *((kind, "llama") for kind in OPTIONS if kind != "lora_bias"),
    *((kind, "gpt2") for kind in ("dora", "lora_bias", "adalora", "vera")),
    *((kind, "bert") for kind in ("dora", "lora_bias", "lokr")),
]


def moved(module):
    """With all that is trained moved at random, so that it changes something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.requires_grad:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return module.eval()


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # PEFT's own, of each lora_B.bias it saves
@pytest.mark.parametrize(("kind", "name"), OF_KINDS)
def test_kinds_that_peft_writes_are_read_here(kind, name, tmp_path):
    """The same merged weights; and written again, the same tensors and outputs."""
    params, names = params_of(made(name))
    key_map = key_map_of(name)
    matches = key_map.match({path: leaf.shape for path, leaf in params.items()})
    targets = [names[path].removesuffix(".weight") for path in adapted(matches)]
    more = {} if name != "gpt2" else {"fan_in_fan_out": True}
    model = moved(peft.get_peft_model(made(name), OPTIONS[kind](target_modules=targets, **more)))
    model.save_pretrained(tmp_path / "theirs")
    adapters, others = lora.load_peft(tmp_path / "theirs", params, key_map)
    assert not others
    lora.save_peft(tmp_path / "ours", adapters, key_map)
    theirs, ours = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        np.testing.assert_allclose(ours[key], tensor, rtol=1e-6, atol=1e-6, err_msg=key)
    expected = outputs(model, name)
    np.testing.assert_allclose(outputs(loaded(made(name), tmp_path / "ours"), name), expected, atol=1e-5)
    merged, state = lora.merge(params, adapters), model.merge_and_unload().state_dict()
    for path, match in matches.items():
        found = match.to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[names[path]].numpy(), atol=1e-5, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize(("kind", "name"), [*OF_KINDS, ("full", "bert"), ("full", "gpt2")])
def test_peft_reads_the_kinds_that_are_written_here(kind, name, tmp_path):
    """Without a warning, and with the outputs of a model that has the weights as they are merged here."""
    params, names = params_of(made(name))
    key_map = key_map_of(name)
    matches = key_map.match({path: leaf.shape for path, leaf in params.items()})
    fans = [matches[path].axes.fans(matches[path].shape)[1:] for path in adapted(matches)]
    rules = dict.fromkeys(adapted(matches), RULES[kind].among(fans))
    if kind == "lora_bias":
        rules |= {path.replace("kernel", "bias"): lora.Full() for path in rules}
    if kind == "tokens":
        rules |= {path: lora.Rows((7, 2)) for path in params if path.endswith("embed_tokens/embedding")}
    if kind == "full":  # a norm with its bias, and one of the biases
        norm = next(path for path in params if path.endswith("/scale"))
        rules |= {norm: lora.Full(), next(iter(rules)).replace("kernel", "bias"): lora.Full()}
    keys = jax.random.split(jax.random.key(0), len(rules))
    adapters = {}
    for key, (path, rule) in zip(keys, rules.items(), strict=True):
        fresh = rule.init(key, params[path], matches[path].axes)
        adapters[path] = trained(fresh, lambda a, key=key: a + jax.random.normal(key, a.shape) / 3)
    lora.save_peft(tmp_path, adapters, key_map, params=params if kind == "full" else None)
    model = loaded(made(name), tmp_path)
    expected_type = {"lokr_whole": "LOKR"}.get(kind, kind.upper())
    assert model.peft_config["default"].peft_type in (expected_type, "LORA")
    assert (expected_type in peft.PeftType.__members__) == (model.peft_config["default"].peft_type != "LORA")
    assert np.abs(outputs(model, name) - outputs(made(name), name)).max() > 1e-3, "the adapters change something"
    merged, theirs = lora.merge(params, adapters), made(name)
    state = {names[path]: torch.tensor(match.to_torch(np.asarray(merged[path]))) for path, match in matches.items()}
    theirs.load_state_dict(state, strict=False)
    # As above: rounding of two ways to the same sums in torch.
    np.testing.assert_allclose(outputs(model, name), outputs(theirs, name), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base(start, tmp_path):
    """Trained a little in PEFT: the base that is made here is the one that PEFT has, and PEFT's is made again."""
    params, names = params_of(made("llama"))
    matches = key_maps.LLAMA.match({path: leaf.shape for path, leaf in params.items()})
    targets = [names[path].removesuffix(".weight") for path in adapted(matches)]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=start)
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path / "theirs")
    adapters, others = lora.load_peft(tmp_path / "theirs", params, key_maps.LLAMA)
    lora.save_peft(tmp_path / "ours", adapters, key_maps.LLAMA, config={"init_lora_weights": start})
    again = loaded(made("llama"), tmp_path / "ours")
    np.testing.assert_allclose(outputs(again, "llama"), outputs(model, "llama"), atol=1e-5)
    merged, state = lora.merge(params | others, adapters), model.merge_and_unload().state_dict()
    for path in adapters:
        found = matches[path].to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[names[path]].numpy(), atol=1e-5, rtol=1e-5, err_msg=path)


def test_layers_several_times_in_peft(tmp_path):
    """The layers 0, 1, 1 of a model that has two: PEFT's numbers are those of the three."""
    base, _ = params_of(made("llama"))
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path / "theirs")
    params = base | {path.replace("/1/", "/2/"): leaf for path, leaf in base.items() if "/layers/1/" in path}
    adapters, _ = lora.load_peft(tmp_path / "theirs", params, key_maps.LLAMA)
    assert len(adapters) == 3
    lora.save_peft(tmp_path / "ours", adapters, key_maps.LLAMA, config={"layer_replication": [[0, 2], [1, 2]]})
    again = loaded(made("llama"), tmp_path / "ours")
    np.testing.assert_allclose(outputs(again, "llama"), outputs(model, "llama"), atol=1e-6)


def test_pruned_adalora_in_peft(tmp_path):
    """Ranks and scales that differ: one rank to begin with and masks, one scale.

    PEFT takes its own masks for patterns of names, and warns that these match none.
    """
    params, names = params_of(made("llama"))
    matches = key_maps.LLAMA.match({path: leaf.shape for path, leaf in params.items()})
    adapters = {}
    for i, path in enumerate(adapted(matches)):
        fresh = lora.AdaLora(1 + i % 3, 5 - i % 2).init(jax.random.key(i), params[path], matches[path].axes)
        adapters[path] = trained(fresh, lambda a, i=i: a + jax.random.normal(jax.random.key(i), a.shape))
    lora.save_peft(tmp_path, adapters, key_maps.LLAMA)
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module"):
        model = peft.PeftModel.from_pretrained(made("llama"), tmp_path).eval()
    assert model.peft_config["default"].peft_type == "ADALORA"
    merged, state = lora.merge(params, adapters), model.merge_and_unload().state_dict()
    for path in adapters:
        found = matches[path].to_torch(np.asarray(merged[path]))
        np.testing.assert_allclose(found, state[names[path]].numpy(), atol=2e-5, rtol=1e-5, err_msg=path)


def test_dora_of_tables_and_convolutions_in_peft(tmp_path):
    torch.manual_seed(0)
    layers = {"emb": torch.nn.Embedding(11, 6), "conv": torch.nn.Conv1d(5, 4, 3), "conv2": torch.nn.Conv2d(1, 3, 2)}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for layer, module in layers.items():
                setattr(self, layer, module)

        def forward(self, ids):
            return self.conv2(self.conv(self.emb(ids))[:, None])

    params = {name: jnp.asarray(module.weight.detach().numpy()) for name, module in layers.items()}
    params |= {"conv": params["conv"].transpose(2, 1, 0), "conv2": params["conv2"].transpose(2, 3, 1, 0)}
    key_map = key_maps.KeyMap(
        key_maps.embedding("emb", "emb"), *(key_maps.conv(name, name) for name in ("conv", "conv2"))
    )
    adapters = {}
    for i, (path, match) in enumerate(key_map.match({path: w.shape for path, w in params.items()}).items()):
        fresh = lora.Dora(2, 3).init(jax.random.key(i), params[path], match.axes)
        adapters[path] = trained(fresh, lambda a, i=i: a + jax.random.normal(jax.random.key(i), a.shape) / 3)
    lora.save_peft(tmp_path, adapters, key_map)
    ids = torch.arange(10).reshape(2, 5)
    found = loaded(Model(), tmp_path)(ids).detach().numpy()
    merged = lora.merge(params, adapters)
    with torch.no_grad():
        for path, match in key_map.match({path: w.shape for path, w in params.items()}).items():
            layers[path].weight.copy_(torch.tensor(match.to_torch(np.asarray(merged[path]))))
        np.testing.assert_allclose(found, Model()(ids).numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_goes_the_same_way(name, tmp_path):
    """Five steps of SGD from the same adapters on the same batches, in torch with PEFT and here."""
    model = made(name)
    params, _ = params_of(model)
    options = {"target_modules": ["q_proj", "v_proj"]}
    if name == "gpt2":
        options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = peft.LoraConfig(r=2, lora_alpha=4, **options)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "start")
    rng, expected = np.random.default_rng(0), []
    batches = rng.integers(0, 11, (5, 4, 6))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.eval()  # no dropout
    for ids in batches:
        logits = model(input_ids=torch.tensor(ids)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    model.save_pretrained(tmp_path / "end")

    fn = {"llama": twins.llama, "gpt2": twins.gpt2}[name]
    adapters, _ = lora.load_peft(tmp_path / "start", params, key_map_of(name))
    apply, losses = lora.lora_apply(fn), []

    @jax.jit
    def step(adapters, ids):
        def loss(adapters):
            scores = jax.nn.log_softmax(apply(params, adapters, ids)[:, :-1])
            return -jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1).mean()

        value, gradient = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda a, g: a - 0.5 * g, adapters, gradient)

    for ids in batches:
        value, adapters = step(adapters, jnp.asarray(ids))
        losses.append(float(value))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    end, _ = lora.load_peft(tmp_path / "end", params, key_map_of(name))
    for one, other in zip(*map(jax.tree.leaves, (adapters, end)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.skipif(
    assets.cached(assets.MINILM) is None or assets.cached(assets.VADER) is None, reason="`make assets` brings them"
)
def test_the_demo_says_the_same_in_torch(tmp_path):
    """An adapter of MiniLM trained by the demo, on a part of its sentences: the same label for each test sentence."""
    task = demo.load_task()
    test = task.splits["test"]
    few = {name: snippets.Split(split.tokens[:320], split.labels[:320]) for name, split in task.splits.items()}
    config = demo.Config(output=tmp_path, epochs=1)
    _, run = demo.fine_tune(dataclasses.replace(task, splits=few), config)
    adapters, head = run.trainable["adapters"], run.trainable["head"]

    tensors = load_file(next(path for path in assets.cached(assets.MINILM) if path.suffix == ".safetensors"))
    torch_model = hf.BertModel(hf.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6))
    missing, unexpected = torch_model.load_state_dict(
        {name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=False
    )
    assert not missing
    assert not [name for name in unexpected if "position_ids" not in name]
    model = loaded(torch_model, tmp_path / "peft")
    logits, _ = demo.make_lora(task, config, seed=0)
    ours = jax.jit(lambda ids, mask: logits({"adapters": adapters, "head": head}, task.params, ids, mask))

    def theirs(ids, mask):
        with torch.no_grad():
            states = model(torch.tensor(np.asarray(ids)), torch.tensor(np.asarray(mask)))[0].numpy()
        kept = np.asarray(mask)[:, :, None]
        return demo.classify(head, (states * kept).sum(1) / kept.sum(1))

    found, expected = (snippets.in_batches(fn, test.tokens) for fn in (theirs, ours))
    assert len(found) > 1900
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vit", "qwen3moe")])
def test_merged_files_load_in_transformers(name, tmp_path):
    """Merged into the files that transformers wrote, in shards: the outputs are those of PEFT's model."""
    made(name).save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    params, _ = params_of(made(name))
    key_map = key_map_of(name)
    adapters = random_adapters(key_map.match({path: leaf.shape for path, leaf in params.items()}))
    lora.save_peft(tmp_path / "peft", adapters, key_map)
    lora.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "merged", key_map)
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "again")
    expected = outputs(loaded(made(name), tmp_path / "peft"), name)
    for folder in ("merged", "again"):
        model = type(made(name)).from_pretrained(tmp_path / folder).eval()
        np.testing.assert_allclose(outputs(model, name), expected, atol=1e-5, rtol=1e-5)
