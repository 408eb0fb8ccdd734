"""The settings of a training run: what they are, whether they make sense, and what objects they stand for."""

import dataclasses
import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

import jax
import optax
from jax import P
from jax.sharding import AxisType, Mesh

from lora_jax.adapters.dora import Dora
from lora_jax.adapters.loha import Loha
from lora_jax.adapters.lokr import Lokr
from lora_jax.adapters.lora import Lora, RsLora
from lora_jax.adapters.lora_fa import LoraFa
from lora_jax.adapters.vera import Vera
from lora_jax.core.adapter import Rule
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.recipes.model import Model
from lora_jax.recipes.tokens import TooLong
from lora_jax.training.masks import freeze_base

Kind = Literal["lora", "rslora", "dora", "lora-fa", "vera", "loha", "lokr"]
KINDS: Mapping[Kind, Any] = {
    "lora": Lora, "rslora": RsLora, "dora": Dora, "lora-fa": LoraFa, "loha": Loha, "lokr": Lokr
}  # fmt: skip
Schedule = Literal["cosine", "linear", "constant"]
BATCH_AXES = ("data", "fsdp")  # of the mesh, which split the rows of a batch
AXES = (*BATCH_AXES, "tensor", "expert")
ALL = "all-linear"
ROWS = 4  # of a step at least, where none are asked for
# Where the log goes as well, and what is imported for it. tensorboardX is 0.7 MB and needs numpy and protobuf alone;
# tensorboard itself, which draws the pictures, brings a server and gRPC, and need not be where a run is trained.
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@dataclass(frozen=True)
class Options:
    """The settings of a training run.

    Args:
        rank: of the adapters.
        alpha: the numerator of their scale, which is alpha / rank.
        targets: all-linear, or a regular expression of the whole paths of weights, such as ".*/[qv]_proj/kernel".
        kind: of the adapters.
        dropout: the share of the inputs that adapters do not see, other ones at each step.
        bits: of each frozen weight of a linear layer: 4 is NF4 (QLoRA), 8 is int8, 16 leaves them as they are.
        dtype: of the other weights and of what is computed; auto is that of the files.
        epochs: how often each example is seen.
        max_steps: end after so many steps; 0 for all of the epochs. The schedule ends there too.
        lr: the highest learning rate.
        schedule: how it goes down after the warm-up: cosine and linear to zero; or it stays.
        warmup: the share of the steps in which it goes up.
        weight_decay: of AdamW.
        clip: the largest norm of a gradient; longer ones are shortened to it. 0 leaves them.
        batch_tokens: places for tokens in a step, on all devices: rows of max-length. 0 for 4 rows, or the next number
            that the devices and microbatches divide.
        max_length: the longest example in tokens, and the places of a row, in which several examples are packed.
        too_long: what becomes of longer examples: their end is cut off, they are dropped, or split into several.
        microbatches: parts that a step computes one after another, in less memory.
        remat: compute each layer again in the backward pass: much less memory, and more time.
        mesh: axes and their sizes, such as data=2,fsdp=4,tensor=2; by default data with all devices.
        eval_split: the share of the examples that is held out, if no file of these is given.
        eval_every: steps between two evaluations, each with a checkpoint; 0 for ten in a run.
        beta: of DPO, how strongly the model is kept near the base.
        samples: held-out prompts that the model answers before and after.
        log_to: tensorboard, wandb (Weights & Biases), or both with a comma: where the log goes as well.
        seed: of the adapters' start, the order of the examples, and which are held out.
        skip_bad: leave out and count lines that are no examples, in place of an error.

    >>> import lora_jax as lora
    >>> lora.recipes.Options(rank=8, lr=1e-3, batch_tokens=4096, max_length=512).rows
    8
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = ALL
    kind: Kind = "lora"
    dropout: float = 0.0
    bits: Literal[4, 8, 16] = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    epochs: int = 1
    max_steps: int = 0
    lr: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_tokens: int = 0
    max_length: int = 1024
    too_long: TooLong = "cut"
    microbatches: int = 1
    remat: bool = True
    mesh: str = ""
    eval_split: float = 0.05
    eval_every: int = 0
    beta: float = 0.1
    samples: int = 2
    log_to: str = ""
    seed: int = 0
    skip_bad: bool = False

    @property
    def rows(self) -> int:
        """Rows of a step, on all devices together; of a mesh's devices, once `with_rows` was asked."""
        return self.batch_tokens // self.max_length if self.batch_tokens else ROWS

    def check(self) -> None:
        """Check each setting by itself.

        Raises:
            LoraError: which one, and what it may be.
        """
        for field in dataclasses.fields(self):
            if expected := expected_type(field.name, getattr(self, field.name)):
                raise _wrong(self, field.name, expected)
        whole = {"epochs": 1, "max_steps": 0, "batch_tokens": 0, "max_length": 2, "microbatches": 1, "eval_every": 0}
        for name, least in (whole | {"samples": 0}).items():
            if getattr(self, name) < least:
                raise _wrong(self, name, f"a whole number of at least {least}")
        for name, value, expected in (
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to below 2**32"),
            ("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1"),
            ("lr", 0 < self.lr < math.inf, "a number above 0"),
            ("beta", 0 < self.beta < math.inf, "a number above 0"),
            ("warmup", 0 <= self.warmup < 1, "a share from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0"),
            ("clip", 0 <= self.clip < math.inf, "a number of at least 0"),
            ("eval_split", 0 <= self.eval_split < 1, "a share from 0 to below 1"),
            ("batch_tokens", self.rows >= 1, f"at least one row of max_length={self.max_length}"),
            (
                "microbatches",
                not self.batch_tokens or self.rows % self.microbatches == 0,
                f"a divisor of the {self.rows} rows of a step",
            ),
        ):
            if not value:
                raise _wrong(self, name, expected)
        rule(self)
        mesh_axes(self.mesh)
        tracker_names(self.log_to)


def expected_type(name: str, value: Any) -> str | None:
    """Return what an option is expected to be, in words, if a value is of another type: true and false are no numbers.

    >>> expected_type("rank", "eight"), expected_type("rank", 8), expected_type("bits", 5)
    ('a whole number', None, 'one of 4, 8, 16')
    """
    kind = get_type_hints(Options)[name]
    if choices := get_args(kind):
        return None if value in choices else f"one of {', '.join(map(str, choices))}"
    types, said = _TYPES[kind]
    return None if isinstance(value, types) and isinstance(value, bool) == (kind is bool) else said


_TYPES = {
    int: (Integral, "a whole number"), float: (Real, "a number"), str: (str, "text"), bool: (bool, "true or false")
}  # fmt: skip


def _wrong(options: Options, name: str, expected: str) -> LoraError:
    return LoraError(f"{name} is {getattr(options, name)!r}, expected {expected}.")


def check_names(names: Any, more: tuple[str, ...] = ()) -> None:
    """Raise if these are not all names of options, or of `more`."""
    known = (*(field.name for field in dataclasses.fields(Options)), *more)
    for name in names:
        if name not in known:
            raise LoraError(f"there is no option {name!r}; near are {', '.join(nearest(name, known, n=3))}.")


# What they stand for --------------------------------------------------------------------------------------------------


def rule(options: Options) -> Rule:
    """Return the rule of the adapters."""
    return Vera(options.rank) if options.kind == "vera" else KINDS[options.kind](options.rank, options.alpha)


def rules(options: Options, model: Model) -> dict[str, Rule]:
    """Return the rules for `lora.plan`."""
    return {model.linears if options.targets == ALL else options.targets: rule(options)}


def learning_rate(options: Options, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: up in the warm-up, then down over the rest of the steps."""
    up = min(steps - 1, round(options.warmup * steps))
    down = max(1, steps - up)
    after = {
        "cosine": optax.cosine_decay_schedule(options.lr, down),
        "linear": optax.linear_schedule(options.lr, 0.0, down),
        "constant": optax.constant_schedule(options.lr),
    }[options.schedule]
    # The first step of a warm-up already moves.
    return optax.join_schedules([optax.linear_schedule(options.lr / (up + 1), options.lr, max(1, up)), after], [up])


def make_optimizer(options: Options, steps: int) -> optax.GradientTransformation:
    """Return AdamW with the schedule, for adapters alone."""
    adamw = optax.adamw(learning_rate(options, steps), weight_decay=options.weight_decay)
    clip = optax.clip_by_global_norm(options.clip) if options.clip else optax.identity()
    return freeze_base(optax.chain(clip, adamw))


def mesh_axes(text: str) -> dict[str, int]:
    """Return the axes of a mesh and their sizes.

    >>> mesh_axes("data=2,fsdp=4")
    {'data': 2, 'fsdp': 4}
    """
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in found or not size.isdecimal() or int(size) < 1:
            raise LoraError(
                f"mesh has the part {part!r}, expected axes of {', '.join(AXES)} with their sizes, such as "
                "data=2,fsdp=4."
            )
        found[name] = int(size)
    return found


def tracker_names(text: str) -> tuple[str, ...]:
    """Return where the log goes as well. What that takes is installed.

    >>> tracker_names("")
    ()
    """
    names = tuple(part.strip() for part in text.split(",")) if text else ()
    for i, name in enumerate(names):
        if name not in TRACKERS or name in names[:i]:
            raise LoraError(f"log_to has the part {name!r}, expected {' or '.join(TRACKERS)}, each once.")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise LoraError(
                f"log_to is {text!r}, and {TRACKERS[name]} is not installed: pip install 'lora_jax[{name}]'."
            )
    return names


def axes_over(options: Options, devices: int, where: str) -> dict[str, int]:
    """Return the axes of the mesh of all devices, and their sizes; without `mesh` all are "data".

    Args:
        options: of the run.
        devices: how many there are.
        where: they are, in messages.

    Raises:
        LoraError: the axes have another number of devices; they do not divide the rows of a step.
    """
    axes = mesh_axes(options.mesh) or {"data": devices}
    if math.prod(axes.values()) != devices:
        raise LoraError(f"mesh is {options.mesh!r}, of {math.prod(axes.values())} devices, {where}.")
    with_rows(options, axes)
    return axes


def make_mesh(options: Options) -> Mesh | None:
    """Return the mesh of all devices; None for a single one.

    Raises:
        LoraError: as `axes_over`.
    """
    devices = jax.device_count()
    axes = axes_over(options, devices, f"but {devices} are there")
    if devices == 1:
        return None
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def batch_spec(axes: Iterable[str]) -> P:
    """Return how the rows of a batch are split over these axes of a mesh."""
    there = tuple(axes)
    return P(tuple(name for name in BATCH_AXES if name in there))


def with_rows(options: Options, axes: Mapping[str, int], together: int = 1) -> Options:
    """Return the options with the tokens of a step: where none are given, some rows that can be split evenly.

    >>> with_rows(Options(), {"data": 8}).rows, with_rows(Options(), {}).rows, with_rows(Options(), {"data": 3}).rows
    (8, 4, 6)

    Args:
        options: of the run.
        axes: of the mesh, and their sizes.
        together: rows that are not split: 2 for the two answers of pairs.

    Raises:
        LoraError: those that are given cannot be split over the axes of the batch and the microbatches.
    """
    parts = math.prod(axes.get(name, 1) for name in BATCH_AXES) * options.microbatches * together
    rows = -(-options.rows // parts) * parts
    if not options.batch_tokens:
        return dataclasses.replace(options, batch_tokens=rows * options.max_length)
    if options.rows != rows:
        why = f"the mesh axes {', '.join(BATCH_AXES)}, and microbatches={options.microbatches}"
        why += ", and the two answers of pairs" if together == 2 else ""
        raise LoraError(
            f"a step has {options.rows} rows (batch_tokens={options.batch_tokens}, max_length={options.max_length}), "
            f"which {parts} parts ({why}) do not divide evenly: give batch_tokens={rows * options.max_length}."
        )
    return options
