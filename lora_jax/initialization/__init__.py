"""Fresh adapters, and what they start from: a random draw, the weight, its gradient, or data.

- `init`: the adapters of a plan, as their rules draw them. Start reading here.
- `pissa`, `olora`, `loftq`, `corda`, `lora_ga`, `eva`, `orthogonal`: one published start each. The public module
  `lora_jax.starts` compares them.
- `rebase`: put factors into adapters and subtract what they add from the base; shared by the starts.
- `rank_allocation`: distribute a sum of ranks over the weights by importance.
- `svd`, `checks`: the linear algebra and the checks of arguments that these share.

May import every wing but `interop.peft`, `training` and `cli`.
"""
