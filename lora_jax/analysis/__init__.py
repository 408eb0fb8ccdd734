"""What adapters do to weights, in numbers: `lora.inspect` and `lora.diff`.

- `inspection`: of adapters, the norm and the rank of each weight's change. Start reading here.
- `differences`: the same of two trees of parameters.
- `spectrum`: what both are computed by, and the best low-rank approximation of a change.

May import `core`, `adapters` and the decompositions of `initialization`.
"""
