"""Save and load adapters alone, without a training run around them.

`lora.Checkpoints` saves and restores a whole run: adapters, optimizer state and the position of the data. The adapters
alone can be loaded out of its folder as well: `lora.checkpoint.load("run")`, or `load("run", step=300)`.

>>> import tempfile, jax, jax.numpy as jnp, lora_jax as lora
>>> params = {"w": jnp.eye(6, 4)}
>>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 6)), rules={"w": lora.Lora(rank=2)})
>>> adapters = lora.init(jax.random.key(0), params, plan)
>>> with tempfile.TemporaryDirectory() as folder:
...     lora.checkpoint.save(f"{folder}/adapters", adapters, {"head": {"bias": jnp.zeros(3)}})
...     adapters, others = lora.checkpoint.load(f"{folder}/adapters")
>>> adapters["w"].a.shape, others["head"]["bias"].shape
((6, 2), (3,))
"""

from lora_jax.checkpoints.adapters import save
from lora_jax.checkpoints.runs import load

__all__ = ["load", "save"]
