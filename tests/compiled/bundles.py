"""How many instructions a kernel for TPUs has, which no report says: the compiler writes them down if it is told to.

It is told when it is loaded, so this is a program of its own: `python bundles.py topology rows d k transposed` prints
how many steps one product with a weight in NF4 takes, and the compiler writes down what is in one.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
BUNDLE = re.compile(r"^\s*(0x)?[0-9a-f]+\s.*: ", re.MULTILINE)  # instructions of one cycle


def of_nf4_product(topology: str, rows: int, d: int, k: int, transposed: bool) -> int:
    """Return the bundles of a product: those of one step of the kernel's grid, times its steps."""
    args = (topology, rows, d, k, int(transposed))
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(sys.path)
        how = {**os.environ, "LIBTPU_INIT_ARGS": DUMP.format(folder), "PYTHONPATH": path}
        command = [sys.executable, __file__, *map(str, args)]
        run = subprocess.run(command, env=how, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        (text,) = (
            file
            for file in Path(folder).glob("*nf4_product*-final_bundles.txt")
            if "schedule-analysis" not in file.name
        )
        return int(run.stdout) * len(BUNDLE.findall(text.read_text()))


def _compile(topology: str, rows: int, d: int, k: int, transposed: bool) -> None:
    """Compile the product, and print how many steps its grid has."""
    import jax
    import jax.numpy as jnp

    import lora_jax as lora
    from lora_jax.analysis.compile_report import lowered
    from lora_jax.analysis.topologies import find_topology
    from lora_jax.bases import nf4_kernels

    def product(params: Any, x: jax.Array) -> jax.Array:
        return lora.lora_apply(lambda params, x: x @ (params["w"].T if transposed else params["w"]))(params, {}, x)

    dense = {"w": jax.ShapeDtypeStruct((d, k), jnp.bfloat16)}
    packed = jax.eval_shape(lambda w: lora.bases.quantize(w, {"w": lora.bases.Nf4(double=False, stack=0)}), dense)
    x = jax.ShapeDtypeStruct((rows, k if transposed else d), jnp.bfloat16)
    one = jax.sharding.Mesh(np.array(find_topology(topology).devices[:1]), ("x",))
    lowered(product, lora.abstract(packed, one), lora.abstract(x, one)).compile()
    sizes = nf4_kernels.tile(rows, d, k, "tpu")
    assert sizes is not None
    print(-(-rows // sizes[0]) * (d // sizes[1]) * (k // sizes[2]))


if __name__ == "__main__":
    _compile(sys.argv[1], *map(int, sys.argv[2:5]), bool(int(sys.argv[5])))
