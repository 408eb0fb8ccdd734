"""The names that PEFT gives to the factors of experts, several of which are parameters of one module."""

from collections.abc import Mapping, Sequence

from lora_jax.interop.key_map import ParameterMatch


def names_in_files(matches: Mapping[str, ParameterMatch], targets: Sequence[str]) -> dict[str, str]:
    """Return what PEFT calls the factors of each experts' parameter: its module, with a `.base_layer` for each wrapper.

    PEFT wraps such a module once for each of its parameters that is a target, the first one innermost. The name of a
    wrapper does not tell its parameter: the order of the entries in the key map does.

    Args:
        targets: `target_parameters`, whole names or their ends.
    """
    modules: dict[str, dict[str, None]] = {}
    for match in sorted(matches.values(), key=lambda match: match.order):
        for name in match.names.values() if match.entry.is_of_experts else ():
            if any(name == target or name.endswith(f".{target}") for target in targets):
                modules.setdefault(name.rpartition(".")[0], {})[name] = None
    return {
        name: module + ".base_layer" * (len(names) - 1 - i)
        for module, names in modules.items()
        for i, name in enumerate(names)
    }
