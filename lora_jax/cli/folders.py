"""Folders of adapters, in any form that this library reads, and the key maps that name their modules."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from lora_jax import checkpoint, key_maps
from lora_jax.checkpoints.failures import first_line
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.interop.conversions import FORMATS, About, format_of
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.module_adapters import ModuleAdapters, by_module
from lora_jax.interop.name_templates import split
from lora_jax.interop.peft.load import read_by_module
from lora_jax.interop.safetensors_index import tensors_in

# The arguments of commands, as their help names them.
Adapters = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTERS")]
Base = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
Tuned = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
Step = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OWN, PEFT = "orbax", "peft"
FOLDERS = (PEFT, "mlx")  # formats whose adapters are a folder of two files
NOTHING = About()  # is said of the model
Model = Annotated[Path | None, tyro.conf.arg(metavar="BASE")]
Component = Literal["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]
KNOWN = {name.lower(): name for name in key_maps.__all__ if isinstance(getattr(key_maps, name), KeyMap)}


@dataclass(frozen=True)
class Names:
    """Which torch modules the paths of adapters are, if they are of lora_jax. Those of HF PEFT know it themselves.

    Args:
        key_map: bert, gpt2, llama, gemma, vit, vit_4, t5; tunix, tunix_gemma, gemma_flax, maxtext_llama,
            maxtext_mixtral, maxtext_qwen, keras_llama, keras_gemma; or module:NAME, a lora_jax.key_maps.KeyMap of a
            Python module of your own, which may be in the current directory.
        stacked: whether their layers are stacked along a first axis.
        prefix: what torch's names begin with beyond those of the table, such as "bert.".
    """

    key_map: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    stacked: bool = False
    prefix: str = ""

    def table(self) -> KeyMap | None:
        """Return the key map, or None if none is given.

        Raises:
            LoraError: there is no such key map.
        """
        if self.key_map is None:
            return None
        table = key_map_called(self.key_map)
        return (table.stacked() if self.stacked else table).under(name=self.prefix)

    def refuse(self, folder: Path) -> None:
        """Raise if a key map is given for a folder that names the modules itself."""
        if self.key_map is not None:
            raise LoraError(f"{folder} names the modules itself: leave out --key-map.")


NO_NAMES = Names()
NameOptions = Annotated[Names, tyro.conf.arg(name="")]  # without a prefix of their own


class Contents(NamedTuple):
    """What a folder of adapters holds."""

    adapters: dict[str, Adapter]
    others: dict[str, Any]
    key_map: KeyMap | None  # from these paths to torch's modules, if the folder knows it

    @property
    def kinds(self) -> dict[str, str]:
        """Return the kind of module of each path, where the folder knows it."""
        entries = () if self.key_map is None else self.key_map.entries
        return {split(entry.path)[0]: entry.kind for entry in entries}


def format_in(path: Path, step: int | None, given: str | None = None) -> str:
    """Return the format of adapters, a key of `FORMATS` or OWN: the given one, or the one that the files tell.

    Raises:
        LoraError: a step is asked for, and files of this format have none; it is a file, and of no format; it is a
            folder of folders of adapters.
    """
    name = given or format_of(path) or _own(path)
    if step is not None and name != OWN:
        raise LoraError(f"{path} is of {name}, which has no steps: leave out --step {step}.")
    return name


def _own(path: Path) -> str:
    """Return OWN, which folders are of that nothing else tells."""
    if path.is_file() or (not os.path.lexists(path) and path.suffix in (".gguf", ".safetensors")):
        if not path.exists():
            raise LoraError(f"there is no {path}.")
        if (kind := format_of(path.parent)) in FOLDERS:
            raise LoraError(f"{path} is one of the files of a folder of {kind}: give the folder, {path.parent}.")
        raise LoraError(f"{path} holds no adapters: of files, those are GGUF, and .safetensors of image models.")
    inside = sorted(own.name for own in path.iterdir() if format_of(own) in FOLDERS) if path.is_dir() else []
    if inside:
        raise LoraError(
            f"{path} holds folders of adapters, {', '.join(map(short, inside[:5]))}: give one of them, such as "
            f"{path / inside[0]}."
        )
    return OWN


def read_adapters(path: Path, step: int | None = None, about: About = NOTHING, given: str | None = None) -> Contents:
    """Read adapters of any format, of lora_jax.checkpoint.save or of lora_jax.Checkpoints.

    Args:
        path: to read.
        step: of a folder of Checkpoints; by default its newest one.
        about: the model, for the formats that need it.
        given: the format, where the files do not tell it.

    Raises:
        LoraError: it holds no adapters, or no such step.
    """
    name = format_in(path, step, given)
    if name == OWN:
        return Contents(*checkpoint.load(path, step=step), None)
    if name == PEFT:
        shapes = (
            None if about.base is None else {name: place.shape for name, place in tensors_in(about.base)[0].items()}
        )
        read = read_by_module(path, shapes)
        return Contents(read.adapters, read.whole, read.key_map)
    found = read_modules(path, name, about)
    assert found is not None  # PEFT alone has folders that have to be read as a whole
    adapters, key_map = by_module(found)
    return Contents(adapters, {}, key_map)


def read_modules(path: Path, name: str, about: About) -> ModuleAdapters | None:
    """Return the adapters of a path in this format by torch's modules; None if they have to be read as a whole.

    Raises:
        LoraError: it is not of this format; the files are read in another one.
    """
    read = FORMATS[name].read
    if read is None:
        raise LoraError(f"files for {name} are read as those of another format: leave --from out.")
    return read(path, about)


def for_files(
    folder: Path, names: Names, step: int | None, about: About = NOTHING
) -> tuple[Path | dict[str, Adapter], KeyMap | None, dict[str, Any] | None]:
    """Return adapters, their key map and others as `merge_checkpoint` takes them: of HF PEFT the folder itself.

    Raises:
        LoraError: as `read_adapters` and `table_of`.
    """
    if format_in(folder, step) == PEFT:
        names.refuse(folder)
        return folder, None, None
    contents = read_adapters(folder, step, about)
    return contents.adapters, table_of(folder, contents, names), contents.others or None


def table_of(folder: Path, contents: Contents, names: Names) -> KeyMap:
    """Return the key map of a folder, the one that it knows or the one that is given.

    Raises:
        LoraError: it knows none, and none is given; it knows one, and one is given.
    """
    if contents.key_map is not None:
        names.refuse(folder)
        return contents.key_map
    table = names.table()
    if table is None:
        raise LoraError(
            f"{folder} has paths of JAX: say which torch modules they are, such as --key-map llama, or --key-map "
            "my_maps:MY_MAP for one of your own."
        )
    return table


def key_map_called(name: str) -> KeyMap:
    """Return the key map of an architecture, or `module:NAME`, one of an importable Python module.

    Raises:
        LoraError: there is none of this name; the module is not there, or fails; what it has there is no key map.
    """
    if ":" not in name:
        if name.lower() in KNOWN:
            found: KeyMap = getattr(key_maps, KNOWN[name.lower()])
            return found
        raise LoraError(
            f"there is no key map {name!r}: expected one of {', '.join(KNOWN)}, or module:NAME for one of your own, "
            "such as my_maps:MY_MAP for MY_MAP in my_maps.py."
        )
    module_name, _, attribute = name.partition(":")
    module = _imported(name, module_name)
    if not hasattr(module, attribute):
        own = [known for known, value in vars(module).items() if isinstance(value, KeyMap)]
        near = f"its key maps are {', '.join(nearest(attribute, own))}" if own else "it has no key map"
        raise LoraError(f"--key-map {name}: the module {module_name} has no {attribute!r}; {near}.")
    table = getattr(module, attribute)
    if not isinstance(table, KeyMap):
        raise LoraError(
            f"--key-map {name}: that is a {type(table).__name__}, expected a lora_jax.key_maps.KeyMap, such as "
            f"{attribute} = KeyMap(linear('layer_{{i}}/query/kernel', 'layers.{{i}}.query'))."
        )
    return table


def _imported(name: str, module: str) -> Any:
    """Import a module, from the current directory too."""
    try:
        with _current_directory():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise LoraError(f"--key-map {name}: {module} cannot be imported: {first_line(error)}") from error
        raise LoraError(
            f"--key-map {name}: there is no module {error.name!r}, neither in {Path.cwd()} nor among the packages that "
            "Python finds (PYTHONPATH)."
        ) from error
    except Exception as error:  # whatever the code of a user raises
        raise LoraError(f"--key-map {name}: {module} cannot be imported: {first_line(error)}") from error


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """Let Python find modules in the current directory first, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
