"""One training step, its gradient, and optimizers for adapters.

Start with `step`: the pure step, and the same under `jax.jit`, `jax.pmap` and `jax.shard_map`. `state` is what a step
changes. `value_and_grad` is the gradient, over microbatches and devices, and `model_state` what a model carries through
it. `masks` says which arrays an optimizer trains and decays; `lora_plus` and `preconditioners` are optax
transformations for the factors, and `adalora_schedule` is AdaLoRA's budget. `argument_checks` refuses what is none of
their arguments.

May import core, adapters, transform and sharding.
"""
