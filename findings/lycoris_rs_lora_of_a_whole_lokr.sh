#!/usr/bin/env bash
# A LoKr trained by LyCORIS with rs_lora and whole factors loses sqrt(rank) of its effect when its file is read again.
#
# Versions: lycoris-lora 4.1.3, torch 2.13.0, on the CPU.
#
# Where the rank is at least half of its larger factor, or with full_matrix, a LoKr holds both factors whole. LyCORIS
# then replaces alpha by the rank, so that the scale is one; rs_lora divides by sqrt(rank) all the same, so the layer is
# trained with a scale of sqrt(rank). Its file holds no rank: create_lycoris_from_weights takes rank 1, drops the alpha of
# the file and computes with a scale of 1. LoRA, LoHa and a LoKr of low rank put the change into the alpha that they
# save, and are read as they were trained.
#
# The option reaches the layers from LycorisNetwork and from create_network, what sd-scripts calls. create_lycoris takes
# rs_lora=True and ignores it, as it does any word that it does not know.
#
# Seen, rank 4: the change of the outputs after reading over the change before saving, and the scale in training:
#     lora                           1.00  0.50
#     loha                           1.00  0.50
#     lokr                           1.00  0.50
#     lokr, whole                    0.50  2.00
#     lokr, whole, without rs_lora   1.00  1.00
#     lora, by create_lycoris        1.00  0.25
#
# Multiplying one factor by sqrt(rank) before saving avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lycoris-lora==4.1.3 torch==2.13.0

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from lycoris.logging import logger

logger.setLevel(logging.ERROR)
RANK = 4
BOTH = {"lora_dim": RANK, "alpha": 1, "rs_lora": True}


@torch.no_grad()
def read_over_written(create):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    x = torch.randn(8, 256)
    base = layer(x)
    net = create(layer)
    net.apply_to()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    written, scale = layer(x) - base, net.loras[0].scale
    net.save_weights("adapter.safetensors", None, {})
    net.restore()
    again, _ = create_lycoris_from_weights(1.0, "adapter.safetensors", layer)
    again.apply_to()
    read = layer(x) - base
    ratio = (read * written).sum() / written.square().sum()
    assert torch.allclose(read, ratio * written, atol=1e-4), "the two differ by a factor alone"
    return round(ratio.item(), 4), scale


def network(algo, **options):
    return lambda layer: LycorisNetwork(layer, network_module=algo, **{**BOTH, **options})


found = {
    "lora": read_over_written(network("lora")),
    "loha": read_over_written(network("loha")),
    "lokr": read_over_written(network("lokr")),
    "lokr, whole": read_over_written(network("lokr", full_matrix=True)),
    "lokr, whole, without rs_lora": read_over_written(network("lokr", full_matrix=True, rs_lora=False)),
    "lora, by create_lycoris": read_over_written(lambda layer: create_lycoris(layer, linear_dim=RANK, rs_lora=True)),
}
for name, (ratio, scale) in found.items():
    print(f"{name:30s} {ratio:.2f}  {scale:.2f}")
expected = [(1, 0.5)] * 3 + [(0.5, 2), (1, 1), (1, 0.25)]
assert list(found.values()) == expected, "the behaviour has changed"
print("A whole LoKr with rs_lora is still read with another scale.")
PYTHON
