"""How files are written: all of one or nothing, and only where a regular file may stand."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

_PREFIX = ".tl_nodeprune-"


def write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a whole file or nothing: a temporary file beside it, fsync, rename. Text as UTF-8. Returns the path.

    A new file has the mode that the umask leaves, one that is replaced keeps its own. Several threads or processes may write to one path:
    the last one wins. Raises: what `check_target` raises; OSError where the file cannot be written.
    """
    path = check_target(path)
    part = path.with_name(f"{_own_prefix()}{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            if path.exists():
                part.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def as_path(path: object) -> Path:
    """The name of a file as a Path. Raises TypeError for what is no name, ValueError for "", a trailing slash or a zero byte."""
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise TypeError(f"path must be the name of a file, a str or a Path, got {type(path).__name__}.")
    if not name or name.endswith("/") or "\0" in name:
        raise ValueError(f"path={name!r}; give the name of a file.")
    return Path(name)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, where a file may be written: nothing stands there, or a regular file that may be changed. No link is followed or replaced.

    Raises: TypeError or ValueError for what is no name of a file; FileNotFoundError for a folder that is not there; IsADirectoryError for a
    folder; FileExistsError for a symbolic link, a device, a pipe or a socket; PermissionError for a file that is read-only.
    """
    path = as_path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} does not exist; make it first.")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
    if stat.S_ISLNK(mode):
        raise FileExistsError(f"{str(path)!r} is a symbolic link; give the name of the file that it points at, or remove it.")
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"{str(path)!r} is a device, pipe or socket; give the name of a regular file.")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} is read-only; give another name.")
    return path


def check_apart(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Raises ValueError where a file to write, by what it is called, is one that is read or another that is written."""
    for (name, path), (other, there) in combinations([*outputs.items(), *inputs.items()], 2):
        if name in outputs and _same(path, there):
            raise ValueError(f"{name} {str(path)!r} is the same file as {other}; give another name.")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and see that files can be written there. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that `write` left in a folder, in processes of this machine that were killed."""
    for part in folder.glob(f"{_PREFIX}{socket.gethostname()}-*-*.part"):
        if not _is_alive(part.name.rsplit("-", 2)[1]):
            with suppress(OSError):
                part.unlink()


def _own_prefix() -> str:
    return f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-"


def _is_alive(process: str) -> bool:
    if os.name != "posix" or not process.isdigit():
        return True
    try:
        os.kill(int(process), 0)  # no signal, only a look
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    except OverflowError:
        pass
    return True


def _same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)
