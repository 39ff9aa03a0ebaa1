"""How a command runs in a shell: its exit status, one line for an error, and output that nobody reads any more."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

TRACEBACK = "TL_NODEPRUNE_TRACEBACK"
"""An environment variable: where it is set, the traceback of an unexpected error is printed."""


class Output:
    """A text stream that never stops its writer: what cannot be written is dropped, and `error` says why.

    A character that the stream's encoding lacks is written as an escape.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *args: str) -> None:
        if self.error is None:
            try:
                action(*args)
            except OSError as error:
                self.error = error
                self._forget()

    def _forget(self) -> None:
        """Let what is still in the stream's buffer go nowhere; Python would complain of it at its end."""
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


def end_quietly_while_starting(command: str, package: str) -> None:
    """Where this process is that command, or `python -m package`, let Ctrl-C while Python still imports (seconds) be one line and 130, as
    it is later. Any other program that imports the package keeps its own end."""
    if os.path.basename(sys.argv[0]) != command and sys.orig_argv[1:3] != ["-m", package]:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        _failed(command, "stopped by Ctrl-C.", 130)
        os._exit(130)  # Python itself would end as killed by the signal

    sys.excepthook = hook


def run(name: str, command: Callable[[], None]) -> int:
    """Run a command. Returns the exit status: 0; 2 where the input was wrong or something could not be written; 130 after Ctrl-C; 1 for an
    error that it does not know. All but 0 come with one line on stderr. A reader that stops early (`| head`) is not an error."""
    out, err = (Output(stream) if stream is not None else None for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command()
            if out is not None:
                out.flush()
                if out.error is not None and not isinstance(out.error, BrokenPipeError):
                    raise out.error
            return 0
        except KeyboardInterrupt:
            return _failed(name, "stopped by Ctrl-C.", 130)
        except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
            return _failed(name, str(error) or type(error).__name__, 2)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            return _failed(name, f"unexpected {type(error).__name__}: {error} ({TRACEBACK}=1 shows where)", 1)
        finally:
            for stream in (out, err):
                if stream is not None:
                    stream.flush()


def _failed(name: str, what: str, status: int) -> int:
    print(f"{name}:", " ".join(what.split()), file=sys.stderr)
    return status
