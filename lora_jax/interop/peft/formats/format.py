"""What the files of one kind of adapter look like in HF PEFT: the base class of all formats.

PEFT's factors are those of torch's weights: W' = W + s B A, with A [r, in] and B [out, r], which are our A and B
transposed. Between a file and the adapters, `Module` holds them in torch's layout, under the names of our fields.
"""

import abc
import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from lora_jax.adapters.scaled import as_ratio
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout
from lora_jax.core.text import printable
from lora_jax.interop.key_map import Array, ParameterMatch
from lora_jax.interop.peft.dtypes import times
from lora_jax.interop.peft.options import Options, value_of_module

Arrays = dict[str, Array]
Modules = dict[str, "Module"]  # by the names of torch's modules
Matches = Mapping[str, ParameterMatch]

OF_RANK, OF_OUTPUTS = ("stack", "rank"), ("stack", "outputs")  # layouts of vectors, the same here and in torch

# Options that say nothing about what a saved adapter computes, or that `Format.read` and `read_config` read.
_COMMON = """
    auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern layers_to_transform
    modules_to_save peft_type peft_version revision runtime_config target_modules task_type
"""
COMMON_OPTIONS = frozenset(_COMMON.split())
# The tensors that adapters of any kind have in PEFT, of kinds without a format here too.
_TENSOR_OF_AN_ADAPTER = re.compile(
    r"(.*\.)?(lora_(magnitude_vector|[AB](\.(weight|bias))?|E|embedding_[AB]|diag|velora.*|arrow.*|monteclora.*)"
    r"|token_adapter\..+|(hada|lokr|vera|ia3|miss|gralora|delora)_\w+(\.weight)?)"
)


class Module(NamedTuple):
    """The arrays of one module of torch's, by the names of our fields, and the scale of their product."""

    arrays: Arrays
    scale: float


class Config(NamedTuple):
    """What the config of a folder says, of all kinds alike; what only one kind has is in `extra`."""

    format: "Format"
    rank: int
    alpha: float
    rslora: bool
    transposed: bool  # weights are [in, out], as those of transformers' Conv1D
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]  # none where it is a regular expression
    target_parameters: tuple[str, ...]
    lora_bias: bool
    replicated: bool  # the model has some layers of the published one several times
    tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]]  # rows of the table of embeddings, or of these modules'
    start: str | None = None  # the start that changed the base, if that can be made again: "pissa" or "olora"
    extra: Mapping[str, Any] = MappingProxyType({})  # what only configs of this format say
    says_ranks: bool = True  # files of other programs have no config, or one that does not

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return self.format.rank_in(self, module)

    def scale_of(self, module: str) -> float:
        """Return the scale of a module's product."""
        return self.format.scale_in(self, module)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the rows that were trained of a module's table."""
        if isinstance(self.tokens, tuple):
            return self.tokens
        return next((rows for name, rows in self.tokens.items() if f".{module}".endswith(f".{name}")), ())


class Format(abc.ABC):
    """The files of one kind of adapter: its options, its tensors, and how they become adapters and are made of them.

    The methods here are for adapters whose arrays are pairs of low-rank factors, and vectors over the rank or over the
    outputs. A format overrides those in which it differs, and is put into `registry.FORMATS`.
    """

    # What it is for.
    name: ClassVar[str]  # in messages
    peft_type: ClassVar[str]  # in the config
    adapter: ClassVar[type[Adapter]]
    module_kinds: ClassVar[tuple[str, ...]]  # of a key map: the modules that PEFT has this kind for
    zeros_change_nothing: ClassVar[bool] = True  # a module whose arrays are all zero is one without an adapter
    scales_biases: ClassVar[bool] = False  # a module's factors on its outputs are also those on its bias
    joins_parts: ClassVar[bool] = True  # several parameters, or outputs in another order, can be those of one module
    is_lora: ClassVar[bool] = True  # an adapter of this kind is a LoRA in another form
    is_written: ClassVar[bool] = True  # those that are not are written as the LoRA that they are read as
    is_low_rank: ClassVar[bool] = False  # W' is W + s B A of its arrays a and b, with rows of length m if it has an m

    # The config.
    options: ClassVar[frozenset[str]] = COMMON_OPTIONS  # those that are understood
    free_options: ClassVar[tuple[str, ...]] = ("inference_mode", "init_weights")  # those that no tensor tells
    rank_option: ClassVar[str] = "r"
    default_rank: ClassVar[int] = 8
    alpha_option: ClassVar[str] = "alpha"

    # The tensors.
    endings: ClassVar[Mapping[str, str]]  # how the tensor of each of the adapter's arrays is called in its module
    other_endings: ClassVar[Mapping[str, str]] = MappingProxyType({})  # further names of tensors
    # What names of tensors in an unknown form begin with, and the option with which PEFT makes none of these.
    refused_beginnings: ClassVar[Mapping[str, str]] = MappingProxyType({})
    optional: ClassVar[tuple[str, ...]] = ()  # arrays that a module can do without
    of_training: ClassVar[tuple[str, ...]] = ()  # parts of names, between dots, of tensors for training alone
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()  # arrays that are a factor A and its B
    scaled: ClassVar[str] = ""  # the array that a scale can be multiplied into
    may_be_empty: ClassVar[bool] = False  # modules of rank 0 are allowed
    shared_tensors: ClassVar[tuple[str, ...]] = ()  # full names of tensors that all modules use

    # What else a folder can hold.
    has_lora_bias: ClassVar[bool] = False
    has_biases: ClassVar[bool] = True
    has_rows: ClassVar[bool] = False

    # Loading without a model.
    needs_model: ClassVar[str] = ""  # why the tensors alone do not tell the adapters
    needs_shapes: ClassVar[str] = ""  # why they do not, unless the shapes of the model's tensors are known
    start_in_factors: ClassVar[bool] = False  # what a start took out of W goes into the factors, not into a new base

    @property
    def layout(self) -> Mapping[str, Layout]:
        """Return the layouts of the arrays that modules of this kind have."""
        return self.adapter.layout

    # The config -------------------------------------------------------------------------------------------------------

    def is_meant_by(self, options: Options) -> bool:
        """Return whether a config with this `peft_type` is of this format."""
        return True

    def read(self, options: Options) -> Config:
        """Return what a config of this format says."""
        targets = options.get("target_modules")
        return Config(
            format=self,
            rank=options.whole_number(self.rank_option, self.default_rank),
            alpha=options.number(self.alpha_option, 8),
            rslora=options.flag("use_rslora"),
            transposed=options.flag("fan_in_fan_out"),
            rank_pattern=self.read_ranks(options),
            alpha_pattern=options.patterns("alpha_pattern", whole=False),
            target_modules=() if isinstance(targets, str) else options.names("target_modules"),
            target_parameters=options.names("target_parameters"),
            lora_bias=options.flag("lora_bias"),
            replicated=options.flag("layer_replication"),
            tokens=options.rows("trainable_token_indices"),
        )

    def read_ranks(self, options: Options) -> Mapping[str, int]:
        """Return the ranks that differ from the config's one, by what `rank_in` looks them up with."""
        return options.patterns("rank_pattern", whole=True)

    def rank_in(self, config: Config, module: str) -> int:
        """Return the rank of a module by the config."""
        return value_of_module(config.rank_pattern, module, config.rank)

    def scale_in(self, config: Config, module: str) -> float:
        """Return the scale of a module by the config, alpha / r."""
        return value_of_module(config.alpha_pattern, module, config.alpha) / config.rank_of(module)

    @abc.abstractmethod
    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        """Return the entries of the config that follow from the modules, beside those that all kinds have.

        Args:
            matches: of each module one of the parameters that it is.
            bias: which biases are written whole: "none", "lora_only" or "all".
        """

    # The tensors ------------------------------------------------------------------------------------------------------

    def field_of(self, tensor: str) -> tuple[str, str] | None:
        """Return the module and the array that a tensor is, or None if it is none of an adapter.

        Raises:
            LoraError: it is one of another kind of adapter, or of a form that has no place here.
        """
        fields = {ending: name for name, ending in self.endings.items()} | dict(self.other_endings)
        for ending, name in fields.items():
            if tensor.endswith(f".{ending}"):
                return tensor.removesuffix(f".{ending}"), name
        for start, option in self.refused_beginnings.items():
            if tensor.rpartition(".")[2].startswith(start):
                raise LoraError(f"of a form of {self.name} that this version does not have: train it with {option}")
        if _TENSOR_OF_AN_ADAPTER.fullmatch(tensor):
            raise LoraError(f"which is not of {self.name}, the kind that its config says")
        return None

    def problem(self, arrays: Arrays) -> str | None:
        """Return what is wrong with the arrays of one module, or None."""
        missing = [name for name in self.endings if name not in arrays and name not in self.optional]
        if missing:
            found = ", ".join(ending for name, ending in self.endings.items() if name in arrays)
            return f"has only {found}, and not {', '.join(self.endings[name] for name in missing)}"
        return self.problem_of_shapes(arrays)

    def problem_of_shapes(self, arrays: Arrays) -> str | None:
        """Return in what the shapes of one module's arrays do not fit one another, or None."""
        for first, second in self.pairs:
            a, b = arrays[first].shape, arrays[second].shape
            if len(a) < 2 or len(a) != len(b) or a[0] != b[1] or 0 in (*a[1:], b[0]):
                return f"has factors {list(a)} and {list(b)}, of no common rank"
        for name, shape in self.expected_shapes(arrays).items():
            if arrays[name].shape != shape:
                return f"has {self.endings[name]} of shape {list(arrays[name].shape)}, expected {list(shape)}"
        if not self.may_be_empty and 0 in [array.size for array in arrays.values()]:
            return "has factors of rank 0"
        return None

    def expected_shapes(self, arrays: Arrays) -> dict[str, tuple[int, ...]]:
        """Return the shapes that tensors have to have in a file, by the shapes of the first pair of factors."""
        return {}

    def tensors_of(self, match: ParameterMatch, arrays: Arrays) -> Arrays:
        """Return the tensors of one module as PEFT shapes and names them."""
        shapes = self.expected_shapes(arrays)
        names = self.endings_of(match, arrays)
        return {names[name]: array.reshape(shapes.get(name, array.shape)) for name, array in arrays.items()}

    def endings_of(self, match: ParameterMatch, arrays: Arrays) -> Mapping[str, str]:
        """Return how the tensors of one module are called."""
        return self.endings

    # One module's arrays ----------------------------------------------------------------------------------------------

    def rank_of(self, arrays: Arrays) -> int | None:
        """Return the rank of one module, of all experts together; None if it has none."""
        return len(arrays[self.pairs[0][0]])

    def inputs_of(self, arrays: Arrays) -> int:
        """Return the number of inputs of one module, without those of a window."""
        return arrays[self.pairs[0][0]].shape[1]

    def outputs_of(self, arrays: Arrays) -> int:
        """Return the number of outputs of one module."""
        return len(arrays[self.pairs[0][1]])

    def rescaled(self, module: Module, scale: float) -> Module:
        """Return the same product with another scale."""
        if scale == module.scale:
            return module
        scaled = times(module.arrays[self.scaled], module.scale / scale)
        return Module(module.arrays | {self.scaled: scaled}, scale)

    def module_kind(self, config: Config, module: str, arrays: Arrays, tensors: Container[str]) -> str:
        """Return the kind of a module, a key of a key map's kinds, by its arrays and the names of a file's tensors."""
        if arrays[self.pairs[0][0]].ndim > 2:
            return "conv"
        return "conv1d" if config.transposed else "linear"

    def resolved(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> Arrays:
        """Return a module's arrays by our fields, where a file has others in their place.

        Args:
            fans: the inputs and outputs of the module, or None where they are not known.

        Raises:
            LoraError: they do not fit the config or the module; the message goes on after the module's name.
        """
        return arrays

    # Between torch's layout and ours ----------------------------------------------------------------------------------

    def is_for(self, match: ParameterMatch) -> bool:
        """Return whether PEFT has this kind for a module."""
        is_whole = match.entry.part is None and not match.entry.moves_outputs
        return match.entry.kind in self.module_kinds and (self.joins_parts or is_whole)

    def check_module(self, match: ParameterMatch) -> None:
        """Raise if a module's tensors cannot be of this kind."""
        if not self.joins_parts and not self.is_for(match):
            raise LoraError(
                f"{match.path!r} is not a whole linear layer by the key map, and {self.name} is read for these."
            )

    def from_torch(self, match: ParameterMatch, arrays: Arrays, start: int) -> Arrays:
        """Convert the arrays of one module to those of our parameter, whose outputs begin at `start` of the module's.

        Raises:
            LoraError: the shapes are not those of the parameter's arrays; PEFT does not have this kind for the module.
        """
        self.check_module(match)
        ours = {}
        for a, b in self.pairs:
            ours[a], ours[b] = match.factors_from_torch(self.as_factor(match, arrays[a]), arrays[b], start)
        for name, layout in self.layout.items():
            if layout == OF_RANK:
                ours[name] = arrays[name].reshape(-1)
            elif layout == OF_OUTPUTS:
                vector = arrays[name].reshape(-1)
                part = vector[start : start + match.outputs]
                if len(part) != match.outputs or (match.entry.part is None and len(vector) != len(part)):
                    raise does_not_fit(match, {name: arrays[name]})
                ours[name] = match.in_our_size(match.in_our_order(part.reshape(match.sizes_of("out"))))
        if self.scaled in ours:
            ours[self.scaled] = match.in_our_size(ours[self.scaled])
        return ours

    def as_factor(self, match: ParameterMatch, a: Array) -> Array:
        """Return a factor A [r, inputs, *window] of a module."""
        return a

    def to_torch(self, match: ParameterMatch, ours: Arrays) -> Arrays:
        """Convert the arrays of one module's part of a parameter to torch's layout, the inverse of `from_torch`."""
        arrays = {}
        for a, b in self.pairs:
            arrays[a], arrays[b] = match.factors_to_torch(ours[a], ours[b])
        for name, layout in self.layout.items():
            if layout == OF_RANK:
                arrays[name] = ours[name].reshape(-1)
            elif layout == OF_OUTPUTS:
                arrays[name] = match.in_torch_size(match.in_torch_order(ours[name])).reshape(-1)
        if self.scaled in arrays:
            arrays[self.scaled] = match.in_torch_size(arrays[self.scaled])
        return arrays

    # Adapters ---------------------------------------------------------------------------------------------------------

    def shared_fields(
        self, config: Config, tensors: Mapping[str, Array], modules: Mapping[str, Module], matches: Matches
    ) -> dict[str, Any]:
        """Return what all adapters of a folder have in common: further fields that `build` is given.

        Args:
            tensors: those of `shared_tensors` that the folder holds.

        Raises:
            LoraError: the folder holds tensors that no adapter here can express; the message lacks the folder's name.
        """
        return {}

    def problem_of_layers(self, match: ParameterMatch, found: int) -> str | None:
        """Return why a stack cannot have an adapter in only `found` of its layers, or None."""
        return None

    def build(
        self, match: ParameterMatch, arrays: Mapping[str, Any], scale: float, shared: Mapping[str, Any]
    ) -> Adapter:
        """Return the adapter of a parameter with these arrays."""
        known = {
            "axes": match.axes,
            "ratio": as_ratio(scale),
            "inputs": match.sizes_of("in"),
            "outputs": match.sizes_of("out"),
        }
        known |= shared
        fields = [field.name for field in dataclasses.fields(self.adapter)]  # type: ignore[arg-type]
        return self.adapter(**{name: known[name] for name in fields if name in known}, **arrays)

    def holds(self, adapters: Mapping[str, Adapter], matches: Matches) -> bool:
        """Return whether a folder of this format can hold all of these adapters as they are."""
        return all(type(adapters[path]) is self.adapter and self.is_for(match) for path, match in matches.items())

    def convert(self, adapter: Adapter) -> Adapter | None:
        """Return the adapter as one of this kind, or None if it is not one."""
        return adapter if isinstance(adapter, self.adapter) else None

    def fit(self, modules: Modules) -> Modules | None:
        """Return the modules as one folder can hold them all, or None if the folder has to be of LoRA instead."""
        return modules

    def unchanged_outputs(self, module: str, match: ParameterMatch, params: Any) -> Array:
        """Return the vector over the outputs of a module's part that has no adapter: the one that changes nothing."""
        raise NotImplementedError(f"{self.name} has no vector over the outputs of a module")

    def refusal(self, other: str | None) -> str:
        """Return why an adapter that is no LoRA cannot be written; `other` is the path of one of another kind."""
        if other is not None:
            why = f"{other!r} is not, and a folder of PEFT is all of one kind: save them to folders of their own"
        else:
            why = f"PEFT has it for modules that are {', '.join(self.module_kinds)}: merge it instead"
        return f"is of {self.name}; {why}"

    def shared_to_tensors(self, adapters: Sequence[Adapter]) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the tensors that all modules use, by their full names, and what the config says of them."""
        return {}, {}

    def keeps_shared(self, entries: Mapping[str, Any]) -> bool:
        """Return whether a folder with this config holds the tensors that all modules use."""
        return True


def does_not_fit(match: ParameterMatch, arrays: Arrays) -> LoraError:
    """Return the error that arrays of a module do not have the shapes of a parameter's."""
    shapes = " and ".join(str(list(array.shape)) for array in arrays.values())
    return LoraError(
        f"{printable(next(iter(match.names.values())))} has {shapes}, which do not fit {match.path!r} of shape "
        f"{list(match.shape)}: another model, or another key map."
    )
