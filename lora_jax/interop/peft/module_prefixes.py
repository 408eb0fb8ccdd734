"""Modules that a folder calls otherwise than the model does, by what their names begin with.

A model is often a part of another one: `model.layers.0` of a language model is `language_model.model.layers.0` in a
model that also sees, and `layers.0` without its head. Where all names of a folder become the model's in one single way,
by another beginning made of such wrappers, that is how they are read.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lora_jax.core.text import printable
from lora_jax.interop.key_map import ParameterMatch
from lora_jax.interop.peft.contents import WRAPPED, Contents
from lora_jax.interop.peft.tied_tables import is_head

# Parts of names that wrap a language model, and say nothing of which one it is.
_WRAPPERS = ("base_model", "language_model", "model", "module")


class Prefix(NamedTuple):
    """What names of a folder begin with, in the place of what the model's begin with; each ends with a dot."""

    theirs: str = ""
    ours: str = ""

    @property
    def is_of_wrappers(self) -> bool:
        """Return whether it says nothing of which model it is."""
        return all(part in _WRAPPERS for part in (self.theirs + self.ours).split(".")[:-1])

    def to_theirs(self, name: str) -> str:
        """Return the folder's name of what the model calls so."""
        return self.theirs + name.removeprefix(self.ours) if name.startswith(self.ours) else name

    def to_ours(self, name: str) -> str:
        """Return the model's name of what the folder calls so."""
        return self.ours + name.removeprefix(self.theirs) if name.startswith(self.theirs) else name

    def of_key_map(self) -> str:
        """Return the key map with the folder's names, as one writes it."""
        if not self.ours:
            return f"key_map.under(name={printable(self.theirs)!r})"
        return f"key_map.renamed({printable(self.ours)!r}, {printable(self.theirs)!r})"


def prefixes(contents: Contents, known: Iterable[str]) -> list[Prefix]:
    """Return all ways in which a folder's names become names of the model by another beginning; none if they are these.

    Numbers in names are never changed, and heads may be left out, since a tied one is no parameter.

    Args:
        known: the model's names of modules and tensors.
    """
    own = dict.fromkeys(known)
    names = [name.replace(WRAPPED, "") for name in contents.modules]
    names += [name for name, added in contents.biases.items() if added.any()]
    names = [name for name in (*names, *contents.rows, *contents.whole) if not is_head(name)]
    if not names or all(name in own for name in names):
        return []
    candidates = dict.fromkeys(_candidates(names[0], own))
    found = [one for one in candidates if all(n.startswith(one.theirs) and one.to_ours(n) in own for n in names)]
    return [one for one in found if len({one.to_theirs(name) for name in own}) == len(own)]


def the_only(found: list[Prefix]) -> Prefix:
    """Return the one way to read the names, if there is one and it is of wrappers; else the one that changes none."""
    return found[0] if len(found) == 1 and found[0].is_of_wrappers else Prefix()


def with_their_names(matches: Mapping[str, ParameterMatch], prefix: Prefix) -> dict[str, ParameterMatch]:
    """Return the matches with the folder's names."""
    return {
        path: match._replace(names={index: prefix.to_theirs(name) for index, name in match.names.items()})
        for path, match in matches.items()
    }


def names_of_parameters(matches: Mapping[str, ParameterMatch]) -> list[str]:
    """Return the names of all modules and tensors; of experts, that of the module which holds them."""
    found = []
    for match in matches.values():
        found += [*match.tensors().values()]
        found += [name.rpartition(".")[0] if match.entry.is_of_experts else name for name in match.names.values()]
    return found


def names_in_files(tensors: Iterable[str]) -> list[str]:
    """Return the names of tensors, and those of all modules that hold them."""
    found = dict.fromkeys(tensors)
    for name in [*found]:
        while name := name.rpartition(".")[0]:
            found[name] = None
    return [*found]


def _candidates(name: str, known: Iterable[str]) -> Iterable[Prefix]:
    """Yield all beginnings that make one name a known one, without numbers, and no longer than they have to be."""
    parts = name.split(".")
    for start in range(len(parts)):
        theirs, rest = "".join(f"{part}." for part in parts[:start]), ".".join(parts[start:])
        for other in known:
            if other != rest and not other.endswith(f".{rest}"):
                continue
            ours = other.removesuffix(rest)
            ours_parts, theirs_parts = ours.split(".")[:-1], parts[:start]
            is_shortest = theirs_parts[-1:] != ours_parts[-1:]
            if is_shortest and not any(part.isdigit() for part in (*theirs_parts, *ours_parts)):
                yield Prefix(theirs, ours)
