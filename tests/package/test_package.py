"""The wheel and the sdist in dist/, as `make package` builds them: what they hold, what they say, and that they work.

These run in an environment of their own, without JAX: what is tested is installed into empty ones.
"""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = ROOT / "lora_jax/core/version.py"
RELATIVE = re.compile(r"\[[^\]]*\]\((?!https?://)[^)]*\)")
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def only(pattern: str, folder: Path = ROOT / "dist") -> Path:
    [found] = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel():
    return zipfile.ZipFile(only("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora_jax").rglob("*") if path.is_file()}
    assert set(names) == {name for name in own if "__pycache__" not in name}
    assert "lora_jax/py.typed" in names


def test_the_sdist_holds_what_the_tests_need():
    """All that git tracks."""
    with tarfile.open(only("*.tar.gz")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(listed.splitlines()) - names == set()
    assert not {name for name in names if "__pycache__" in name or name.startswith((".venv", "dist", "docs/_build"))}


def test_the_sdist_builds_the_same_wheel(tmp_path):
    """`python -m build` made the wheel from the sdist; this one is made from the tree."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    assert only("*.whl", tmp_path).read_bytes() == only("*.whl").read_bytes()


def test_the_description_has_no_link_that_leads_nowhere(metadata):
    text = metadata.get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert not RELATIVE.findall(BLOCK.sub("", text))
    assert RELATIVE.search(readme), "README.md has links to files, which is what is taken out"
    assert BLOCK.findall(text) == BLOCK.findall(readme), "code is left as it is"
    paths = re.findall(r"\]\(((?!https?:|#)[^)#]+\.(?:md|py))", readme)
    assert [path for path in paths if f"`{path}`" not in text] == []


def test_what_the_metadata_say(metadata):
    assert metadata["Name"] == "lora_jax"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The lora_jax developers"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "lora" in metadata["Keywords"].split(",")
    assert metadata["Version"] == re.search(r'__version__ = "(.+)"', VERSION.read_text())[1]


USE = """
import sys, lora_jax as lora, jax, jax.numpy as jnp
heavy = ["torch", "h5py", "flax", "orbax", "safetensors", "tokenizers", "rich", "tyro", "matplotlib", "pyarrow"]
assert not [name for name in heavy if name in sys.modules]
params = {"w": jnp.ones((4, 4))}
fn = lambda params, x: x @ params["w"]
plan = lora.plan(fn, params, jnp.ones((2, 4)), rules={"w": lora.Lora(rank=2)})
adapters = lora.init(jax.random.key(0), params, plan)
print(lora.__file__, lora.lora_apply(fn)(params, adapters, jnp.ones((2, 4))).sum())
"""


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An environment with the wheel and what it asks for, and a way to run its programs outside of the tree."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)

    def run(program, *arguments):
        done = subprocess.run([folder / "bin" / program, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", only("*.whl"))
    return run


def test_the_wheel_works_in_an_empty_environment(empty):
    where, total = empty("python", "-c", USE).split()
    assert "site-packages" in where
    assert total == "32.0"


def test_the_command_works_after_its_extra(empty):
    empty("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{only('*.whl')}[cli]")
    commands = empty("lora-jax", "--help")
    assert all(name in commands for name in ("train", "merge", "convert", "inspect"))
