"""LoRA for any JAX function: low-rank adapters as a pytree of their own beside frozen parameters."""

import importlib
from typing import TYPE_CHECKING, Any

from lora_jax import bases, checkpoint, initializers, key_maps, losses, policies, starts
from lora_jax.adapters.adalora import AdaLora, AdaLoraAdapter, orthogonality
from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.combine import combine
from lora_jax.adapters.dora import Dora, DoraAdapter
from lora_jax.adapters.dropout import with_dropout
from lora_jax.adapters.factored import Factored
from lora_jax.adapters.full import Full, FullAdapter
from lora_jax.adapters.ia3 import Ia3, Ia3Adapter, Ia3InputsAdapter
from lora_jax.adapters.loha import Loha, LohaAdapter
from lora_jax.adapters.lokr import Lokr, LokrAdapter
from lora_jax.adapters.lora import Lora, LoraAdapter, RsLora
from lora_jax.adapters.lora_fa import LoraFa, LoraFaAdapter
from lora_jax.adapters.select import select
from lora_jax.adapters.stack import stack, unstack
from lora_jax.adapters.token_rows import Rows, RowsAdapter
from lora_jax.adapters.vera import Vera, VeraAdapter
from lora_jax.algebra.compose import compose
from lora_jax.algebra.compress import compress
from lora_jax.algebra.conversion import Conversion
from lora_jax.algebra.difference import difference
from lora_jax.algebra.to_lora import to_lora
from lora_jax.analysis.abstract import abstract, abstract_state
from lora_jax.analysis.compile_report import CompileReport, compile_report
from lora_jax.analysis.differences import Differences, diff
from lora_jax.analysis.inspection import Inspection, inspect
from lora_jax.analysis.topologies import topology_mesh
from lora_jax.checkpoints.manager import Checkpoints
from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError, LoraWarning
from lora_jax.core.kinds import register_kind
from lora_jax.core.targets import Plan
from lora_jax.core.version import __version__ as __version__
from lora_jax.flax_models import from_linen, from_nnx
from lora_jax.initialization.init import init
from lora_jax.initialization.rank_allocation import allocate_ranks, gradient_scores, input_scores
from lora_jax.interop.gguf.adapters import load_gguf, save_gguf
from lora_jax.interop.gguf.merged import merge_gguf
from lora_jax.interop.image.adapters import inspect_image, load_image, save_diffusers, save_kohya
from lora_jax.interop.keras_lora import load_keras_lora, save_keras_lora
from lora_jax.interop.merge_checkpoint import merge_checkpoint
from lora_jax.interop.merge_quantized import merge_quantized
from lora_jax.interop.mlx.adapters import load_mlx, save_mlx
from lora_jax.interop.peft.in_memory import peft_tensors
from lora_jax.interop.peft.load import load_peft
from lora_jax.interop.peft.save import save_peft
from lora_jax.interop.qwix_trees import from_qwix, load_maxtext, to_qwix
from lora_jax.interop.torch_tensors import to_torch
from lora_jax.interop.torchtune import load_torchtune
from lora_jax.sharding.adapters import adapter_shardings, adapter_specs
from lora_jax.sharding.batches import local_rows, shard_batch
from lora_jax.sharding.unbatched import Unbatched
from lora_jax.training.adalora_schedule import adapt_budget, prune
from lora_jax.training.lora_plus import lora_plus
from lora_jax.training.masks import decay_mask, freeze_base, labels, trainable_mask
from lora_jax.training.per_slot import per_slot
from lora_jax.training.population import Population
from lora_jax.training.population_step import PerMember, population_step
from lora_jax.training.preconditioners import lora_fa, lora_fa_gradient, riemannian
from lora_jax.training.state import LossScale, TrainState
from lora_jax.training.step import jit_step, pmap_step, shard_map_step, train_step
from lora_jax.training.value_and_grad import value_and_grad
from lora_jax.transform.apply import lora_apply
from lora_jax.transform.merge import merge, unmerge
from lora_jax.transform.plan import plan

if TYPE_CHECKING:
    from lora_jax import recipes

__all__ = [
    "AdaLora",
    "AdaLoraAdapter",
    "Adapter",
    "AdapterBank",
    "Checkpoints",
    "CompileReport",
    "Conversion",
    "Differences",
    "Dora",
    "DoraAdapter",
    "Factored",
    "Full",
    "FullAdapter",
    "Ia3",
    "Ia3Adapter",
    "Ia3InputsAdapter",
    "Inspection",
    "KernelAxes",
    "Loha",
    "LohaAdapter",
    "Lokr",
    "LokrAdapter",
    "Lora",
    "LoraAdapter",
    "LoraError",
    "LoraFa",
    "LoraFaAdapter",
    "LoraWarning",
    "LossScale",
    "PerMember",
    "Plan",
    "Population",
    "Rows",
    "RowsAdapter",
    "RsLora",
    "Rule",
    "TrainState",
    "Unbatched",
    "Vera",
    "VeraAdapter",
    "abstract",
    "abstract_state",
    "adapt_budget",
    "adapter_shardings",
    "adapter_specs",
    "allocate_ranks",
    "bases",
    "checkpoint",
    "combine",
    "compile_report",
    "compose",
    "compress",
    "decay_mask",
    "diff",
    "difference",
    "freeze_base",
    "from_linen",
    "from_nnx",
    "from_qwix",
    "gradient_scores",
    "init",
    "initializers",
    "input_scores",
    "inspect",
    "inspect_image",
    "jit_step",
    "key_maps",
    "labels",
    "load_gguf",
    "load_image",
    "load_keras_lora",
    "load_maxtext",
    "load_mlx",
    "load_peft",
    "load_torchtune",
    "local_rows",
    "lora_apply",
    "lora_fa",
    "lora_fa_gradient",
    "lora_plus",
    "losses",
    "merge",
    "merge_checkpoint",
    "merge_gguf",
    "merge_quantized",
    "orthogonality",
    "peft_tensors",
    "per_slot",
    "plan",
    "pmap_step",
    "policies",
    "population_step",
    "prune",
    "recipes",
    "register_kind",
    "riemannian",
    "save_diffusers",
    "save_gguf",
    "save_keras_lora",
    "save_kohya",
    "save_mlx",
    "save_peft",
    "select",
    "shard_batch",
    "shard_map_step",
    "stack",
    "starts",
    "to_lora",
    "to_qwix",
    "to_torch",
    "topology_mesh",
    "train_step",
    "trainable_mask",
    "unmerge",
    "unstack",
    "value_and_grad",
    "with_dropout",
]


def __dir__() -> list[str]:
    """The public names alone; the folders of the package are no part of the API."""
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # which would take every name for one that is there

    def __getattr__(name: str) -> Any:
        """Import what few programs need when it is asked for."""
        if name == "recipes":
            return importlib.import_module("lora_jax.recipes")
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
