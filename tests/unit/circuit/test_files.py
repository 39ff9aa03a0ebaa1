"""Files are written whole or not at all, by every function that writes one, and never over what is not a regular file."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tl_nodeprune as tlnp
from tl_nodeprune.circuit import files
from tl_nodeprune.circuit.scores import NodeScores
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
Writer = Callable[[Any], Any]


@pytest.fixture(params=["files.write", "Circuit.save", "save_html", "mib.write"])
def write(request: pytest.FixtureRequest, toy: Toy) -> Writer:
    """Each function that writes a file, called with the path alone."""
    circuit = tlnp.Circuit.full(find_nodes(toy[0]).restrict(("head",)))
    return {"files.write": lambda path: files.write(path, "content"), "Circuit.save": circuit.save,
            "save_html": lambda path: tlnp.viz.save_html(path, "a paragraph"),
            "mib.write": lambda path: tlnp.mib.write(toy[0], NodeScores.from_circuit(circuit), path)}[request.param]


def test_a_file_and_nothing_else_with_the_mode_of_the_umask(write: Writer, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    (tmp_path / "x").chmod(0o600)
    write(str(tmp_path / "x"))
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600, "a file that is replaced keeps its mode"


def test_what_is_no_regular_file_is_refused_and_stays(write: Writer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
    for name, error in (("pipe", "device, pipe or socket"), ("folder", "is a folder"), ("link", "symbolic link"),
                        ("dangling", "symbolic link"), ("loop", "symbolic link"), ("/dev/null", "device, pipe or socket")):
        with pytest.raises(OSError, match=error):
            write(tmp_path / name)
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before and (tmp_path / "target").read_text() == "mine"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_above_is_followed(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "results").symlink_to("real")
    write(tmp_path / "results" / "x")
    assert (tmp_path / "real" / "x").is_file()


@pytest.mark.parametrize(("name", "error"), [("", ValueError), ("x/", ValueError), ("a\0b", ValueError), (3, TypeError), (None, TypeError),
                                             (b"x", TypeError), ("missing/x", FileNotFoundError), ("n" * 300, OSError)])
def test_names_that_are_none(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, error: type) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="path|the folder 'missing' does not exist|cannot be written|too long"):
        write(name)
    assert not list(tmp_path.iterdir())


def test_names_up_to_the_longest_and_other_files_stay(write: Writer, tmp_path: Path) -> None:
    for name in ("x.part", "n" * 255, ".hidden"):
        (tmp_path / "x.part").write_text("mine")
        write(tmp_path / name)
        assert name == "x.part" or (tmp_path / "x.part").read_text() == "mine"


def test_several_threads_that_write_to_one_path(write: Writer, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "mib.write" in request.node.name:
        pytest.skip("it looks at the model, and a model is for one thread at a time")
    write(tmp_path / "x")
    whole, errors = (tmp_path / "x").stat().st_size, []

    def often() -> None:
        try:
            for _ in range(5):
                write(tmp_path / "x")
                assert (tmp_path / "x").stat().st_size == whole
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("fails", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: BaseException,
                                                  at: str) -> None:
    def failing(*_: Any) -> None:
        raise fails

    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(os, at, failing)
    with pytest.raises(type(fails), match="x cannot be written: No space left" if isinstance(fails, OSError) else None):
        write(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "before"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_is_refused(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    (tmp_path / "x").chmod(0o444)
    with pytest.raises(PermissionError, match="is read-only"):
        write(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "before"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    script = "import os, runpy, signal, sys; write = runpy.run_path(sys.argv[1])['write']\n" \
             "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nwrite(sys.argv[2], 'half')"
    subprocess.run([sys.executable, "-c", script, files.__file__, str(tmp_path / "x")], check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].suffix == ".part"
    host, alive = socket.gethostname(), os.getppid()
    others = [f".tl_nodeprune-{host}-{alive}-00.part", f".tl_nodeprune-elsewhere-{host}-999999999-0.part", "x.part", ".search-1.part"]
    for name in others:
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_outputs_apart_from_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("")
    os.link("in", "hard")
    Path("link").symlink_to("in")
    for name in ("in", "./in", "../" + tmp_path.name + "/in", "hard", "link", str(tmp_path / "in")):
        with pytest.raises(ValueError, match=r"--html .* is the same file as --task; give another name"):
            files.check_apart({"--html": Path(name)}, {"--task": Path("in")})
    with pytest.raises(ValueError, match="same file as the circuit"):
        files.check_apart({"--html": Path("new/../out/c"), "the circuit": Path("out/c")}, {})
    files.check_apart({"--html": Path("page")}, {"--task": Path("in"), "the circuit": Path("in")})
