"""Algebra of adapters, beside their exact sums (`lora_jax.adapters.combine`): smaller ranks, differences, merging.

- `truncation`: the nearest change of a rank, from a matrix or from two factors.
- `compress`: adapters of smaller rank, with nothing of a weight's size.
- `to_lora`: any kind as LoRA, exactly or the nearest; `conversion` is its report.
- `difference`: two checkpoints to adapters.
- `sparsify`: what TIES, DARE and pruning do to entries.
- `knots`: changes in one basis, as factors.
- `ways`: these for the adapters of one weight; `stacked_factors` are what they take.
- `peft_results`: what HF PEFT computes under the same names.
- `compose`: all ways to merge adapters, by name; `arguments` are checked first. Start reading here.
"""
