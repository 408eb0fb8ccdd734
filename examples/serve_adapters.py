"""A server in one process: requests name their adapters, a batch mixes them, and a bank keeps the latest on the device.

Requests are like those of vLLM: a prompt, the name of an adapter or none, and how many tokens are wanted. A batch takes
the next requests in line, whatever they name. Adapters lie in folders of HF PEFT; the bank reads one when it is asked
for and puts it in the place of the one that was used least recently. Two programs are compiled, for the prompts and for
a token, and serve every mix. One adapter goes on training meanwhile: its versions stand beside one another.

    python examples/serve_adapters.py --adapters 100 --slots 16 --requests 400

Axes: B requests of a batch, T tokens, V vocabulary.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.recipes import decoder
from lora_jax.recipes.config import parse_config
from lora_jax.recipes.generate import generate

KEY_MAP = key_maps.LLAMA.stacked()
RULES = {r"model/layers/(self_attn/[qkv]_proj|mlp/.*)/kernel": lora.Lora(rank=4, alpha=8)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Serve requests for many adapters of one tiny decoder."""

    adapters: int = 24
    slots: int = 8
    requests: int = 96
    batch: int = 8
    prompt: int = 8  # tokens of the longest one
    tokens: int = 4  # to write
    checks: int = 8  # answers that are compared with those of a model that has the one adapter alone


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: list[int]
    adapter: str | tuple[str, int] | None
    tokens: int


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL = parse_config({"model_type": "llama", "vocab_size": 64, **SIZES})
# Of the arguments (ids, positions, mask, cache) of `forward`, and of its results (logits, cache).
CACHE_AXES = decoder.Cache(keys=1, values=1, places=0, filled=None)  # type: ignore[arg-type]
IN_AXES, OUT_AXES = (0, 0, 0, CACHE_AXES), (0, CACHE_AXES)


def forward(params: Any, ids: jax.Array, positions: jax.Array, mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Tokens [B, T] -> logits of what follows the last one [B, V], and the cache with these tokens"""
    hidden, cache = decoder.hidden_states(MODEL, params, ids, positions, mask, cache, remat=False)
    return decoder.logits_of(MODEL, params, hidden[:, -1:])[:, 0], cache


apply = lora.lora_apply(forward)


@functools.partial(jax.jit, static_argnames="room")
def read_prompts(params: Any, chosen: Any, ids: jax.Array, mask: jax.Array, room: int) -> tuple[jax.Array, Any, Any]:
    """Prompts [B, T], padded on the left -> the first tokens [B], their positions, and the cache"""
    cache = decoder.Cache.empty(MODEL, len(ids), ids.shape[1] + room, jnp.float32)
    positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    logits, cache = apply(params, chosen, ids, positions, mask.astype(jnp.int32), cache)
    return logits.argmax(-1).astype(jnp.int32), positions[:, -1] + 1, cache


@jax.jit
def write_token(params: Any, chosen: Any, token: jax.Array, position: jax.Array, cache: Any) -> Any:
    """The next tokens [B], one step further"""
    ones = jnp.ones_like(token)[:, None]
    logits, cache = apply(params, chosen, token[:, None], position[:, None], ones, cache)
    return logits.argmax(-1).astype(jnp.int32), position + 1, cache


def serve(params: Any, bank: lora.AdapterBank, requests: list[Request], settings: Settings) -> Iterator[list[int]]:
    """What each request is answered, in their order, batch by batch."""
    for start in range(0, len(requests), settings.batch):
        batch = requests[start : start + settings.batch]
        filler = [Request([0], None, 1)] * (settings.batch - len(batch))  # so that all batches are of one size
        rows = [*batch, *filler]
        chosen = bank.select([row.adapter for row in rows], in_axes=IN_AXES, out_axes=OUT_AXES)
        ids = np.array([[0] * (settings.prompt - len(row.prompt)) + row.prompt for row in rows], np.int32)
        mask = np.arange(settings.prompt) >= np.array([[settings.prompt - len(row.prompt)] for row in rows])
        token, position, cache = read_prompts(params, chosen, ids, mask, room=settings.tokens)
        written = [token]
        for _ in range(max(row.tokens for row in batch) - 1):
            token, position, cache = write_token(params, chosen, token, position, cache)
            written.append(token)
        for row, answer in zip(batch, np.stack(jax.device_get(written), axis=1), strict=False):
            yield answer[: row.tokens].tolist()


def make_params(key: jax.Array) -> Any:
    """A random decoder; adapters that are as large as these differ in what they answer."""
    found: dict[str, Any] = {}
    for i, (path, shape) in enumerate(sorted(decoder.shapes(MODEL).items())):
        *above, name = path.split("/")
        at = found
        for part in above:
            at = at.setdefault(part, {})
        is_norm = name == "scale"
        at[name] = jnp.ones(shape) if is_norm else jax.random.normal(jax.random.fold_in(key, i), shape) / 4
    return found


def trained(like: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Adapters as a training leaves them."""
    draws = np.random.default_rng(seed)
    moved = lora.trainable_mask(like)
    return jax.tree.map(
        lambda leaf, moves: leaf + moves * draws.normal(0, 0.2, leaf.shape).astype(np.float32), dict(like), moved
    )


def main(settings: Settings = Settings()) -> dict[str, int]:
    params = make_params(jax.random.key(0))
    ids = jnp.zeros((1, 2), jnp.int32)
    plan = lora.plan(lambda p, ids: decoder.hidden_states(MODEL, p, ids, remat=False)[0], params, ids, rules=RULES)
    like = lora.init(jax.random.key(1), params, plan)
    with tempfile.TemporaryDirectory() as home:

        def read(folder: Path) -> dict[str, Any]:
            return lora.load_peft(folder, params, KEY_MAP)[0]

        bank = lora.AdapterBank(like, settings.slots)
        for i in range(settings.adapters):
            folder = Path(home) / f"tenant-{i}"
            lora.save_peft(folder, trained(like, i), KEY_MAP)
            bank.register(folder.name, functools.partial(read, folder))
        for step in (100, 200):  # one that is being trained: step 200 is there while some rollouts still ask for 100
            bank.register("policy", trained(like, 1000 + step), version=step)
        draws = np.random.default_rng(0)

        def draw_request() -> Request:
            popular = min(int(draws.geometric(0.1)) - 1, settings.adapters - 1)
            names = [f"tenant-{popular}"] * 7 + [None, "policy", ("policy", 100)]
            prompt = draws.integers(1, MODEL.vocabulary, draws.integers(1, settings.prompt + 1)).tolist()
            return Request(prompt, names[draws.integers(len(names))], int(draws.integers(1, settings.tokens + 1)))

        requests = [draw_request() for _ in range(settings.requests)]
        answers = list(serve(params, bank, requests, settings))
        programs = sum(fn._cache_size() for fn in (read_prompts, write_token))  # type: ignore[attr-defined]

        wrong = 0
        for i in np.linspace(0, len(requests) - 1, settings.checks).astype(int):
            request = requests[i]
            name, version = request.adapter if isinstance(request.adapter, tuple) else (request.adapter, 200)
            alone = (
                {} if name is None else trained(like, 1000 + version) if name == "policy" else read(Path(home) / name)
            )
            expected = generate(MODEL, params, alone, [request.prompt], request.tokens, 0.0, 1.0, None, ())
            wrong += answers[i] != expected[0]
    tensors, _ = lora.peft_tensors(trained(like, 1200), KEY_MAP)
    print(f"{len(answers)} requests for {settings.adapters + 1} adapters in {settings.slots} slots")
    print(f"{bank.loads} loads, {bank.evictions} evictions, {programs} programs compiled")
    print(f"{settings.checks} answers compared with those of one adapter alone, {wrong} differ")
    print(f"the newest policy is {len(tensors)} tensors for another server, such as {min(tensors)}")
    return {"programs": programs, "wrong": int(wrong), "answers": len(answers), "resident": len(bank.resident())}


if __name__ == "__main__":
    main(tyro.cli(Settings))
