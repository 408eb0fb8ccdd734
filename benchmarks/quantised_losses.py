"""What a frozen base in 4 or 8 bits costs in loss: SmolLM2-135M learns to write headlines, over each base alike.

The runs of examples/finetune_decoder.py, the same stories in the same order for the bases and another order for each
seed. A run takes five minutes or so on two cores; those that a file already has are not run again.

    python benchmarks/quantised_losses.py        # the table for docs/quantised.md, from docs/quantised_losses.json
"""

import dataclasses
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import finetune_decoder as headlines  # noqa: E402

Tree = Any
MIXED = "NF4, int8 attention"
LAST = 10  # steps of training whose mean is compared
BASES: dict[str, Literal[4, 8, 16]] = {"bf16": 16, "int8": 8, "NF4": 4, MIXED: 16}


@dataclass(frozen=True)
class Config:
    """Fine-tune over each base with several seeds."""

    output: Path = ROOT / "docs" / "quantised_losses.json"
    bases: tuple[str, ...] = ("bf16", "int8", "NF4")  # and "NF4, int8 attention"
    seeds: int = 3
    example: headlines.Config = field(default_factory=headlines.Config)


def load_task(name: str, config: headlines.Config) -> headlines.Task:
    """The task with its base."""
    task = headlines.load_task(dataclasses.replace(config, bits=BASES[name]))
    if name != MIXED:
        return task
    dense = jax.tree.map(lambda w: w.astype(jnp.float32), task.params)
    one, several = (lora.bases.Int8(stack=1, inputs=n) for n in (1, 2))  # the layers are stacked
    rules = {".*/o_proj/kernel": several, ".*/self_attn/.*/kernel": one, headlines.LINEAR: lora.bases.Nf4(stack=1)}
    return dataclasses.replace(task, params=headlines.keep_in_bits(lora.bases.quantize(dense, rules), 16))


def run(name: str, config: headlines.Config, before: float | None) -> dict[str, Any]:
    """Mean loss over held-out headlines before and after, and of each batch while it is trained.

    `before` is the same for all seeds, and may be known.
    """
    task = load_task(name, config)
    examples = headlines.make_examples(task.train, task.tokenizer)
    adapters = headlines.make_adapters(task, config, next(headlines.training_batches(examples, config)))
    loss = headlines.make_loss(task)
    evaluate = jax.jit(loss)
    if before is None:
        before = math.log(headlines.perplexity(evaluate, adapters, task, config))
    step, state = headlines.make_step(loss, adapters, config)
    losses = []
    for batch in itertools.islice(headlines.training_batches(examples, config), config.steps):
        state, metrics = step(state, task.params, *batch)
        losses.append(round(float(metrics["loss"]), 5))
    after = math.log(headlines.perplexity(evaluate, state.trainable, task, config))
    return {"before": before, "after": after, "losses": losses}


def table(found: dict[str, dict[str, Any]], seeds: int) -> str:
    """Of all seeds that every base has."""
    bases = [name for name in BASES if all(f"{name}, seed {seed}" in found for seed in range(seeds))]
    if "bf16" not in bases:
        return "The runs over the bf16 base are missing."

    def of(name: str, what: str) -> np.ndarray:
        return np.array([found[f"{name}, seed {seed}"][what] for seed in range(seeds)])

    rows = []
    for name in bases:
        before, after = of(name, "before"), of(name, "after")
        late = of(name, "losses")[:, -LAST:].mean(1)
        ratios = [
            np.mean(x / y) for x, y in ((after, of("bf16", "after")), (late, of("bf16", "losses")[:, -LAST:].mean(1)))
        ]
        perplexities = np.exp(after)
        rows.append(
            [
                name,
                f"{np.exp(before.mean()):.1f}",
                f"{perplexities.mean():.2f} ({perplexities.min():.2f} to {perplexities.max():.2f})",
                f"{after.mean():.4f}",
                *(f"{ratio - 1:+.2%}" for ratio in ratios),
            ]
        )
    header = ["base", "perplexity before", "after", "loss after", "of bf16's", f"last {LAST} steps, of bf16's"]
    return format_table(header, rows, right=1)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    found = json.loads(config.output.read_text()) if config.output.exists() else {}
    for seed, name in itertools.product(range(config.seeds), config.bases):
        key = f"{name}, seed {seed}"
        if key not in found:
            before = found.get(f"{name}, seed 0", {}).get("before")
            found[key] = run(name, dataclasses.replace(config.example, seed=seed), before)
            new = config.output.with_suffix(".new")
            new.write_text(json.dumps(found, indent=1))
            new.replace(config.output)
            print(f"{key}: {found[key]['before']:.4f} -> {found[key]['after']:.4f}", flush=True)
    print(table(found, config.seeds))


if __name__ == "__main__":
    main()
