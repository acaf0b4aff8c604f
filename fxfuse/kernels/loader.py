"""Loads the kernels on first use: the library in the package, else the cached one, else one built now, else none.

``library()`` is the one door. Importing fxfuse loads nothing native. Where the kernels cannot be had, one warning says
why and what to do, and every op goes on with its composed form.

Environment: ``FXFUSE_CACHE_DIR`` (default ``~/.cache/fxfuse``) is where built libraries are kept; ``FXFUSE_PORTABLE=1``
makes the kernels act as on compute capability 8.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fxfuse.kernels import build as builder

__all__ = ["Library", "cache_dir", "library", "reset", "why_unavailable"]

PREBUILT = builder.KERNELS / "_prebuilt"


class KernelError(RuntimeError):
    """A call into the kernels failed; ``code`` is CUDA's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Library:
    """The loaded kernels. ``path`` is the file, ``origin`` one of "prebuilt", "cache" and "built now"."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin
        self._dll = ctypes.CDLL(str(path))
        for name in ("fxfuse_error_name", "fxfuse_error_string"):
            function = getattr(self._dll, name)
            function.argtypes, function.restype = [ctypes.c_int], ctypes.c_char_p

    def function(self, name: str, argtypes: Sequence[Any]) -> Callable[..., None]:
        """The exported function ``name`` as a Python callable that raises RuntimeError, with the CUDA error's name,
        when it returns anything but 0. AttributeError when the library has no such function."""
        # Its own function object: setting argtypes on an attribute of the library would change it for everyone.
        function = self._dll[name]
        function.argtypes, function.restype = list(argtypes), ctypes.c_int

        def call(*args: Any) -> None:
            code = function(*args)
            if code:
                raise KernelError(f"{name}: {self.error(code)}", code)

        call.__name__ = name
        return call

    def raw(self, name: str, argtypes: Sequence[Any]) -> Callable[..., int]:
        """The exported function ``name`` as it is, for calls that count every microsecond: it returns its code."""
        function = self._dll[name]
        function.argtypes, function.restype = list(argtypes), ctypes.c_int
        raw: Callable[..., int] = function
        return raw

    def error(self, code: int) -> str:
        """What an error code means: its CUDA name, number and text."""
        label, text = self._dll.fxfuse_error_name(code).decode(), self._dll.fxfuse_error_string(code).decode()
        return f"{label} ({code}): {text}"

    def __repr__(self) -> str:
        return f"Library({str(self.path)!r}, {self.origin!r})"


_lock = threading.Lock()
_loaded: Library | None = None
_why: str | None = None


def library() -> Library | None:
    """The kernels, loaded (and if need be built) at the first call; None, after one warning, where that fails."""
    global _loaded, _why
    if _loaded is not None or _why is not None:
        return _loaded
    with _lock:
        if _loaded is None and _why is None:
            try:
                _loaded = _find()
            except (builder.BuildError, OSError) as error:
                _why = str(error)
                _warn(
                    f"no CUDA kernels, going on with composed PyTorch operators (same results, slower): {_why}. "
                    "Run `fxfuse build` to try again and `fxfuse doctor` for the whole story."
                )
    return _loaded


def why_unavailable() -> str | None:
    """Why ``library()`` returned None; None while it has not failed."""
    return _why


def reset() -> None:
    """Forget what was loaded or failed, so that the next call looks again."""
    global _loaded, _why
    with _lock:
        _loaded = _why = None


def cache_dir() -> Path:
    """Where built libraries are kept: ``$FXFUSE_CACHE_DIR``, ``$XDG_CACHE_HOME/fxfuse`` or ``~/.cache/fxfuse``."""
    named = os.environ.get("FXFUSE_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fxfuse"


def _find() -> Library:
    key = builder.source_key()
    if builder.library_is_whole(PREBUILT, key):
        # A prebuilt library that does not load here (another libc, say) is no reason not to build one.
        with contextlib.suppress(OSError):
            return Library(PREBUILT / builder.LIBRARY, "prebuilt")
    if not sys.platform.startswith("linux"):
        raise builder.BuildError(f"the CUDA kernels are built on Linux; this is {sys.platform}")
    nvcc = builder.find_nvcc()
    if nvcc is None:
        # Without a compiler any cached build of these sources will do, whichever nvcc made it.
        for entry in sorted(cache_dir().glob(f"{key}-*"), reverse=True):
            if builder.library_is_whole(entry, key):
                return Library(entry / builder.LIBRARY, "cache")
        raise builder.BuildError("nvcc was not found: install the CUDA toolkit (12.0 or newer) or set CUDA_HOME")
    entry = cache_dir() / f"{key}-nvcc{builder.nvcc_version(nvcc)}"
    if builder.library_is_whole(entry, key):
        return Library(entry / builder.LIBRARY, "cache")
    try:
        return _build_into_cache(entry, key)
    except (OSError, builder.BuildError) as error:
        if isinstance(error, builder.BuildError) and "No space left" not in str(error):
            raise
        return _build_for_this_process(error)


def _build_into_cache(entry: Path, key: str) -> Library:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(entry.parent / "build.lock"):
        if builder.library_is_whole(entry, key):  # another process built it while this one waited
            return Library(entry / builder.LIBRARY, "cache")
        if (entry / builder.LIBRARY).exists():
            _warn(f"the cached kernels in {entry} are damaged; building them again")
        return Library(builder.build(entry), "built now")


def _build_for_this_process(error: Exception) -> Library:
    """The cache cannot be written: build in a temporary folder, load, and leave nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="fxfuse-"))
    try:
        loaded = Library(builder.build(folder / "entry"), "built now")
    except (OSError, builder.BuildError) as second:
        raise builder.BuildError(
            f"the cache folder {cache_dir()} cannot be written ({error}), nor could a temporary folder be used "
            f"({second}); point FXFUSE_CACHE_DIR at a folder with space"
        ) from second
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a loaded library outlives its file
    _warn(f"the cache folder {cache_dir()} cannot be written ({error}): the CUDA kernels were built for this process "
          "alone and will be built again next time. Point FXFUSE_CACHE_DIR at a folder with space that can be written.")
    return loaded


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets go of the lock


def _warn(text: str) -> None:
    warnings.warn(f"fxfuse: {text}", RuntimeWarning, stacklevel=4)
