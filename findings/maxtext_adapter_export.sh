#!/usr/bin/env bash
# MaxText exports a LoRA adapter of Llama 3.1's queries as another one: neither the order of heads nor their scale is undone.
#
# Versions: maxtext 0.2.5 (its wheel without dependencies), jax 0.12.0.1, NumPy 2.4.6, on the CPU backend.
#
# In MaxText's tree the entries of each query and key head lie interleaved, and queries are divided by sqrt(head_dim). Its
# conversion of a whole model (LLAMA31_MAXTEXT_TO_HF_PARAM_HOOK_FN) undoes both. Its conversion of an adapter to HF PEFT
# (_transform_weights_to_adapter in to_huggingface.py) transposes A and B and does no more, so the change of the exported
# adapter is not the one that was trained. A B with an axis of heads, [r, heads, head_dim], loses all heads but the first.
#
# Seen, for one change of a query weight of 3 heads (relative error of B A against the change in HF's layout):
#     as a whole model   0.00
#     as an adapter      0.96
#     B with heads       [8, 2] in the place of [24, 2]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(for p in python3.13 python3.12 python3; do "$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
    2>/dev/null && echo "$p" && break; done) || { echo "JAX 0.12 needs Python 3.12 or newer."; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps maxtext==0.2.5

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import ast
import importlib.util
import sysconfig
from pathlib import Path

import jax
import numpy as np

package = Path(sysconfig.get_paths()["purelib"]) / "maxtext" / "checkpoint_conversion"
spec = importlib.util.spec_from_file_location("param_mapping", package / "utils" / "param_mapping.py")
mapping = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mapping)

# The module of this function imports all of MaxText and transformers; the function needs jax alone.
source = (package / "to_huggingface.py").read_text()
name = "_transform_weights_to_adapter"
[function] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
space = {"jax": jax}
exec(compile(ast.Module([function], []), "to_huggingface.py", "exec"), space)

D, H, S, R = 12, 3, 8, 2  # hidden, heads, a head, rank
rng = np.random.default_rng(0)
a, b = rng.normal(size=(R, D)).astype("f4"), rng.normal(size=(H * S, R)).astype("f4")  # as in PEFT
config = {"num_hidden_layers": 1, "head_dim": S}
key, hf = "params-decoder-layers_0-self_attention-query-kernel", "model.layers.0.self_attn.q_proj.weight"


def through(hooks, tensor, shape):
    for hook in hooks:
        tensor = hook(tensor, shape)
    return np.asarray(tensor)


def error(change):
    return float(np.linalg.norm(change - b @ a) / np.linalg.norm(b @ a))


to_maxtext, to_hf = (mapping.LLAMA31_MAXTEXT_TO_HF_PARAM_HOOK_FN(config, None, False, saving)[key] for saving in (False, True))
trained = through(to_maxtext, b, (R, H, S))  # B as MaxText has it: the hooks change outputs alone
change = np.einsum("dr,rhs->dhs", a.T, trained)
whole = error(through(to_hf, change, (H * S, D)))


def exported(lora_b):
    state = {f"{key}_lora_a": a.T, f"{key}_lora_b": lora_b}
    found, _ = space[name]({key: hf}, state)
    return np.asarray(found[f"base_model.model.{hf.removesuffix('.weight')}.lora_B.weight"])


flat, heads = exported(trained.reshape(R, H * S)), exported(trained)
print(f"as a whole model   {whole:.2f}")
print(f"as an adapter      {error(flat @ a):.2f}")
print(f"B with heads       {list(heads.shape)} in the place of {[H * S, R]}")
assert whole < 1e-6 < 0.9 < error(flat @ a), "the behaviour has changed"
assert heads.shape == (S, R), "the behaviour has changed"
print("The exported adapter is still another one.")
PYTHON
