"""Small models and files under the names that pages of docs/ use, for their set-up in `<!-- run first`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from chat_templates import make_folder
from test_recipes_models import facts_of, tensors_of, write

import lora_jax as lora

WHERE = ("barn", "lake", "wood")


def model(params, x):
    """Two layers: [B, 32] -> [B, 8]."""
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def two_layers(seed=0):
    """Return parameters of `model`, rows and answers of a task, which a small change of the parameters has."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (32, 64)) / 6},
        "down": {"kernel": jax.random.normal(keys[1], (64, 8)) / 8},
    }
    x = jax.random.normal(keys[2], (16, 32))
    return params, x, jnp.sin(x[:, :8])


def some_adapters(params, plan, seed=0):
    """Return adapters that change something: random numbers in all arrays that are trained."""
    fresh = lora.init(jax.random.key(seed), params, plan)
    leaves, treedef = jax.tree.flatten(fresh)
    mask = jax.tree.leaves(lora.trainable_mask(fresh))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [
        leaf + jax.random.normal(key, leaf.shape, leaf.dtype) / 10 if trained else leaf
        for leaf, trained, key in zip(leaves, mask, keys, strict=True)
    ]
    return treedef.unflatten(moved)


def publish(folder, **changes):
    """Write a model of a few thousand parameters, as it would be published, and files of examples beside it."""
    folder = Path(folder)
    facts = facts_of("llama", vocab_size=272, eos_token_id=[264], max_position_embeddings=2048, **changes)
    write(folder, facts, tensors_of(facts))
    make_folder(folder, "chatml")
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": WHERE[n % 3]}]}
        for n in range(40)
    ]
    pairs = [{"prompt": f"{n} ", "chosen": "yes", "rejected": "no"} for n in range(40)]
    for name, lines in (("headlines", chats), ("chats", chats), ("pairs", pairs)):
        (folder.parent / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
