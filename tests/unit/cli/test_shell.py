"""Exit statuses, one line for an error, and streams that break."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tl_nodeprune.cli import shell


@pytest.mark.parametrize(("error", "status", "line"), [
    (ValueError("a\n  b"), 2, "x: a b"), (ValueError(), 2, "x: ValueError"), (OSError(28, "No space"), 2, "x: [Errno 28] No space"),
    (ZeroDivisionError("z"), 2, "x: z"), (RecursionError("deep"), 2, "x: deep"), (KeyboardInterrupt(), 130, "x: stopped by Ctrl-C."),
    (KeyError("k"), 1, "x: unexpected KeyError: 'k' (TL_NODEPRUNE_TRACEBACK=1 shows where)"),
    (MemoryError(), 1, "x: unexpected MemoryError: (TL_NODEPRUNE_TRACEBACK=1 shows where)"),
])
def test_an_error_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str) -> None:
    def command() -> None:
        raise error

    assert shell.run("x", command) == status
    assert capsys.readouterr().err == line + "\n"


def test_the_traceback_of_an_unexpected_error_can_be_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shell.TRACEBACK, "1")
    assert shell.run("x", lambda: {}["k"]) == 1
    assert "Traceback" in capsys.readouterr().err


def broken_pipe() -> io.TextIOWrapper:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8", write_through=True)


@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_reader_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    done: list[str] = []

    def command() -> None:
        for name in ("first", "second"):
            print(name, file=getattr(sys, which), flush=True)
            done.append(name)

    stream = broken_pipe()
    monkeypatch.setattr(sys, which, stream)
    assert shell.run("x", command) == 0 and done == ["first", "second"]
    stream.close()  # as at the end of Python: it must not raise


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_output_that_cannot_be_written_is_said_at_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert shell.run("x", lambda: (print("much", flush=True), done.append(1))[1]) == 2 and done
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [io.TextIOWrapper(io.BytesIO(), encoding="ascii"), None])
def test_characters_that_a_stream_lacks_and_no_stream_at_all(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    assert shell.run("x", lambda: print("\u00e4 \udcff", flush=True)) == 0
    assert stream is None or stream.buffer.getvalue() == b"\\xe4 \\udcff\n"


def test_at_the_end_of_python_nothing_is_said_of_a_broken_pipe() -> None:
    script = "import runpy, sys; run = runpy.run_path(sys.argv[1])['run']\n" \
             "sys.exit(run('x', lambda: [print('line', i) for i in range(9999)]))"
    with subprocess.Popen([sys.executable, "-c", script, shell.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert process.stderr.read() == b"" and process.wait() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("started", "status"), [
    (["/usr/bin/tl-nodeprune"], 130), (["python", "-m", "tl_nodeprune", "demo"], 130), (["python", "notebook"], -signal.SIGINT),
    (["python", "-m", "of_a_user"], -signal.SIGINT), (["python", "-m", "of_a_user", "-m", "tl_nodeprune"], -signal.SIGINT),
])
def test_ctrl_c_while_python_imports(started: list[str], status: int) -> None:
    """A program of a user's that imports this package ends in its own way, and does what it does at its end."""
    script = "import atexit, runpy, sys; shell = runpy.run_path(sys.argv[1]); sys.orig_argv = sys.argv[2:]\n" \
             "sys.argv[0] = sys.orig_argv[0]; atexit.register(print, 'saved', flush=True)\n" \
             "shell['end_quietly_while_starting']('tl-nodeprune', 'tl_nodeprune'); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", script, shell.__file__, *started], capture_output=True, text=True, check=False)
    assert done.returncode == status and (done.stderr == "tl-nodeprune: stopped by Ctrl-C.\n") is (status == 130)
    assert done.stdout == ("" if status == 130 else "saved\n")
