"""Merging adapters into a large published model: time against copying and reading its files, and memory.

A random model of Llama's shape in bf16, in shards, with LoRA of rank 16 on every linear weight of its blocks. Each way
is a process of its own, by turns; what is told is its time without imports, and its largest resident memory beyond
that of the imports.

    python benchmarks/merge_checkpoint.py                # 2 GiB; time and memory
    python benchmarks/merge_checkpoint.py --peft         # and HF PEFT: load, merge_and_unload, save (needs torch)
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lora_jax.core.text import format_table, size

SHARD = 2**29  # bytes


@dataclass(frozen=True)
class Config:
    """Merge into a random model of some size."""

    gib: float = 2.0
    hidden: int = 2048
    rounds: int = 3
    rank: int = 16
    peft: bool = False


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Torch's tensors of a Llama with so many bytes in bf16."""
    d, inner, vocabulary = c.hidden, c.hidden * 11 // 4, 32_000
    layer = {
        **{f"self_attn.{name}_proj": (d, d) for name in "qkvo"},
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    a_layer = 2 * (sum(m * n for m, n in layer.values()) + 2 * d)
    layers = max(1, round((c.gib * 2**30 - 4 * vocabulary * d) / a_layer))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        found |= {f"model.layers.{i}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}


def make(c: Config, folder: Path) -> None:
    """The model, and a folder of PEFT with adapters for it."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    rng, every = np.random.default_rng(0), shapes(c)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in every.items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    model, adapter = folder / "model", folder / "adapter"
    model.mkdir()
    adapter.mkdir()
    weights: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: (rng.standard_normal(s, np.float32) / 50).astype(jnp.bfloat16) for n, s in shard.items()}
        save_file(tensors, model / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(2 * int(np.prod(s)) for s in every.values())}, "weight_map": weights}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = sum(name.endswith("q_proj.weight") for name in every)
    options: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    options |= {"hidden_size": c.hidden, "intermediate_size": c.hidden * 11 // 4, "num_hidden_layers": layers}
    options |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_000}
    (model / "config.json").write_text(json.dumps(options | {"tie_word_embeddings": False}))
    factors = {}
    for name, (rows, columns) in ((n, s) for n, s in every.items() if "_proj" in n):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = rng.standard_normal((c.rank, columns), np.float32) / 50
        factors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, c.rank), np.float32) / 50
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in every if "_proj" in name})
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": c.rank, "lora_alpha": c.rank, "target_modules": targets})
    )


PROGRAMS = {
    "copy and read": """
        start()
        shutil.copytree(folder / "model", folder / "out")
        for path in sorted((folder / "model").iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass
    """,
    "lora_jax": """
        import lora_jax, safetensors.numpy
        start()
        lora_jax.merge_checkpoint(folder / "model", folder / "adapter", folder / "out")
    """,
    "HF PEFT": """
        import peft, torch, transformers
        start()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        model.save_pretrained(folder / "out", max_shard_size=2**29)
    """,
}

FRAME = """
import pathlib, shutil, sys, time
folder = pathlib.Path(sys.argv[1])
def memory(what):
    line = next(line for line in open("/proc/self/status") if line.startswith(what))
    return 1024 * int(line.split()[1])
def start():
    global began, before
    shutil.rmtree(folder / "out", ignore_errors=True)  # here: a virtual machine gives memory back that is free for long
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far, that of imports, is forgotten
    began, before = time.perf_counter(), memory("VmRSS")
{}
print(time.perf_counter() - began, memory("VmHWM") - before)
"""


def run(program: str, folder: Path) -> tuple[float, float]:
    """Seconds, and bytes of memory."""
    body = "\n".join(line[8:] for line in program.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", FRAME.format(body), str(folder)], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, nbytes = map(float, done.stdout.split()[-2:])
    return seconds, nbytes


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    names = [name for name in PROGRAMS if c.peft or name != "HF PEFT"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(c, folder)
        total = sum(path.stat().st_size for path in (folder / "model").iterdir())
        for i in range(c.rounds):
            for name in names[:: 1 if i % 2 else -1]:
                found[name].append(run(PROGRAMS[name], folder))
                time.sleep(1)
    largest = max(2 * int(np.prod(shape)) for shape in shapes(c).values())
    rows = []
    for name in names:
        seconds, nbytes = np.median(found[name], axis=0)
        least = min(seconds for seconds, _ in found[name])
        rows.append([name, f"{seconds:.2f}", f"{least:.2f}", size(int(nbytes))])
    print(format_table(["what", "seconds", "least", "memory"], rows, right=3))
    medians = {name: float(np.median([seconds for seconds, _ in found[name]])) for name in names}
    bound = 3 * largest + 300 * 2**20
    print(
        f"\n{size(total)}, largest tensor {size(largest)}. lora_jax takes "
        f"{medians['lora_jax'] / medians['copy and read']:.2f} of copying and reading (bound 2.00)"
        + (f", {medians['lora_jax'] / medians['HF PEFT']:.2f} of HF PEFT" if c.peft else "")
        + f"; bound on memory {size(bound)}."
    )


if __name__ == "__main__":
    main()
