"""The rules of the house: which room may import which, no circles, no long files, and nothing public by accident."""

import re

import architecture
import pytest

import lora_jax as lora


def test_the_house_keeps_its_rules():
    assert architecture.problems() == []


def test_only_the_public_names_are_listed():
    assert dir(lora) == sorted([*lora.__all__, "__version__"])
    assert all(hasattr(lora, name) for name in lora.__all__)


def test_the_pages_name_files_that_exist():
    for page in ("docs/architecture.md", "CONTRIBUTING.md"):
        text = (architecture.ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/.])(?:\w+/)+(?:\w+\.\w+)?", text)
        assert named
        own = [name for name in named if "my_" not in name]
        assert [n for n in own if not any((f / n).exists() for f in (architecture.ROOT, architecture.PACKAGE))] == []


GOOD = {"__init__": "from house.core.axes import A", "core/__init__": "", "core/axes": "A = 1", "core/paths": "A = 1"}
GOOD |= {"adapters/lora": "from house.core import axes", "bases/nf4": "from house.interop import key_map"}
GOOD |= {"interop/key_map": "", "interop/architectures": "", "interop/peft/load": "from house.interop import key_map"}
GOOD |= {
    "starts": '"""Starts."""\nfrom house.core.axes import A\n__all__ = ["A"]',
    "training/step": "import house.core.axes",
}


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("core/axes", "A = 2", None),
        ("core/axes", "from house.adapters import lora", "core.axes imports adapters.lora, and core may not import"),
        ("core/axes", "from ..adapters.lora import A", "core.axes imports adapters.lora"),
        ("core/axes", "def f():\n    import house.adapters.lora", "core.axes imports adapters.lora"),
        ("core/axes", "if TYPE_CHECKING:\n    from house.adapters.lora import A", "core.axes imports adapters.lora"),
        ("core/paths", "from house import A", "core.paths imports __init__, and core may not import the top"),
        ("interop/key_map", "from .peft.load import A", "interop may not import interop/peft"),
        ("training/step", "from house.interop.peft import load", "training may not import interop/peft"),
        ("bases/nf4", "from house.interop import architectures", "bases may not import interop"),
        ("core/axes", "from house.core.axes import A", "core.axes imports core.axes: a circle"),
        ("core/axes", "\n" * 401, "core.axes has 401 lines, at most 400"),
        ("starts", "def pissa(): ...", "starts defines something"),
        ("tools", "", "tools belongs to no room"),
    ],
)
def test_each_rule_can_be_broken(tmp_path, file, text, problem):
    for name, source in (GOOD | {file: text}).items():
        path = tmp_path / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = architecture.problems(tmp_path / "house")
    assert not found if problem is None else any(problem in one for one in found), found


def test_the_core_is_read_in_one_sitting():
    """950 lines without the vocabulary of operands, and at most 20 nouns to learn."""
    core = [architecture.PACKAGE / name for name in architecture.READING if name != "core/operand.py"]
    assert len(core) == 8
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in core) <= 950
    page = (architecture.ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    nouns = page[page.index("## The nouns") : page.index("## Two calls")]
    assert 10 < nouns.count("\n| ") - 1 <= 20
