"""Nothing is lost and nothing foreign is touched: whoever writes, whenever it is killed, whatever the disk does."""

import contextlib
import errno
import fcntl
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_export import published
from test_peft import DATA
from writers import OTHERS, WRITERS, checkpoints, state

import lora_jax as lora
from lora_jax import LoraError
from lora_jax.checkpoints import atomic_dir, reading
from lora_jax.cli import main

REPLACING = [name for name, writer in WRITERS.items() if writer.foreign]
ALL = [*WRITERS]
PATIENCE = 120  # seconds for a process to say its next word, on a machine however busy
ALONE = [name for name in ALL if name != "loralib"]  # which is the writer of "peft" with one file


def some(names, inner):
    """All of them in CI, and one in the inner loop."""
    return [pytest.param(name, marks=() if name in inner else pytest.mark.slow) for name in names]


def contents(folder):
    """Every file below a folder, hidden ones too: `{path: bytes}`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def place(tmp_path):
    """A folder with things of others beside the target."""
    for name in ("README.md", "out.old", ".out.lora_jax-notes", "outer/model.bin"):
        (tmp_path / "place" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "place" / name).write_text(f"mine: {name}")
    return tmp_path / "place"


def beside(place):
    """What is beside the target, but for the model that is merged into."""
    return {n: data for n, data in contents(place).items() if not n.startswith(("out/", "model/")) and n != "out"}


# What is replaced -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(REPLACING, ["peft", "adapters"]))
def test_what_others_wrote_stays(name, place):
    """Refused by its name, before any work; and once it is moved away, the next save is as ever."""
    writer, target, before = WRITERS[name], place / "out", beside(place)
    writer.save(target, 1)
    for path in OTHERS:
        (target / path).parent.mkdir(exist_ok=True)
        (target / path).write_text("mine")
        found = contents(target)
        top = target / Path(path).parts[0]
        named = path if top.name == "arrays" and name in ("adapters", "base") else top.name
        says = rf"{target} holds '{named}', which is no part of .*all is left as it is. Move it"
        with pytest.raises(LoraError, match=says):
            writer.save(target, 2)
        assert contents(target) == found
        (target / path).unlink()
        if top.is_dir() and not any(top.iterdir()):
            top.rmdir()
    writer.save(target, 2)
    assert writer.read(target) == 2
    assert beside(place) == before
    shutil.rmtree(target)
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "thesis.tex").write_text("mine")
    with pytest.raises(LoraError, match=rf"{target} exists and holds no .*; it is left as it is. It has 'deep'"):
        writer.save(target, 3)
    assert contents(target) == {"deep/thesis.tex": b"mine"}


def test_one_format_does_not_replace_another(tmp_path):
    for first in REPLACING:
        target = tmp_path / first
        WRITERS[first].save(target, 1)
        for second in REPLACING:
            if second != first:
                with pytest.raises(LoraError, match="it is left as it is"):
                    WRITERS[second].save(target, 2)
        assert WRITERS[first].read(target) == 1


def test_a_file_that_comes_in_the_very_moment_stays(place, monkeypatch):
    """It is written into the folder between the last look at it and the exchange."""
    writer, target, exchange = WRITERS["peft"], place / "out", atomic_dir._exchange

    def late(new, folder):
        (target / "README.md").write_text("mine")
        return exchange(new, folder) if possible else False

    for possible in (True, False):  # noqa: B007 (`late` reads it)
        shutil.rmtree(target, ignore_errors=True)
        writer.save(target, 1)
        with monkeypatch.context() as patch:
            patch.setattr(atomic_dir, "_exchange", late)
            writer.save(target, 2)
        assert (target / "README.md").read_text() == "mine"
        assert writer.read(target) == 2
        assert atomic_dir.leftovers(target) == []


@pytest.mark.parametrize("name", some(ALL, ["peft"]))
def test_through_a_link(name, place):
    writer, real, link = WRITERS[name], place / "real", place / "link"
    writer.save(real, 1)
    link.symlink_to("real")
    for v in (2, 3):
        writer.save(link, v)
        assert link.is_symlink()
        assert writer.read(real) == v
    broken = place / "broken"
    broken.symlink_to("away/deep")
    writer.save(broken, 4)
    assert broken.is_symlink()
    assert writer.read(place / "away" / "deep") == 4
    assert not [path for path in place.rglob(".*lora_jax-*") if path.is_dir()]


def test_the_rights_of_a_folder_stay(tmp_path):
    WRITERS["peft"].save(tmp_path / "out", 1)
    (tmp_path / "out").chmod(0o750)
    WRITERS["peft"].save(tmp_path / "out", 2)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


# What killed and living processes have beside a target ----------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", some(REPLACING, ["peft"]))
def test_saving_again(name, exchange, place, monkeypatch):
    """With and without a system that exchanges two names in one step."""
    writer, target, before = WRITERS[name], place / "out", beside(place)
    if not exchange:
        monkeypatch.setattr(atomic_dir, "_exchange", lambda *_: False)
    for v in (1, 2, 3):
        writer.save(target, v)
        assert writer.read(target) == v
    assert beside(place) == before


def left_by_a_killed_process(target, name, half="adapter_config.json"):
    work = target.with_name(f".{target.name}.lora_jax-{name}")
    (work / "new").mkdir(parents=True)
    (work / "new" / half).write_text("half")
    (work / "lock").touch()
    return work


@pytest.mark.parametrize("name", some(REPLACING, ["peft"]))
def test_killed_between_two_renames(name, place, monkeypatch):
    """What was there is whole under the name in the error, and the next save puts it back before all else."""
    writer, target, before = WRITERS[name], place / "out", beside(place)
    writer.save(target, 1)
    half = {"peft": "adapter_config.json", "loralib": "lora.safetensors"}.get(name, "commit_success.txt")
    work = left_by_a_killed_process(target, "00000001", half)
    target.rename(work / "old0")
    assert writer.read(work / "old0") == 1
    if name in ("adapters", "base"):
        with pytest.raises(LoraError, match=rf"interrupted: rename {work / 'old0'} to {target}"):
            writer.read(target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(LoraError, match="No space left"):
            writer.save(target, 2)
    assert writer.read(target) == 1
    writer.save(target, 2)
    assert writer.read(target) == 2
    assert beside(place) == before


def test_what_a_writer_left_half_written_does_not_reach_the_target(place):
    """Such as the file that safetensors writes to before it takes its name."""
    writer, target, before = WRITERS["peft"], place / "out", beside(place)
    writer.save(target, 1)
    work = left_by_a_killed_process(target, "0000000d")
    (work / "part").mkdir()
    (work / "part" / ".tmpXPVTF6").write_text("half")
    for v in (2, 3):
        writer.save(target, v)
        assert writer.read(target) == v
        assert not (target / ".tmpXPVTF6").exists()
    assert beside(place) == before


def test_what_a_living_process_has_is_left_alone(place):
    writer, target = WRITERS["peft"], place / "out"
    dead, alive = (left_by_a_killed_process(target, name) for name in ("0000000d", "0000000a"))
    with (alive / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer.save(target, 1)
        assert atomic_dir.leftovers(target) == [alive]
        assert (alive / "new" / "adapter_config.json").read_text() == "half"
    writer.save(target, 2)
    assert atomic_dir.leftovers(target) == []
    assert not dead.exists()
    assert (place / ".out.lora_jax-notes").read_text().startswith("mine")


@pytest.mark.parametrize("name", some(ALL, ["peft"]))
def test_an_interrupted_save_leaves_nothing(name, place, monkeypatch):
    """Ctrl-C at any of the points at which the disk is waited for."""
    writer, target = WRITERS[name], place / "out"
    writer.save(target, 1)
    before = contents(place)
    for at in range(3):
        calls = []

        def interrupt(*_, at=at, calls=calls):
            calls.append(at)
            if len(calls) > at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, LoraError):
            patch.setattr(os, "fsync" if name != "run" else "rename", interrupt)
            writer.save(target, 2)
        assert not [path for path in place.rglob(".out.lora_jax-*") if path.is_dir()]
        if writer.read(target) == 1:
            assert contents(place) == before or name == "run"  # whose next start removes the rest
        else:
            break  # it was complete by then
    writer.save(target, 3)
    assert writer.read(target) == 3


def test_a_reader_never_sees_two_saves(place, monkeypatch):
    """It begins again where a save comes between the files that it reads."""
    writer, target = WRITERS["peft"], place / "out"
    writer.save(target, 1)
    saved = []

    def read():
        config = (target / "adapter_config.json").read_text()
        if len(saved) < 3:
            saved.append(writer.save(target, len(saved) + 2))
        return config, writer.read(target)

    config, found = reading.read_whole(target, read)
    assert found == 4
    assert f'"lora_alpha": {4 * 2}' in config
    monkeypatch.setattr(reading, "TRIES", 3)
    with pytest.raises(LoraError, match="replaced all the time"):
        reading.read_whole(target, lambda: writer.save(target, 9))


# Disks that are full, and paths that cannot be written ----------------------------------------------------------------


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_the_disk(monkeypatch):
    """Let the last step fail, after all has been written."""
    for name in ("rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, full_disk)


@pytest.mark.parametrize("name", some([name for name in ALL if name != "run"], ["peft", "adapters"]))
def test_a_full_disk(name, place, monkeypatch):
    """An error that says what to do, and all as it was."""
    writer, target = WRITERS[name], place / "out"
    writer.save(target, 1)
    before = contents(place)
    fill_the_disk(monkeypatch)
    says = rf"{target}(/2)? was not written, and what was there is untouched: .*No space left.*; .*make room"
    with pytest.raises(LoraError, match=says):
        writer.save(target, 2)
    assert contents(place) == before
    monkeypatch.undo()
    writer.save(target, 2)
    assert writer.read(target) == 2


PLACES = {
    "a file": "is no folder; it is left as it is",
    "below a file": "cannot be made, as .*file is a file",
    "long name": "File name too long.*take a shorter one",
    "long parent": "File name too long.*take a shorter one",
    "no character": "embedded null",
    "no right": "there is no right to write|was not written",
    "no place": "was not written|cannot be written|cannot be made",
}


def at(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    return {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "a" / "b",
        "long name": tmp_path / ("n" * 300),
        "long parent": tmp_path / ("n" * 300) / "a",
        "no character": tmp_path / "a\0b",
        "no right": Path("/sys/lora_jax/a") if os.geteuid() == 0 else tmp_path / "locked" / "a",
        "no place": Path("/proc/lora_jax"),
    }[name]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", some(ALL, ["peft", "run"]))
def test_where_nothing_can_be_written(name, where, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    target = at(where, tmp_path)

    def save():
        if name != "merge":
            return WRITERS[name].save(target, 1)
        published(tmp_path / "base", "lora")
        return lora.merge_checkpoint(tmp_path / "base", DATA / "lora", target)

    says = ".*" if name in ("run", "file") else PLACES[where]
    if name == "file" and where == "a file":
        save()  # a file is replaced
        return
    with pytest.raises(LoraError, match=says):
        save()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", some(ALL, ["peft"]))
def test_names_of_any_length_that_the_disk_takes(name, tmp_path):
    target = tmp_path / "missing" / "parents" / ("n" * 250)
    for v in (1, 2):
        WRITERS[name].save(target, v)
    assert WRITERS[name].read(target) == 2
    assert [path.name for path in target.parent.iterdir() if path.name != "model"] == ["n" * 250]


def test_a_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    """The working folder would be gone under its process."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraError, match=r"is the working folder, which cannot be replaced: save to a new folder in it"):
        WRITERS["peft"].save(Path("."), 1)
    with pytest.raises(LoraError, match=r"mounted, which cannot be replaced|is not empty|holds no"):
        WRITERS["peft"].save(Path("/"), 1)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(LoraError, match="a place where a disk is mounted"):
        WRITERS["adapters"].save(tmp_path / "disk", 1)
    WRITERS["adapters"].save(tmp_path / "disk" / "a", 1)


# The command line -----------------------------------------------------------------------------------------------------


COMMANDS = {
    "merge": lambda base, out: ["merge", base, DATA / "lora", out],
    "convert": lambda base, out: ["convert", DATA / "lora", out],
    "convert to orbax": lambda base, out: ["convert", DATA / "lora", out, "--to", "orbax"],
    "compose": lambda base, out: ["compose", f"{DATA / 'rslora_patterns'}:0.5", out],
    "diff": lambda base, out: ["diff", base, base.with_name("tuned"), out, "--rank", "1", "--rest"],
    "inspect": lambda base, out: ["inspect", DATA / "lora", "--plot", out / "a.png"],
}


@pytest.mark.parametrize("command", some(COMMANDS, ["convert"]))
def test_commands_say_it_in_one_line(command, tmp_path, capsys, monkeypatch):
    published(tmp_path / "base", "lora")
    lora.merge_checkpoint(tmp_path / "base", DATA / "lora", tmp_path / "tuned")
    for where in PLACES:
        if where == "no character":
            continue  # no command line has it
        code = main([str(word) for word in COMMANDS[command](tmp_path / "base", at(where, tmp_path))])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip() and "merging" not in line]
        assert (code, out, len(lines)) == (1, "", 1), (where, out, err)
        assert lines[0].startswith("error: ")
    fill_the_disk(monkeypatch)
    assert main([str(word) for word in COMMANDS[command](tmp_path / "base", tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "out") == ["base", "file", "tuned"]


@pytest.mark.slow
def test_output_that_cannot_be_printed():
    """One line and an exit code, as for any other disk that is full."""
    program = [sys.executable, "-c", "import sys; from lora_jax.cli import main; sys.exit(main())"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*program, "inspect", DATA / "lora"], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 1
    assert [line[:6] for line in done.stderr.splitlines()] == ["error:"]


# Checkpoints of a run -------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path):
    """The second one may read, and saves nothing as long as the first is alive."""
    with checkpoints(tmp_path / "run") as first:
        first.save(state(1))
        first.wait()
        with checkpoints(tmp_path / "run") as second:
            assert second.restore(state(0))[0].step == 1
            with pytest.raises(LoraError, match="of a run that is alive, in another process"):
                second.save(state(2))
        first.save(state(2))
    with checkpoints(tmp_path / "run") as third:
        third.restore(state(0))
        third.save(state(3))
        assert third.steps == [2, 3]


def test_what_others_wrote_beside_a_checkpoint(tmp_path):
    """It is kept for its sake, and no run replaces it."""
    with checkpoints(tmp_path / "run") as kept:
        for v in range(1, 6):
            kept.save(state(v))
            kept.wait()
            if v == 2:
                (tmp_path / "run" / "step_2" / "results.json").write_text("mine")
        (tmp_path / "run" / "notes.txt").write_text("mine")
        assert kept.steps == [2, 4, 5]
    with checkpoints(tmp_path / "run") as kept:
        kept.restore(state(0), step=2)
        kept.save(state(4))
        kept.wait()
        (tmp_path / "run" / "step_4" / "results.json").write_text("mine")
        kept.restore(state(0), step=2)
        with pytest.raises(LoraError, match=r"step 4 was not written .*also holds 'results.json'"):
            kept.save(state(4))
    assert (tmp_path / "run" / "step_2" / "results.json").read_text() == "mine"
    assert (tmp_path / "run" / "step_4" / "results.json").read_text() == "mine"
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# Killed, raced, filled up ---------------------------------------------------------------------------------------------


class Server:
    """A process that has imported all, and forks others that save."""

    def __init__(self, compiled):
        here = Path(__file__).parent
        environment = os.environ | {
            "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),  # what one process compiled, the next ones read
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "OPENBLAS_NUM_THREADS": "1",  # a fork of several threads may wait for ever for a lock that one of them had
        }
        command = [sys.executable, str(here / "writers.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )

    def order(self, name, folder, count, first, saves, limit=0):
        """Begin; return the processes."""
        self.process.stdin.write(("\t".join(map(str, (name, folder, count, first, saves, limit))) + "\n").encode())
        self.said = []
        return [int(word) for word in self.wait_for("pids")[1:]]

    def wait_for(self, word):
        """Read on until a line begins with this word."""
        while line := self.next_line():
            words = line.split(" ", 2)
            self.said.append([word.strip() for word in words] if words[0] != "pids" else line.split())
            if self.said[-1][0] == word:
                return self.said[-1]
        raise AssertionError(f"the server ended: {self.said}")

    def next_line(self):
        """The next line, or an error with all that was said where none comes."""
        ready, *_ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, f"nothing in {PATIENCE} seconds after {self.said}"
        return self.process.stdout.readline().decode()

    def numbers(self, word):
        """The versions of which this was said."""
        return [int(said[1]) for said in self.said if said[0] == word]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("compiled"))
    yield found
    found.process.stdin.close()
    try:
        found.process.wait(timeout=PATIENCE)
    finally:
        found.process.kill()
        found.process.stdout.close()


def kill_often(server, name, place, times):
    """Kill a process that saves again and again, at any moment; what is there is always whole and the newest."""
    writer, target, before = WRITERS[name], place / "out", beside(place)
    chance, pace, newest, met = random.Random(name), 0.05, 1, 0
    writer.save(target, newest)
    server.order(name, target, 1, newest + 1, 1)  # compiles
    server.wait_for("end")
    newest = writer.read(target)
    for _ in range(times):
        [child] = server.order(name, target, 1, newest + 1, 10**6)
        server.wait_for("start")
        started = time.monotonic()
        for i in range(chance.randint(0, 2)):
            server.wait_for("done")
            pace = 0.5 * pace + 0.5 * (time.monotonic() - started) / (i + 1)
        time.sleep(chance.uniform(0, 1.2 * pace))
        os.kill(child, signal.SIGKILL)
        server.wait_for("end")
        done, begun = max([newest, *server.numbers("done")]), max(server.numbers("start"))
        met += begun > done
        found = writer.read(target)
        assert done <= found <= begun
        assert not server.numbers("failed") + server.numbers("refused"), server.said
        newest = found
    assert met > times // 4, "most kills met no save"
    writer.save(target, newest + 1)
    assert writer.read(target) == newest + 1
    if name == "merge":
        for path in target.glob(".*lora_jax-*"):  # each is cleared by the next save of its own version
            assert int(path.name.split(".")[1]) <= newest + 1
    else:
        assert atomic_dir.leftovers(target) == []
    assert beside(place) == before


def race(server, name, place, times):
    """Two processes save to one place; what a third one reads is always of one save, and none is refused."""
    writer, target, before = WRITERS[name], place / "out", beside(place)
    writer.save(target, 1)
    for i in range(times):
        server.order(name, target, 2, 1 + 10 * i, 2)
        reads = [writer.read(target) for _ in range(3)]
        server.wait_for("end")
        assert len(server.numbers("done")) == 4, server.said
        assert all(read % 1000 <= 10 * i + 3 for read in reads)
        last = writer.read(target)
        assert last % 1000 == 10 * i + 2, "the last save of one of the two"
        assert atomic_dir.leftovers(target) == []
    assert beside(place) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_kills(name, server, place, share):
    kill_often(server, name, place, share(60))


# Where a folder is replaced while orbax reads it, its threads still speak to an event loop that it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft", "adapters", "base", "file"])
def test_races(name, server, place, share):
    race(server, name, place, share(40))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "run"])
def test_races_that_one_wins(name, server, place, share):
    """Where nothing is replaced, one of two is on disk, whole, and the other one is told."""
    writer, target = WRITERS[name], place / "out"
    newest = 1
    writer.save(target, newest)
    for i in range(share(40)):
        server.order(name, target, 2, 2 + i, 1)
        server.wait_for("end")
        assert not server.numbers("failed"), server.said
        assert server.numbers("done")
        newest = max([newest, *server.numbers("done")])  # the last step of a run, and the last version of a model
        assert writer.read(target) == newest


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_three_fill_levels(name, server, place):
    """No file can become longer than a part of the longest: nothing changes, and the next save clears what is left."""
    writer, target = WRITERS[name], place / "out"
    writer.save(target, 1)
    first = contents(place)
    longest = max(path.stat().st_size for path in place.rglob("*") if path.is_file())
    for i, limit in enumerate((1, longest // 4, longest // 2)):
        before = contents(place)
        server.order(name, target, 1, 2 + i, 1, limit)
        server.wait_for("end")
        assert server.numbers("refused") == [2 + i], server.said
        [said] = [said[2] for said in server.said if said[0] == "refused"]
        assert "not written" in said
        if name not in ("run", "adapters", "base"):  # threads of orbax may write on for a moment
            assert contents(place) == before
        assert writer.read(target) == 1
    writer.save(target, 9)
    assert writer.read(target) == 9
    names = {path.split("/")[0] for path in contents(place)}
    assert names == {path.split("/")[0] for path in first} | {"out"}, "the next save clears what is left"


def test_a_few_kills(server, place):
    """A sample of what CI does more often with each writer."""
    kill_often(server, "peft", place, 4)
    race(server, "peft", place, 2)
