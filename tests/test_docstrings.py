"""Every public name says what it is, what it takes and gives, what it raises, how it is used, and where it is from."""

import docstring_rules as rules
import pytest
from docstring_rules import Public

import lora_jax as lora

# Names of methods of the literature, which name their papers.
SOURCED = {
    *("AdaLora", "Dora", "Ia3", "Loha", "Lokr", "Lora", "LoraFa", "RsLora", "Vera"),
    *("LossScale", "adapt_budget", "allocate_ranks", "compose", "input_scores", "lora_fa", "lora_fa_gradient"),
    *("lora_plus", "orthogonality", "prune", "riemannian", "to_lora"),
    *("bases.Fp8", "bases.Int8", "bases.Nf4", "initializers.gaussian", "initializers.kaiming"),
    *("losses.linear_cross_entropy", "recipes.dpo_loss", "recipes.preference_loss"),
    *("starts.corda", "starts.eva", "starts.loftq", "starts.lora_ga", "starts.olora", "starts.pissa"),
}
# Classes that are returned and not made: the example of what makes one shows it.
SHOWN_BY = {
    **{f"{kind}Adapter": kind for kind in ("AdaLora", "Dora", "Full", "Ia3", "Loha", "Lokr", "LoraFa", "Rows", "Vera")},
    "CompileReport": "compile_report",
    "Conversion": "to_lora",
    "Differences": "diff",
    "Ia3InputsAdapter": "Ia3",  # which is its like; files of HF PEFT have it
    "Inspection": "inspect",
    "LoraAdapter": "init",
    "bases.EightBits": "bases.Int8",
    "bases.HostArray": "bases.to_host",
    "bases.Nf4Weight": "bases.Nf4",
    "bases.QwixWeight": "bases.Packed",  # whose like it is, made of nodes of qwix, which need not be installed
    "recipes.Config": "recipes.read_config",
    "recipes.Result": "recipes.finetune",
}
NAMES = {of.name: of for of in rules.public_names()}


def test_every_public_name_is_documented():
    """Of each that lacks something this says what: mend its docstring."""
    found = {
        of.name: rules.lacking(of, sourced=of.name in SOURCED, exempt=of.name in SHOWN_BY) for of in NAMES.values()
    }
    assert {name: lacks for name, lacks in found.items() if lacks} == {}


def test_the_lists_are_of_what_there_is():
    assert SOURCED | {*SHOWN_BY, *SHOWN_BY.values()} <= {*NAMES}
    assert [name for name in SHOWN_BY.values() if ">>>" not in rules.documents(NAMES[name])[0]] == []
    assert [name for name in SHOWN_BY if ">>>" in rules.documents(NAMES[name])[0]] == []
    assert len(NAMES) > 300


# The rules themselves -------------------------------------------------------------------------------------------------


def scale(x: float, by: float = 1.0, *, offset: float = 0.0) -> float:
    if by == 0:
        raise lora.LoraError("by=0: give another number.")
    return x * by + offset


GOOD = """Multiply a number, as of Hu et al. 2021.

Args:
    x: the number.
    by: what it is multiplied by.
    offset: what is added.

Returns:
    The product.

Raises:
    LoraError: `by` is 0.

>>> scale(2.0, by=3.0)
6.0
"""


@pytest.mark.parametrize(
    ("old", "new", "lacks"),
    [
        ("", "", []),
        (GOOD, "", ["a summary in one line", "Args", "Returns:", "Raises:", "an example", "its paper"]),
        ("Multiply a number, as of Hu et al. 2021.", "Multiply a number, Hu et al. 2021", ["a summary in one line"]),
        ("    by: what it is multiplied by.\n", "", ["Args: x, by, offset (it has x, offset)"]),
        ("    x: the number.\n    by:", "    by: as x.\n    x:", ["Args: x, by, offset (it has by, x, offset)"]),
        ("    by: what it is multiplied by.\n    offset:", "    offset: 0.\n    by:", []),  # which is given by name
        ("    x: the number.\n    by:", "    x, by:", []),
        ("    offset:", "    plus:", ["Args: x, by, offset (it has x, by, plus)"]),
        ("Returns:", "Gives:", ["Returns:"]),
        ("Raises:", "Fails:", ["Raises:"]),
        (">>> scale(2.0, by=3.0)\n6.0\n", "", ["an example, >>>"]),
        (", as of Hu et al. 2021", "", ["its paper"]),
    ],
)
def test_each_rule_can_be_broken(old, new, lacks, monkeypatch):
    monkeypatch.setattr(scale, "__doc__", GOOD.replace(old, new))
    found = rules.lacking(Public("scale", scale), sourced=True)
    assert len(found) == len(lacks)
    assert all(one.startswith(said) for one, said in zip(found, lacks, strict=True)), found


def test_methods_and_fields():
    """Of a class the fields are documented, of an overriding method what is new; of both one example is enough."""
    assert [name for name, _ in rules.members(lora.KernelAxes)][:3] == ["sizes", "fans", "group"]
    assert "index" not in dict(rules.members(lora.KernelAxes))  # of tuples
    assert "init_a" not in dict(rules.members(lora.Lora))  # a field whose default is a function
    assert (
        rules.parameters(Public("TrainState.create", vars(lora.TrainState)["create"], lora.TrainState))[0]
        == "trainable"
    )
    init = Public("Vera.init", lora.Vera.init, lora.Vera)
    assert rules.entries(rules.said(init)["Args"]) == ["key", "w", "axes"]  # as of Rule.init
    assert "LoraError" in rules.said(init)["Raises"]
    assert rules.raises(init)
    assert not rules.raises(Public("Rows.init", lora.Rows.init, lora.Rows))
    assert rules.raises(Public("KeyMap.under", lora.key_maps.KeyMap.under, lora.key_maps.KeyMap))  # as KeyMap(...) does


def test_constants():
    assert rules.lacking(NAMES["key_maps.BERT"]) == []
    assert rules.lacking(Public("key_maps._VIT", object())) == ["a definition"]
    found, comments = rules.definitions(rules)
    assert comments["MODULES"] == ""
    assert "lacking" in found
