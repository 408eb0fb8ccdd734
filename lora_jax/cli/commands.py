"""`lora-jax`: fine-tune published models, and work on adapters and weights, from the command line.

lora-jax train SmolLM2-135M-Instruct examples.jsonl runs/first --bits 4
lora-jax generate SmolLM2-135M-Instruct runs/first/peft "Who are you?"
lora-jax eval SmolLM2-135M-Instruct runs/first/peft held_out.jsonl

lora-jax inspect runs/sentiment/adapters --plot deltas.png
lora-jax verify runs/sentiment/peft --base MiniLM-L6
lora-jax merge MiniLM-L6 runs/sentiment/peft merged
lora-jax convert runs/llama/adapters for-vllm --to vllm --key-map llama
lora-jax compose style:0.7 facts:-0.3 both
lora-jax plan SmolLM2-135M --modules ".*self_attn.*" --rank 16
lora-jax diff base tuned adapters --energy 0.95

Each command takes what it reads first, and what it writes last.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from lora_jax.checkpoints.failures import first_line
from lora_jax.core.errors import LoraError
from lora_jax.core.version import __version__

try:
    import tyro

    from lora_jax.cli.adapters import inspect, verify
    from lora_jax.cli.compose import compose
    from lora_jax.cli.convert import convert
    from lora_jax.cli.models import diff, merge, plan
    from lora_jax.cli.run_model import evaluate, generate
    from lora_jax.cli.train import train, with_config
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed, which the command line needs: pip install 'lora_jax[cli]'")

DESCRIPTION = """Fine-tune published models, and work on adapters and published weights.

Each command takes what it reads first and what it writes last. Its help, lora-jax COMMAND --help, has all options.
It exits with 0; with 1 after a line that says what is wrong; with 2 for arguments that it does not have; with 130 after
Ctrl-C; train with 143 if it was told to end by SIGTERM, once all is saved.
lora-jax --version prints the version."""
COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "generate": generate,
    "eval": evaluate,
    "inspect": inspect,
    "verify": verify,
    "merge": merge,
    "convert": convert,
    "compose": compose,
    "plan": plan,
    "diff": diff,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return the exit code: 0, or another one after a line on stderr that says why."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"lora-jax {__version__}")
        return 0
    try:
        arguments = with_config(list(sys.argv[1:] if arguments is None else arguments))
        code = int(
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="lora-jax", description=DESCRIPTION, args=arguments)
        )
        sys.stdout.flush()
        return code
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C.", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:  # such as a full disk that the output goes to
        print(f"error: {first_line(error)}", file=sys.stderr)
        with contextlib.suppress(OSError):  # what is left of the output would be tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
