"""All programs of benchmarks/accelerator.py compile for one TPU and one GPU, with small sizes, NF4's kernels too."""

import pytest
from needs import needs
from test_kernels import kernels

from benchmarks import accelerator

# JAX warns of Triton, in which the kernels for GPUs are written.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v5e:1x1", "h100:1"])
def test_all_its_programs_compile_and_those_with_kernels_have_some(machine):
    needs(machine)
    found = accelerator.compile_for(machine, tiny=True)
    assert len(found) == 5 + 3 + 3 + 2
    with_kernels = {i for i, report in enumerate(found) if kernels(report.text)}
    assert with_kernels == {7, 10}  # the two rows "kernels on"
