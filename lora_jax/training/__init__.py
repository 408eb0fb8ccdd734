"""One training step, its gradient, and optimizers for adapters.

Start with `step`: the pure step, and the same under `jax.jit`, `jax.pmap` and `jax.shard_map`. `value_and_grad` is its
gradient, over microbatches and devices; `model_state` is what a model carries through both. `masks` says which arrays
an optimizer trains and decays; `lora_plus` and `preconditioners` are optax transformations for the factors, and
`adalora_schedule` is AdaLoRA's budget.
`argument_checks` refuses what is none of their arguments.

May import core, adapters, transform and sharding.
"""
