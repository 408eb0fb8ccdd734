"""One small `lora.jit_step` on each machine: it compiles, fits, and sends the gradients of adapters once, in fp32."""

from dataclasses import dataclass

import decoder
import programs
import pytest
from collectives import arrays, numbers, of
from needs import needs

RANK, LAYERS = programs.RANK, 2
WIDE = decoder.Size(layers=LAYERS, width=1024, inner=2048, heads=16, kv_heads=16, vocabulary=1024)
WIDER = decoder.Size(layers=LAYERS, width=2048, inner=2048, heads=16, kv_heads=16, vocabulary=1024)


@dataclass(frozen=True)
class Target:
    topology: str
    axes: tuple[tuple[str, int], ...]
    size: decoder.Size = programs.SMALL
    slices: int = 1

    def setup(self) -> programs.Setup:
        return programs.setup(self.topology, self.slices, self.size, programs.FEW, **dict(self.axes))

    def factors(self) -> int:
        """Return the numbers of all adapters on one device."""
        width, inner, n = self.size.width, self.size.inner, dict(self.axes).get("tensor", 1)
        columns = 3 * (width + width // n) + 2 * (width + inner // n)  # q, k, v, gate, up
        rows = (width // n + width) + (inner // n + width)  # o, down
        return LAYERS * RANK * (columns + rows)

    def __str__(self) -> str:
        return f"{self.slices} x {self.topology}" if self.slices > 1 else self.topology


FSDP8 = (("fsdp", 8),)
POD = Target("v5e:16x16", (("fsdp", 16), ("tensor", 16)), WIDE)
SLICES = Target("v5e:4x4", (("data", 2), ("fsdp", 16)), WIDER, slices=2)
TPU7X, H100 = Target("tpu7x:2x2x1", FSDP8), Target("h100:8", FSDP8)
TARGETS = [
    POD,
    Target("v5p:4x4x4", (("fsdp", 16), ("tensor", 4))),
    Target("v6e:4x8", (("fsdp", 32),)),
    SLICES,
    TPU7X,
    H100,
    Target("h100:8x8", (("data", 8), ("fsdp", 8))),
]


PACKED = [(TPU7X, "nf4", 9 / 32), (H100, "nf4", 9 / 32), (TPU7X, "int8", 0.5)]


@pytest.fixture(scope="module")
def found():
    """Reports by the machine and the format of the base."""
    kept = {}

    def report(target, bits=""):
        if (target, bits) not in kept:
            needs(target.topology)
            kept[target, bits] = target.setup().lora_step(bits=bits)
        return kept[target, bits]

    return report


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_it_fits_and_the_gradients_of_adapters_are_summed_once_in_fp32(found, target):
    report = found(target)
    assert report.fits
    sent = arrays(report)
    if "tensor" in dict(target.axes):  # activations have sums of their own there
        factors = of(sent, lambda _, dtype, shape: dtype == "f32" and RANK in shape)
        assert {kind for kind, _, _ in factors} == {"all-reduce"}
        assert numbers(factors) == target.factors()
    elif target.slices == 1:
        sums = of(sent, lambda kind, *_: kind == "all-reduce")
        assert {dtype for _, dtype, _ in sums} == {"f32"}
        assert numbers(sums) == target.factors() + 1, "and the loss"


@pytest.mark.parametrize("target", [target for target in TARGETS if target is not SLICES], ids=str)
def test_adapters_are_never_gathered(found, target):
    gathers = of(arrays(found(target)), lambda kind, *_: kind in ("all-gather", "reduce-scatter"))
    assert {dtype for _, dtype, _ in gathers} <= {"bf16", "s32"}, "the base, and token ids"
    assert not of(gathers, lambda _, dtype, shape: dtype == "bf16" and RANK in shape)


def test_between_slices_only_the_gradients_of_adapters_are_sent(found):
    """Each chip of a slice sends its sixteenth of the sums over the slice; and the loss, which takes a tile of 128."""
    sent = arrays(found(SLICES))
    between = of(sent, lambda kind, *_: "between slices" in kind)
    assert {dtype for _, dtype, _ in between} == {"f32"}
    assert numbers(between) == SLICES.factors() // 16 + 128
    whole, parts = (
        numbers(of(sent, lambda own, *_, kind=kind: own == kind)) for kind in ("all-reduce", "reduce-scatter")
    )
    assert whole + 16 * parts == SLICES.factors() + 128, "and within a slice, once"


@pytest.mark.parametrize(("target", "bits", "bound"), PACKED)
def test_a_packed_base_is_gathered_packed(found, target, bits, bound):
    """Of numbers of 16 bits NF4 has 4 and, for each 64 of them, a scale of 32: 9/32. Tables stay in bf16."""
    size = target.size
    sent, dense = (of(arrays(found(target, b)), lambda kind, *_: kind == "all-gather") for b in (bits, ""))
    tables = of(sent, lambda _, dtype, __: dtype == "bf16")
    assert numbers(tables) <= 2 * size.vocabulary * size.width
    packed = sum(nbytes(array, n) for array, n in sent.items() if array[1] not in ("bf16", "s32"))
    linears = sum(nbytes(array, n) for array, n in dense.items() if array[1] == "bf16") - 2 * numbers(tables)
    assert 0 < packed <= bound * linears


def nbytes(array, n):
    return numbers({array: n}) * int(array[1].strip("abcdefghijklmnopqrstuvwxyz")) / 8


def test_a_packed_base_takes_no_more_temporary_memory(found):
    for target, bits, _ in PACKED:
        assert programs.temporary(found(target, bits)) <= programs.temporary(found(target)), (target, bits)
