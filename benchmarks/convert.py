"""Converting a large adapter: time against copying its file, and memory.

A random LoRA of rank 75 on four linear weights of each layer of Llama-3-8B's sizes, 459 MiB in fp32. All ways run in
turn in one process, copying among them; each ends when its bytes are on the disk. Memory is the largest resident one
beyond that before a way begins.

    python benchmarks/convert.py
    python benchmarks/convert.py --layers 4 --rounds 1     # small, to see that it runs
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from lora_jax.core.text import format_table, size
from lora_jax.interop.conversions import FORMATS, About, fitted

WEIGHTS = {  # torch's [out, in]
    "self_attn.q_proj": (4096, 4096),
    "self_attn.v_proj": (1024, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
MODEL = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Config:
    """Convert an adapter of HF PEFT into each of these."""

    to: tuple[str, ...] = ("peft", "vllm", "gguf", "mlx")
    layers: int = 32
    rank: int = 75
    rounds: int = 7


def make(c: Config, folder: Path) -> None:
    """Write the adapter, and the config of its model."""
    from safetensors.numpy import save_file

    rng, factors = np.random.default_rng(0), {}
    for layer in range(c.layers):
        for name, (rows, columns) in WEIGHTS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{module}.lora_A.weight"] = rng.standard_normal((c.rank, columns), np.float32)
            factors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, c.rank), np.float32)
    (folder / "in").mkdir()
    save_file(factors, folder / "in" / "adapter_model.safetensors")
    targets = [name.split(".")[-1] for name in WEIGHTS]
    config = {"peft_type": "LORA", "r": c.rank, "lora_alpha": 2 * c.rank, "target_modules": targets}
    (folder / "in" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": c.layers}))


def copy(source: Path, target: Path) -> None:
    """Copy a folder, to the disk."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def convert(to: str, source: Path, target: Path, model: Path) -> None:
    """Do what `lora-jax convert` does."""
    about = About(model)
    read, write = FORMATS["peft"].read, FORMATS[to].write
    assert read is not None
    assert write is not None
    found = read(source, about)
    assert found is not None
    write(target, fitted(found, to), about)


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def measure(way: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds that a way takes, and its bytes of memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, began = _memory("VmRSS"), time.perf_counter()
    way()
    return time.perf_counter() - began, _memory("VmHWM") - before


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    names = ["copy", *c.to]
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(c, folder)
        os.sync()
        target = folder / "out"
        total = (folder / "in" / "adapter_model.safetensors").stat().st_size
        for turn in range(c.rounds + 1):
            for name in names:
                if name == "copy":
                    one = measure(lambda: copy(folder / "in", target))
                else:
                    one = measure(lambda name=name: convert(name, folder / "in", target, folder / "model"))  # type: ignore[misc]
                if turn:  # the first pass makes what is made once a process
                    found[name].append(one)
                shutil.rmtree(target) if target.is_dir() else target.unlink()
    rows = []
    for name in names:
        ratios = [seconds / alone for (seconds, _), (alone, _) in zip(found[name], found["copy"], strict=True)]
        seconds = [seconds for seconds, _ in found[name]]
        memory = max(nbytes for _, nbytes in found[name])
        times = [np.median(ratios), np.median(seconds), min(seconds)]
        rows.append([name, *(f"{time:.2f}" for time in times), size(memory)])
    largest = 4 * c.rank * max(max(shape) for shape in WEIGHTS.values())
    print(format_table(["to", "of copying", "median, s", "least, s", "memory"], rows, right=4))
    print(f"\n{size(total)}, largest tensor {size(largest)}; bounds: 2.00, {size(3 * largest + 300 * 2**20)}.")


if __name__ == "__main__":
    main()
