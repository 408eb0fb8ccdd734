#!/usr/bin/env bash
# llama.cpp converts a PEFT adapter with rsLoRA, or with alphas of its own for some layers, to one with another scale.
#
# Versions: convert_lora_to_gguf.py of the llama.cpp in llama-cpp-python 0.3.36, peft 0.21.2, transformers 5.24.0, torch
# 2.13.0, on the CPU.
#
# A GGUF adapter has one alpha, and its reader scales each pair of factors by alpha / rank. The converter writes lora_alpha
# of adapter_config.json and the factors as they are. It reads neither use_rslora nor alpha_pattern, and says nothing.
# Ranks of their own (rank_pattern) come out right, since the reader takes the rank of each pair.
#
# Seen, for rank 4 and alpha 8: the scale in PEFT and that in GGUF, of q_proj and o_proj
#     plain                    2 2   2 2
#     use_rslora               4 4   2 2
#     alpha_pattern q_proj=32  8 2   2 2
#     rank_pattern o_proj=2    2 4   2 4
#
# Folding each layer's scale into B, with lora_alpha = r in the config, before converting avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 safetensors numpy pyyaml requests tqdm
# The source alone, which holds a release of llama.cpp: nothing of it is compiled.
"$folder/venv/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$folder" llama-cpp-python==0.3.36
tar xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder"

cd "$folder"
"$folder/venv/bin/python" -W ignore - llama_cpp_python-0.3.36/vendor/llama.cpp <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

source = Path(sys.argv[1])
sys.path.insert(0, str(source / "gguf-py"))
import gguf  # noqa: E402

reader = (source / "src" / "llama-adapter.h").read_text()
assert "adapter_scale * alpha / rank" in reader, "the reader's rule has changed"
TINY = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMES = {"q_proj": "blk.0.attn_q.weight", "o_proj": "blk.0.attn_output.weight"}


def scales(name, **options):
    base = Qwen2ForCausalLM(Qwen2Config(**TINY, num_key_value_heads=2, architectures=["Qwen2ForCausalLM"]))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES), init_lora_weights=False, **options)
    model = get_peft_model(base, config)
    base.config.save_pretrained(f"{name}/base")
    model.save_pretrained(f"{name}/adapter")
    command = [sys.executable, source / "convert_lora_to_gguf.py", "--base", f"{name}/base"]
    command += ["--outfile", f"{name}/adapter.gguf", f"{name}/adapter"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr.upper(), done.stderr

    read = gguf.GGUFReader(f"{name}/adapter.gguf")
    alpha, tensors = read.get_field("adapter.lora.alpha").contents(), {t.name: t.data for t in read.tensors}
    in_peft, in_gguf = [], []
    for module, tensor in NAMES.items():
        layer = getattr(base.model.layers[0].self_attn, module)
        a, b = tensors[f"{tensor}.lora_a"], tensors[f"{tensor}.lora_b"]
        assert (torch.tensor(a) == layer.lora_A["default"].weight).all(), "the factors are as they were"
        assert (torch.tensor(b) == layer.lora_B["default"].weight).all(), "the factors are as they were"
        in_peft.append(layer.scaling["default"])
        in_gguf.append(alpha / len(a))
    return in_peft, in_gguf


found = {
    "plain": scales("plain"),
    "use_rslora": scales("rslora", use_rslora=True),
    "alpha_pattern q_proj=32": scales("alphas", alpha_pattern={"q_proj": 32}),
    "rank_pattern o_proj=2": scales("ranks", rank_pattern={"o_proj": 2}),
}
for name, (in_peft, in_gguf) in found.items():
    print(f"{name:24s} {in_peft[0]:g} {in_peft[1]:g}   {in_gguf[0]:g} {in_gguf[1]:g}")
expected = [([2, 2], [2, 2]), ([4, 4], [2, 2]), ([8, 2], [2, 2]), ([2, 4], [2, 4])]
assert list(found.values()) == expected, "the behaviour has changed"
print("rsLoRA and patterns of alpha still lose their scale.")
PYTHON
