"""Files that are not trusted: all that is read of them has a bound, and no name in them does anything."""

import gc
import json
import math
import os
import re
import resource
import shutil
import struct
import sys
import time
from pathlib import Path
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_export import published
from test_peft import DATA, MLP, P, case, edit_config

import lora_jax as lora
from lora_jax import LoraError, bases
from lora_jax.cli import main
from lora_jax.core import untrusted
from lora_jax.core.patterns import first_match
from lora_jax.core.text import format_table, printable
from lora_jax.interop import safetensors_index
from lora_jax.interop.merge_checkpoint import read_tensors
from lora_jax.interop.model_config import model_facts
from lora_jax.interop.name_templates import NameTable, fill, literal, split
from lora_jax.interop.peft import module_patterns
from lora_jax.interop.peft.config import read_config
from lora_jax.interop.peft.load import load_by_module
from lora_jax.interop.peft.module_patterns import ModulePatterns
from lora_jax.key_maps import KeyMap, array, linear

AXES = lora.KernelAxes((), (0,), (1,))
INDEX = "model.safetensors.index.json"


def factors(rank, scale):
    return lora.LoraAdapter(jnp.ones((4, rank)), jnp.ones((rank, 4)), AXES, scale)


def peft_folder(folder, modules, **options):
    """A folder of LoRA of rank 1 for these modules, [4, 4]."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{P}{name}.lora_{x}.weight": np.ones((1, 4) if x == "A" else (4, 1), np.float32)
        for name in modules
        for x in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1} | options))
    return folder


def write_header(path, entries, nbytes=0):
    """A file of safetensors with this header, and zeros as its tensors."""
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))


def tensor(*shape, dtype="F32", at=0, nbytes=0):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}


# Each reader of a file: what it is called, and what reads it.
READERS = {
    "adapter_config.json": lambda folder: lora.load_peft(folder, case("lora")[0], MLP),
    "adapter_model.safetensors": lambda folder: lora.load_peft(folder, case("lora")[0], MLP),
    INDEX: bases.open_safetensors,
    "model-00001-of-00002.safetensors": bases.open_safetensors,
    "config.json": model_facts,
}


def readable(folder):
    """A folder with all of these files, and all of them sound."""
    published(folder, "lora", shards=2)
    (folder / "config.json").write_text('{"model_type": "llama", "time_step_limit": [0.0, Infinity]}')
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(DATA / "lora" / name, folder / name)
    return folder


# Files ----------------------------------------------------------------------------------------------------------------


def loop(path):
    path.with_name("other").symlink_to(path)
    path.symlink_to(path.with_name("other"))


NO_FILES = {
    "a named pipe": (os.mkfifo, "is a named pipe, expected a file"),
    "a folder": (Path.mkdir, "is a folder, expected a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
    "a looping link": (loop, "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_opened(name, kind, tmp_path):
    """A pipe would block, and a device never end."""
    folder = readable(tmp_path / "in")
    READERS[name](folder)
    (folder / name).unlink()
    make, says = NO_FILES[kind]
    make(folder / name)
    with pytest.raises(LoraError, match=rf"{name} {says}"):
        READERS[name](folder)


JSON = [
    (b"", "Expecting value"),
    (b"\xef\xbb\xbf{}", "BOM"),
    ('{"r": 1}'.encode("utf-16"), "utf-8"),
    (b'{"r": "\xff"}', "utf-8"),
    (b'{"r": 1, "r": 2}', "it says 'r' twice"),
    (b'{"r": ' + b"9" * 5000 + b"}", "4300 digits"),
    (b"[" * 100_000, "recursion"),
    (b'{"r": ' + b"[" * 30 + b"]" * 30 + b"}", "nested more than 16 levels deep"),
    (b'{"r": "\\ud800"}', r"holds '\\ud800', which is no text"),
    (b"[" + b"0," * (2**21 + 1) + b"0]", "values, expected at most"),
]


@pytest.mark.parametrize("name", ["adapter_config.json", INDEX, "config.json"])
@pytest.mark.parametrize(("text", "says"), JSON, ids=[says for _, says in JSON])
def test_wrong_json(name, text, says, tmp_path):
    folder = readable(tmp_path / "in")
    (folder / name).write_bytes(text)
    with pytest.raises(LoraError, match=rf"{name}.*{says}"):
        READERS[name](folder)


def test_numbers_that_are_none(tmp_path):
    """JSON has no infinities; configs of models have some, which are of no interest here."""
    for text, says in [("Infinity", "r is inf"), ("1e999", "r is inf"), ("NaN", "r is nan"), ("[1, NaN]", "r is nan")]:
        with pytest.raises(LoraError, match=f"a file: {says}, expected a finite number"):
            untrusted.parse_json(f'{{"r": {text}}}'.encode(), "a file")
    assert untrusted.parse_json(b'{"r": [Infinity]}', "a file", finite=False) == {"r": [math.inf]}


@pytest.mark.parametrize("name", ["adapter_config.json", INDEX, "config.json"])
def test_large_json_is_not_read(name, tmp_path):
    """A gigabyte that takes no room on disk."""
    folder = readable(tmp_path / "in")
    os.truncate(folder / name, 2**30)
    with pytest.raises(LoraError, match=rf"{name} has more than [\d,]+ bytes"):
        READERS[name](folder)


HEADERS = [
    ({"a": tensor(*[1] * 33, nbytes=4)}, 4, "'a' has 33 axes, expected at most 32"),
    ({"a" * 1001: tensor(1, nbytes=4)}, 4, "a name of 1,001 characters, expected at most 1000"),
    ({"a": tensor(0, 2**40)}, 0, r"'a' of shape \[0, 1099511627776\] has no entries"),
    ({str(i): tensor(2**20, 0) for i in range(65)}, 0, "would take 68,157,440 with zeros, expected at most 67,108,864"),
    ({"a": tensor(2**40, nbytes=4)}, 4, "cannot be read"),
    ({"a": tensor(1, nbytes=4)}, 8, "cannot be read"),
]


@pytest.mark.parametrize(("entries", "nbytes", "says"), HEADERS)
def test_wrong_headers(entries, nbytes, says, tmp_path):
    write_header(tmp_path / "model.safetensors", entries, nbytes)
    with pytest.raises(LoraError, match=rf"model.safetensors.*{says}"):
        bases.open_safetensors(tmp_path)


def test_a_header_that_is_longer_than_its_file(tmp_path):
    for length, nbytes in [(2**63, 8), (2**30, 100), (101, 100)]:
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b" " * nbytes)
        with pytest.raises(LoraError, match=r"model.safetensors cannot be read"):
            bases.open_safetensors(tmp_path)


def test_a_tensor_that_is_there_twice(tmp_path):
    """Readers take different ones of two."""
    entry = json.dumps(tensor(1, nbytes=4))
    header = f'{{"a": {entry}, "a": {entry}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(LoraError, match=r"it says 'a' twice|cannot be read"):
        bases.open_safetensors(tmp_path)


def test_more_tensors_than_any_model_has(tmp_path, monkeypatch):
    folder = readable(tmp_path / "in")
    monkeypatch.setattr(safetensors_index, "TENSORS", 3)
    with pytest.raises(LoraError, match=rf"{INDEX} has \d+ tensors, expected at most 3"):
        bases.open_safetensors(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(LoraError, match=r"has \d+ tensors, expected at most 3"):
        bases.open_safetensors(folder)


@pytest.mark.parametrize(
    "file",
    ["../a.safetensors", "/a.safetensors", "..", "a\\b.safetensors", "a\0.safetensors", f"{'a' * 250}.safetensors",
     f"{'é' * 130}.safetensors", ".safetensors", 3, None, ["a.safetensors"], "a.bin"],
)  # fmt: skip
def test_shards_that_are_no_names_of_files(file, tmp_path):
    folder = readable(tmp_path / "in")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(LoraError, match=r"expected names of safetensors files beside it"):
        bases.open_safetensors(folder)


@pytest.mark.parametrize("weights", [{}, {"weight_map": []}, {"weight_map": None}, [], 3])
def test_an_index_without_a_map(weights, tmp_path):
    folder = readable(tmp_path / "in")
    (folder / INDEX).write_text(json.dumps(weights))
    with pytest.raises(LoraError, match="is no index of safetensors: it has no weight_map"):
        bases.open_safetensors(folder)


def test_eight_bit_adapters(tmp_path):
    """Their numbers have scales that no adapter of PEFT holds."""
    folder = peft_folder(tmp_path / "in", ["q"])
    entries = {f"{P}q.lora_A.weight": tensor(1, 4, dtype="F8_E4M3", nbytes=4)}
    entries[f"{P}q.lora_B.weight"] = tensor(4, 1, at=4, nbytes=16)
    write_header(folder / "adapter_model.safetensors", entries, 20)
    with pytest.raises(LoraError, match=r"lora_A.weight' is of float8_e4m3fn, expected a floating"):
        load_by_module(folder)


def test_nothing_of_huge_axes_is_padded(tmp_path):
    """AdaLoRA leaves nothing of some modules; their other axes may not stand for memory that the file does not have."""
    folder = peft_folder(tmp_path / "in", ["m"], peft_type="ADALORA", rank_pattern={"m.lora_E": [False]})

    def write(n):
        entries = {f"{P}m.lora_A": tensor(0, n), f"{P}m.lora_B": tensor(4, 0), f"{P}m.lora_E": tensor(0, 1)}
        write_header(folder / "adapter_model.safetensors", entries)

    write(2**29)
    with pytest.raises(LoraError, match=r"lora_A' of shape \[0, 536870912\] has no entries"):
        load_by_module(folder)
    write(8)
    adapters, _, _ = load_by_module(folder)
    assert adapters["m"].kernel_shape() == (8, 4)


def test_products_that_no_memory_holds(tmp_path, monkeypatch):
    """Factors of some kilobytes can stand for a matrix of any size, or for as much padding."""
    folder = peft_folder(tmp_path / "in", ["q"])
    (folder / "adapter_config.json").write_text('{"peft_type": "LOKR"}')
    ones = np.ones((2**11, 2), np.float32)
    save_file({f"{P}q.lokr_w1": ones, f"{P}q.lokr_w2": ones}, folder / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=r"and as LoRA 17,592,202,821,632 entries, expected at most 4,294,967,296"):
        load_by_module(folder)
    monkeypatch.setattr("lora_jax.interop.peft.common_rank.ALWAYS", 100)
    monkeypatch.setattr("lora_jax.interop.peft.common_rank.GROWTH", 2)
    adapters = {"a": factors(1, 1.0), "b": factors(1, 1.0), "c": factors(1, 1.0)}
    key_map = KeyMap(*(linear(name, name) for name in "abc"))
    lora.save_peft(tmp_path / "out", adapters, key_map, profile="vllm")
    with pytest.raises(LoraError, match="largest one, 40, the factors would have 960 entries in the place of 336"):
        lora.save_peft(tmp_path / "out", adapters | {"a": factors(40, 1.0)}, key_map, profile="vllm")


def test_lists_of_a_config(tmp_path):
    folder = peft_folder(tmp_path / "in", ["q"], target_modules=["q"])
    for targets, says in [
        (["a" * 1001], "1 names of up to 1,001 characters"),
        (["a"] * 65537, "65,537 names of up to"),
    ]:
        edit_config(folder, target_modules=targets)
        with pytest.raises(LoraError, match=f"target_modules has {says}"):
            read_config(folder / "adapter_config.json")


# Patterns -------------------------------------------------------------------------------------------------------------


def as_in_peft(patterns, module, default):
    """What PEFT's own line finds, with Python's engine: for patterns that it runs in no time."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def test_names_match_as_in_peft():
    """All short names of a few characters, with and without what has a meaning in patterns."""
    random = Random(0)
    pieces = ["a", "b", "ab", ".", r"\.", "1", "-", r"\-", " ", "_", "é", r"\{", r"\$", ":"]
    hits = 0
    for _ in range(400):
        patterns = {}
        for i in range(random.randrange(1, 6)):
            middle = "".join(random.choices(pieces, k=random.randrange(4)))
            patterns[random.choice(["", "", "^"]) + middle + random.choice(["", "", "$"])] = i
        table = ModulePatterns(patterns)
        assert not table._expressions
        for _ in range(25):
            module = "".join(random.choices("aab.b..1- _é{$:x\n", k=random.randrange(7)))
            found = table.value_of(module, None)
            assert found == as_in_peft(patterns, module, None), (patterns, module)
            hits += found is not None
    assert hits > 500


def test_expressions_and_names_in_one_config():
    """The first one decides, whichever of the two it is."""
    patterns = {r".*\.(0|1)\.q": 1, "1.q": 2, "2.q": 3, "(k|v)": 4, "layers.3.v": 5, "^layers.4.k$": 6, ".*": 7}
    table = ModulePatterns(patterns)
    for module in ("layers.1.q", "1.q", "2.q", "layers.3.v", "layers.4.k", "layers.4.o", "q\n", "a.v\n", "x\ny.q"):
        assert table.value_of(module, 0) == as_in_peft(patterns, module, 0), module
    assert dict(table) == patterns
    assert len(table) == 7


@pytest.mark.parametrize("pattern", [r"(?=q)q", r"(?!k)q", r"(?<=a)q", r"(q)\1", r"(?P<n>q)(?P=n)", "q(", "q**"])
def test_what_re2_refuses_is_named(pattern, tmp_path):
    """Other engines take most of these: that they are refused shows that RE2 runs whatever is no name."""
    folder = peft_folder(tmp_path / "in", ["q"], rank_pattern={pattern: 1})
    with pytest.raises(LoraError) as caught:
        load_by_module(folder)
    assert f"adapter_config.json: rank_pattern has {pattern!r}, which is no regular expression of RE2" in str(
        caught.value
    )


def test_repeats_that_have_two_meanings():
    for pattern in ("a{,2}", "a{,}"):
        with pytest.raises(LoraError, match=re.escape(f"{pattern!r}, in which {{,n}} has two meanings")):
            ModulePatterns({pattern: 1})


def test_bounds_of_patterns(monkeypatch):
    for name, bound, patterns, says in [
        ("MOST", 2, ["a", "b", "c"], "rank_pattern has 3 patterns, expected at most 2"),
        ("LONGEST", 4, ["abcde"], "a pattern of 5 characters, expected at most 4"),
        ("INSTRUCTIONS", 10, ["(ab|cd|ef)"], "more than 10 instructions together"),
    ]:
        with monkeypatch.context() as small:
            small.setattr(module_patterns, name, bound)
            with pytest.raises(LoraError, match=says):
                ModulePatterns(dict.fromkeys(patterns, 1), "rank_pattern")
    monkeypatch.setattr(module_patterns, "STEPS", 100)
    table = ModulePatterns({"(a|b)": 1}, "rank_pattern")
    with pytest.raises(LoraError, match="rank_pattern: to match 1 patterns with 1 modules and more takes"):
        [table.value_of("x" * n, 0) for n in (1, 100)]


def calls_of(function):
    """The number of calls, of functions in Python and in C, that a call makes."""
    count = 0

    def note(frame, event, _):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # JAX has a callback for each collection
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def names_of(n):
    return [f"model.layers.{1000 + i}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(n)]


def match_entries(n):
    key_map = KeyMap(*(linear(name, name) for name in names_of(n)))
    return lambda: key_map.match(dict.fromkeys(names_of(n), (4, 4)))


def match_layers(n):
    shapes = dict.fromkeys((f"model/layers/{1000 + i}/self_attn/q_proj/kernel" for i in range(n)), (4, 4))
    return lambda: lora.key_maps.LLAMA.match(shapes)


def match_patterns(n):
    names = names_of(n)
    return lambda: [table.value_of(x, 0) for table in [ModulePatterns(dict.fromkeys(names, 1))] for x in names]


def match_rules(n):
    names = names_of(n)
    rules = {name.replace(".", "/"): 1 for name in names}
    return lambda: first_match(rules, [*rules])


@pytest.mark.parametrize("make", [match_entries, match_layers, match_patterns, match_rules])
def test_matching_is_linear(make):
    """The calls for 80 names more are twice those for 40 more, exactly."""
    _, few, more, most = (calls_of(make(n)) for n in (40, 40, 80, 160))  # the first one compiles what all share
    assert most - more == 2 * (more - few)


def test_loading_and_saving_are_linear(tmp_path, monkeypatch):
    """With a rank and a scale for each module, none of which is compiled: names are looked up."""
    monkeypatch.setattr(module_patterns, "_compiled", None)
    loads, saves = [], []
    for n in (20, 20, 40, 80):  # the first ones fill JAX's caches
        names = names_of(n)
        key_map = KeyMap(*(linear(name, name) for name in names))
        adapters = {name: factors(1 + i % 3, scale=1.0 + i) for i, name in enumerate(names)}
        params = {name: np.zeros((4, 4), np.float32) for name in names}
        folder = tmp_path / f"{len(loads)}"
        saves.append(calls_of(lambda f=folder, a=adapters, k=key_map: lora.save_peft(f, a, k)))
        loads.append(calls_of(lambda f=folder, p=params, k=key_map: lora.load_peft(f, p, k)))
        assert len(read_config(folder / "adapter_config.json").alpha_pattern) >= n - 3
    for _, few, more, most in (loads, saves):  # JAX's caches, which other tests fill, take some calls; squares are 4
        assert most - more < 2.2 * (more - few)


def test_expressions_are_compiled_once(monkeypatch):
    compiled = []
    original = module_patterns._compiled
    monkeypatch.setattr(module_patterns, "_compiled", lambda *args: compiled.append(args[1]) or original(*args))
    patterns = {f"(q|k){i}": i for i in range(7)} | {"plain": 7}
    table = ModulePatterns(patterns)
    assert [table.value_of(f"layers.{j}.q{i}", None) for j in range(20) for i in range(7)] == [*range(7)] * 20
    assert len(compiled) == 7


@pytest.mark.parametrize(
    "names",
    [["q", "a.q", "b.a.q"], ["a.b", "aXb", "c.a.b"], ["m.{", "m.{0}", "m.(", "m.+"], ["a.q", "b.q"], ["1.q", "11.q"]],
)
def test_patterns_that_are_written_fit_no_other_module(names, tmp_path):
    """By PEFT's own rule each module has its own rank and scale."""
    adapters = {name: factors(1 + i, scale=2.0 + i) for i, name in enumerate(names)}
    for order in (names, names[::-1]):
        key_map = KeyMap(*(linear(literal(name), literal(name)) for name in order))
        lora.save_peft(tmp_path / "out", {name: adapters[name] for name in order}, key_map)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        for name, adapter in adapters.items():
            rank = as_in_peft(config["rank_pattern"], name, config["r"])
            assert rank == adapter.a.shape[-1], (name, config)
            assert as_in_peft(config["alpha_pattern"], name, config["lora_alpha"]) == adapter.scale * rank
        found, _ = lora.load_peft(tmp_path / "out", {name: np.zeros((4, 4), np.float32) for name in names}, key_map)
        assert {name: adapter.scale for name, adapter in found.items()} == {n: a.scale for n, a in adapters.items()}


# Names ----------------------------------------------------------------------------------------------------------------

ODD = [
    *("m.{", "m.}", "m.{}", "m.{0}", "m.{i}", "m.{x.y}", "m.{{i}}", "m.%s", "m.\\d", "m.\\", "m.$x$", "m.(", "m.*"),
    *("m.[bold]x[/bold]", "m.[link=a]b", "m.:smile:", "m.é", "m. x", "m.'\"", "m./../x"),
]
FORGED = "q\x1b]0;owned\x07\x1b[2J\nFORGED\r\x9b1m\x7f\u202e\u2028\u2066"


def test_templates():
    assert split("a.{i}.b.{j}") == ["a.", "i", ".b.", "j", ""]
    assert split("{{i}}{") == ["{i}{"]
    assert fill("a.{i}{{}}%s\\1", {"i": "7"}) == "a.7{}%s\\1"
    for name in ODD:
        assert split(literal(name)) == [name]


def test_the_first_template_counts():
    """Against all of them, one after the other."""
    random = Random(0)
    for _ in range(200):
        templates = ["".join(random.choices(["a", "/", "1", "{i}", "{{", "b"], k=4)) for _ in range(6)]
        templates = [t for t in templates if split(t).count("i") < 2]
        table = NameTable(templates)
        for _ in range(20):
            name = "".join(random.choices("a/1b2{", k=random.randrange(3, 6)))
            patterns = [r"\d+".join(map(re.escape, split(template)[::2])) for template in templates]
            slow = next((i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, name)), None)
            found = table.first(name)
            assert (None if found is None else found[0]) == slow
            assert found is None or fill(templates[found[0]], found[1]) == name


def test_a_key_map_with_braces():
    key_map = KeyMap(linear("h.{i}/{{q}}", "m.{{{i}}}.{x y}"), array("s/{{i}}", "s"))
    found = key_map.match({"h.3/{q}": (4, 4), "s/{i}": (4,)})
    assert found["h.3/{q}"].names == {(): "m.{3}.{x y}"}
    assert key_map.stacked().entries[1] == key_map.entries[1]
    with pytest.raises(LoraError, match="unknown are i"):
        linear("a/{i}/{i}", "a.{i}")


@pytest.mark.parametrize("name", ODD)
def test_names_go_through_as_they_are(name, tmp_path, capsys):
    """Read, printed, converted and read again; drawn, merged and planned."""
    folder = peft_folder(tmp_path / "in", [name])
    assert list(load_by_module(folder)[0]) == [name]
    assert main(["inspect", str(folder)]) == 0
    assert f"\n{name}  " in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["weight"] == name
    assert main(["convert", str(folder), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == {name: 1}
    assert list(load_by_module(tmp_path / "out")[0]) == [name]
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": np.zeros((4, 4), np.float32)}, tmp_path / "base" / "model.safetensors")
    assert main(["merge", str(tmp_path / "base"), str(folder), str(tmp_path / "merged")]) == 0
    assert f"\n{name}.weight  " in capsys.readouterr().out
    assert main(["diff", *(str(tmp_path / f) for f in ("base", "merged", "extracted")), "--rank", "1"]) == 0
    assert f"\n{name}  " in capsys.readouterr().out
    assert list(load_by_module(tmp_path / "extracted")[0]) == [name]


def assert_harmless(text):
    """No character that a terminal obeys but the breaks of lines, none of which is the file's."""
    assert all(line.isprintable() for line in text.split("\n")), repr(text)
    assert "\nFORGED" not in text


def test_control_characters_are_shown(tmp_path, capsys):
    """Whatever the command prints of names: tables, results, problems, errors."""
    folder = peft_folder(tmp_path / "in", [FORGED])
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{FORGED}.weight": np.zeros((4, 4), np.float32)}, base / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    save_file({f"{FORGED}2.weight": np.zeros((4, 3), np.float32)}, other / "model.safetensors")
    whole = peft_folder(tmp_path / "whole", [FORGED], modules_to_save=[FORGED])
    tensors = {f"{P}{FORGED}.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}
    save_file(tensors | {f"{P}{FORGED}.weight": np.ones((4, 4), np.float32)}, whole / "adapter_model.safetensors")
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    edit_config(wrong, r=2)
    outputs = (tmp_path / f"out{i}" for i in range(9))
    shown = printable(FORGED)
    for arguments in (
        ["inspect", folder],
        ["inspect", folder, "--json"],
        ["inspect", wrong],
        ["verify", whole],
        ["verify", folder, "--base", other],
        ["merge", base, folder, next(outputs)],
        ["merge", other, folder, next(outputs)],
        ["convert", folder, next(outputs)],
        ["convert", whole, next(outputs), "--to", "vllm"],
        ["compose", whole, next(outputs)],
        ["compose", f"{folder}:2", next(outputs)],
        ["plan", base, "--modules", "(?s).*", "--rank", "1"],
        ["plan", base, "--modules", "(?s).*", "--rank", "5"],
        ["plan", base, "--modules", "x"],
        ["diff", base, other, next(outputs), "--rank", "1"],
    ):
        main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        for text in printed:
            assert_harmless(re.sub(r"\r?\x1b\[[\d?;]*[A-Za-z]", "", text) if arguments[0] == "merge" else text)
        if arguments[0] in ("inspect", "plan", "verify") and "--json" not in arguments:
            assert shown in "".join(printed)


@pytest.mark.parametrize(
    ("character", "escape"),
    [
        *(("\x1b", r"\x1b"), ("\n", r"\n"), ("\x7f", r"\x7f"), ("\x9b", r"\x9b"), ("\u202e", r"\u202e")),
        *(("\u2028", r"\u2028"), ("\u2066", r"\u2066"), ("\u200b", r"\u200b"), ("\ud800", r"\ud800")),
    ],
)
def test_escapes(character, escape):
    assert printable(f"a{character}é 漢") == f"a{escape}é 漢"
    assert format_table(["name"], [[f"a{character}"]]).endswith(f"a{escape}")
    error = LoraError(f"a{character}b")
    assert str(error) == (f"a{escape}b" if character != "\n" else "a\nb")
    assert error.args == (str(error),)


def test_pictures_show_names_as_they_are(tmp_path, capsys, monkeypatch):
    """Also those that Matplotlib would take for mathematics; and of many weights the first ones."""
    folder = peft_folder(tmp_path / "in", ["$\\frac{$", "q\x1b[2J", "z" * 500])
    monkeypatch.setattr("lora_jax.cli.output.BARS", 2)
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_names_that_are_like_very_many(monkeypatch):
    """Only some are compared, and the nearest are among them."""
    names = [f"model.layers.{i}.mlp.up" for i in range(3000)] + ["model.layers.7.self_attn.q_proj"]
    compared = []
    original = lora.core.paths.difflib.SequenceMatcher
    monkeypatch.setattr(
        "lora_jax.core.paths.difflib.SequenceMatcher", lambda *args: compared.append(args) or original(*args)
    )
    assert lora.core.paths.nearest("layers.7.self_attn.q_proj", names, n=1) == ["model.layers.7.self_attn.q_proj"]
    assert len(compared) == 1000


def test_names_of_adapters_are_said(tmp_path):
    """One is left out, as PEFT does; of several, each of which would be the folder's, none is chosen."""
    folder = peft_folder(tmp_path / "in", ["q"], target_modules=["q"])
    pair = {x: np.ones((1, 4) if x == "A" else (4, 1), np.float32) for x in "AB"}
    save_file({f"{P}q.lora_{x}.default.weight": pair[x] for x in "AB"}, folder / "adapter_model.safetensors")
    assert [*load_by_module(folder)[0]] == ["q"]
    both = {f"{P}q.lora_{x}.{name}.weight": pair[x] for x in "AB" for name in ("one", "\x1btwo")}
    save_file(both, folder / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=r"adapters of 2 names, .*'one'.*selected_adapters=\["):
        load_by_module(folder)


# Mutated files --------------------------------------------------------------------------------------------------------

VALUES = [
    *(None, True, -1, 0, 3, 1e308, 10**400, 2**70, math.nan, math.inf, [], {}, [[]], [[[[]]]], {"a": {}}, ["q"] * 50),
    *("x", "", "../../x", "/etc/passwd", FORGED, "é" * 300, "a" * 5000, "q(", r"(q)\1", "(?=q)", "a{,3}", ".*", "^q$"),
    *("{i}", "%s", [1, "a", None], {FORGED: 1}, {"(a|b)": 2}, {"q": 1.5}),
]


def places(node, found):
    """All containers of a tree, with the keys or positions in them."""
    for key, child in [*node.items()] if isinstance(node, dict) else [*enumerate(node)]:
        found.append((node, key))
        if isinstance(child, dict | list):
            places(child, found)
    return found


def mutated_json(random, text):
    """A JSON text with something changed: values, names, nesting, bytes."""
    node = json.loads(text)
    where, key = random.choice(places(node, []))
    kind = random.randrange(9)
    if kind < 3:
        where[key] = random.choice(VALUES)
    elif kind == 3:
        del where[key]
    elif kind == 4 and isinstance(where, dict):
        where[random.choice(["new", FORGED, "", "r", "weight_map", "a" * 2000, "{i}", "x/y"])] = random.choice(VALUES)
    elif kind == 5:
        for _ in range(random.choice([1, 5, 50, 500])):
            where[key] = random.choice([[where[key]], {"a": where[key]}])
    changed = json.dumps(node).encode()
    if kind == 6 and b"{" in changed:  # something twice
        changed = changed.replace(b"{", b'{"r": 1, "r": 2, ', 1)
    elif kind == 7:
        at = random.randrange(len(changed))
        changed = random.choice(
            [changed[:at], changed[at:], changed + changed, changed[:at] + bytes(99) + changed[at:]]
        )
    elif kind == 8:
        changed = bytearray(changed)
        for _ in range(random.randrange(1, 4)):
            changed[random.randrange(len(changed))] = random.randrange(256)
    return random.choice([b"", b"", b"", b"", b"", b"\xef\xbb\xbf"]) + bytes(changed)


def mutate_config(random, folder):
    name = random.choice(
        ["lora", "adalora_trained", "dora", "loha", "lokr", "vera", "rslora_patterns", "llama_tokens", "pissa"]
    )
    path = folder / "adapter_config.json"
    path.write_bytes(mutated_json(random, (DATA / name / path.name).read_bytes()))
    config = read_config(path)
    for module in ("lin0", "model.layers.0.self_attn.q_proj", FORGED, "a" * 1000):
        assert config.rank_of(module) > 0 or config.format.may_be_empty
        assert math.isfinite(config.scale_of(module))
        config.tokens_of(module)


def mutate_index(random, folder):
    text = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(mutated_json(random, text))
    try:
        for one in read_tensors(folder).values():
            assert one.size >= 0
    finally:
        (folder / INDEX).write_bytes(text)


def mutate_model_config(random, folder):
    facts = {"model_type": "gpt2", "architectures": ["A"], "rope": {"factor": 1.5, "short": [1.0, 2.0]}}
    (folder / "config.json").write_bytes(mutated_json(random, json.dumps(facts)))
    model_facts(folder)


def mutate_names(random, folder):
    """Tensors of adapters under other names, of other shapes, or twice."""
    ends = [
        *("lora_A.weight", "lora_B.weight", "lora_A", "lora_E", "lora_A.default.weight", "lora_embedding_A", ""),
        *("weight", "bias", "lora_magnitude_vector", "base_layer.weight", "token_adapter.trainable_tokens_delta"),
    ]
    names = [
        "q",
        "a.q",
        FORGED,
        "m.{i}",
        "m.%d",
        "m.\\",
        "",
        ".",
        "..",
        "a" * 1001,
        "a." * 400,
        "é",
        "q" + "\n",
        *ODD[:5],
    ]
    one = random.choice(names)
    modules = [one, random.choice(names)]
    sizes = [0, 1, 1, 1, 4, 4]
    tensors = {}
    for module in modules:
        for x in "AB":
            shape = (1, 4) if x == "A" else (4, 1)
            end = f"lora_{x}.weight"
            if random.random() < 0.15:
                shape = tuple(random.choices(sizes, k=random.randrange(5)))
            if random.random() < 0.15:
                end = random.choice(ends)
            prefix = P if random.random() < 0.97 else random.choice(["", "x.", P[:-1]])
            tensors[f"{prefix}{module}.{end}"] = np.ones(shape, random.choice([np.float32, np.float32, np.float16]))
    save_file(tensors, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": {random.choice(ODD + names): 1}}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    adapters, _, key_map = load_by_module(folder)
    assert list(adapters)
    assert all(
        split(entry.path)[0] in {f"{P}{name}".removeprefix(P) for name in adapters} for entry in key_map.entries[:1]
    )


MUTATIONS = {
    mutate_config: (150, 9000),
    mutate_index: (60, 5000),
    mutate_model_config: (60, 2000),
    mutate_names: (60, 4000),
}


def run_mutations(mutate, cases, folder):
    """Each ends well or with the library's own error, which shows no name as it is."""
    random, ends = Random(cases), [0, 0]
    readable(folder)
    for i in range(cases):
        start = time.perf_counter()
        try:
            mutate(random, folder)
            ends[0] += 1
        except LoraError as error:
            assert_harmless(str(error))
            ends[1] += 1
        assert time.perf_counter() - start < 10, f"case {i} took too long"
    return ends


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutations(mutate, tmp_path):
    assert min(run_mutations(mutate, MUTATIONS[mutate][0], tmp_path / "in")) > MUTATIONS[mutate][0] / 20


@pytest.mark.slow
@pytest.mark.parametrize("mutate", MUTATIONS)
def test_many_mutations(mutate, tmp_path, share):
    """20,000 of them together, and a fifth of these in CI, in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = share(MUTATIONS[mutate][1])
    assert min(run_mutations(mutate, cases, tmp_path / "in")) > cases / 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"
