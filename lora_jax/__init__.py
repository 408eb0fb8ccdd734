"""LoRA for any JAX function: low-rank adapters as a pytree of their own beside frozen parameters."""

from lora_jax import checkpoint as checkpoint
from lora_jax import initializers as initializers
from lora_jax import key_maps as key_maps
from lora_jax import starts as starts
from lora_jax.adapters.base import Adapter as Adapter
from lora_jax.adapters.lora import Lora as Lora
from lora_jax.adapters.lora import LoraAdapter as LoraAdapter
from lora_jax.axes import KernelAxes as KernelAxes
from lora_jax.compose import combine as combine
from lora_jax.dropout import with_dropout as with_dropout
from lora_jax.errors import LoraError as LoraError
from lora_jax.export import merge_checkpoint as merge_checkpoint
from lora_jax.gradients import value_and_grad as value_and_grad
from lora_jax.merge import merge as merge
from lora_jax.models import from_linen as from_linen
from lora_jax.models import from_nnx as from_nnx
from lora_jax.optim import decay_mask as decay_mask
from lora_jax.optim import freeze_base as freeze_base
from lora_jax.optim import labels as labels
from lora_jax.optim import lora_plus as lora_plus
from lora_jax.optim import trainable_mask as trainable_mask
from lora_jax.peft import load_peft as load_peft
from lora_jax.peft_save import save_peft as save_peft
from lora_jax.plan import Plan as Plan
from lora_jax.plan import plan as plan
from lora_jax.preconditioning import lora_fa as lora_fa
from lora_jax.preconditioning import lora_fa_gradient as lora_fa_gradient
from lora_jax.preconditioning import riemannian as riemannian
from lora_jax.resume import Checkpoints as Checkpoints
from lora_jax.sharding import adapter_shardings as adapter_shardings
from lora_jax.sharding import adapter_specs as adapter_specs
from lora_jax.sharding import local_rows as local_rows
from lora_jax.sharding import shard_batch as shard_batch
from lora_jax.start import init as init
from lora_jax.train import LossScale as LossScale
from lora_jax.train import TrainState as TrainState
from lora_jax.train import jit_step as jit_step
from lora_jax.train import pmap_step as pmap_step
from lora_jax.train import shard_map_step as shard_map_step
from lora_jax.train import train_step as train_step
from lora_jax.transform import lora_apply as lora_apply

__version__ = "0.1.0"
