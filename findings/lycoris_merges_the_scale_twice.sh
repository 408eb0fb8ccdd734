#!/usr/bin/env bash
# LyCORIS merges LoHa and LoKr with alpha / rank applied twice, so the merged model is not the one that was trained.
#
# Versions: lycoris-lora 4.1.3, torch 2.13.0, on the CPU.
#
# In LohaModule and LokrModule, get_weight has the scale already, and get_diff_weight multiplies by it again; merge_to,
# onfly_merge and merging with precise=True go through get_diff_weight, forward through get_weight. With alpha equal to the
# rank nothing shows. With the defaults of create_lycoris, rank 4 and alpha 1, a merged adapter has a quarter of its
# effect, and one of alpha / rank = 2 would have twice its effect. LoCon (plain LoRA) applies the scale once.
#
# Seen, the change of the outputs after merge_to over the change before it, with the defaults:
#     lora   1.00
#     loha   0.25
#     lokr   0.25
#     loha   1.00  with alpha = rank
#     lokr   1.00  with alpha = rank
#
# Saved files are right: they hold the factors and alpha. Merging by hand with the scale of forward avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lycoris-lora==4.1.3 torch==2.13.0

"$folder/venv/bin/python" - <<'PYTHON'
import logging

import torch
from lycoris import create_lycoris
from lycoris.logging import logger

logger.setLevel(logging.ERROR)


@torch.no_grad()
def merged_over_unmerged(algo, **options):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    x = torch.randn(8, 256)
    base = layer(x)
    net = create_lycoris(layer, algo=algo, **options)
    net.apply_to()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unmerged = layer(x) - base
    net.restore()
    assert torch.equal(layer(x), base), "restore gives the base back"
    net.merge_to()
    merged = layer(x) - base
    ratio = (merged * unmerged).sum() / unmerged.square().sum()
    assert torch.allclose(merged, ratio * unmerged, atol=1e-4), "the two differ by a factor alone"
    return round(ratio.item(), 4)


found = [(algo, options, merged_over_unmerged(algo, **options)) for algo, options in (
    ("lora", {}), ("loha", {}), ("lokr", {}), ("loha", {"linear_alpha": 4}), ("lokr", {"linear_alpha": 4})
)]  # fmt: skip
for algo, options, ratio in found:
    print(f"{algo}   {ratio:.2f}{'  with alpha = rank' if options else ''}")
assert [ratio for *_, ratio in found] == [1, 0.25, 0.25, 1, 1], "the behaviour has changed"
print("Merging LoHa and LoKr still applies the scale twice.")
PYTHON
