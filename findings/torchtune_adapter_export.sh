#!/usr/bin/env bash
# torchtune exports a LoRA adapter of Qwen2 to PEFT as another one, and a DoRA adapter of Llama too.
#
# Versions: torchtune 0.6.1 (its wheel without dependencies), torch 2.13.0, on the CPU.
#
# torchtune keeps the rows of Llama's query and key weights interleaved, and those of Qwen2 and Qwen2.5 as HF has them:
# qwen2_tune_to_hf moves none, as it has to be. The export of adapters (tune_to_peft_adapter_weights, which its
# checkpointer calls for all models but Phi and Llama 3.2 Vision) moves the rows of B for Qwen2 all the same, as Llama needs
# it. For Llama it moves B's rows and leaves those of DoRA's magnitudes. One checkpoint so holds a merged model and an
# adapter that disagree.
#
# Seen, for one query weight of 4 heads (relative error of the adapter's change against the merged model's):
#     Llama, LoRA   0.00
#     Llama, DoRA   0.48
#     Qwen2, LoRA   1.15
#
# The rows can be put back in the file: for Qwen2 those of B, for Llama's DoRA those of the magnitudes have to move.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet --no-deps torchtune==0.6.1

"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import importlib
import sys
import sysconfig
import types
from pathlib import Path

import torch

# The package imports torchao, datasets and more when it is imported; the conversions need torch alone.
for name in ("torchtune", "torchtune.models", "torchtune.models.qwen2"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(sysconfig.get_paths()["purelib"], *name.split(".")))]
llama = importlib.import_module("torchtune.models.convert_weights")
qwen2 = importlib.import_module("torchtune.models.qwen2._convert_weights")

DIM, HEADS, RANK = 32, 4, 2
SIZES = {"num_heads": HEADS, "num_kv_heads": HEADS, "dim": DIM}
TUNE, HF = "layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"
torch.manual_seed(0)
w, a, b = torch.randn(DIM, DIM), torch.randn(RANK, DIM), torch.randn(DIM, RANK)  # as in torchtune
m = (w + b @ a).norm(dim=1) * (1 + 0.1 * torch.randn(DIM))  # lengths that have been trained a little


def adapted(w, a, b, m):
    merged = w + b @ a
    return merged if m is None else m[:, None] * merged / merged.norm(dim=1, keepdim=True)


def error(tune_to_hf, m=None):
    whole = lambda weight: tune_to_hf({f"{TUNE}.weight": weight}, **SIZES)[f"{HF}.weight"]
    adapter = {f"{TUNE}.lora_a.weight": a, f"{TUNE}.lora_b.weight": b} | ({} if m is None else {f"{TUNE}.magnitude": m})
    found = llama.tune_to_peft_adapter_weights(adapter, **SIZES)
    get = lambda leaf: found.get(f"base_model.model.{HF}.{leaf}")
    merged = adapted(whole(w), get("lora_A.weight"), get("lora_B.weight"), get("lora_magnitude_vector"))
    return float((merged - whole(adapted(w, a, b, m))).norm() / (whole(adapted(w, a, b, m)) - whole(w)).norm())


found = {
    "Llama, LoRA": error(llama.tune_to_hf),
    "Llama, DoRA": error(llama.tune_to_hf, m),
    "Qwen2, LoRA": error(qwen2.qwen2_tune_to_hf),
}
for name, value in found.items():
    print(f"{name}   {value:.2f}")
right, *wrong = found.values()
assert right < 1e-6 and min(wrong) > 0.1, "the behaviour has changed"
print("The exported adapters are still other ones.")
PYTHON
