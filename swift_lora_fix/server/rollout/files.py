"""The only way in to an adapter's bytes: a folder right below the root, opened without following a link, limited.

The web server's process copies the bytes once and checks their digest; what its workers then parse is that copy, which
is sealed, whatever becomes of the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Callable

from ...errors import AccessError, SegmentError, StagingError
from ...policy.files import TensorHeader, read_header
from ..content import ContentHash
from ..wire import CONFIG, LIMIT_VARIABLE, ROOT_VARIABLE, WEIGHTS

CONFIG_LIMIT = 1 << 20
_UNSEEN = {errno.ENOENT, errno.EACCES}  # another host's folder, or another user's: its bytes can come over HTTP
_LINKS = {errno.ELOOP, errno.ENOTDIR}
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Source:
    """An adapter's bytes that the web server's process holds while its workers stage them (`Spool`).

    digest: of both, `content_digest`; it was checked. config: the bytes of an ``adapter_config.json``. weights: path of
    a safetensors file that nobody can change any more, which processes of this host and user can open.
    """

    digest: str
    config: bytes
    weights: str


def different_digest(expected: str, found: str, size: int) -> StagingError:
    return StagingError(
        f"The adapter has digest {found} ({size} bytes of weights) where {expected} was announced: it was truncated or "
        "changed on its way. Nothing of it was parsed; send it again."
    )


@contextlib.contextmanager
def opened(folder: str, root: str, limit: int) -> Iterator[tuple[int, int]]:
    """Yield descriptors of the config and the weights in ``folder``.

    Raises AccessError: not right below ``root``, a link, not a regular file. StagingError: not there or not readable
    (404), larger than ``limit`` (413).
    """
    name = _name_below(folder, root)
    with contextlib.ExitStack() as stack:

        def enter(path: str, flags: int, parent: int | None = None) -> int:
            where = os.path.join(folder, path) if path in (CONFIG, WEIGHTS) else folder
            descriptor = _open(path, flags | os.O_RDONLY | os.O_CLOEXEC, parent, where)
            stack.enter_context(_closing(descriptor))
            return descriptor

        inside = enter(name, os.O_DIRECTORY | os.O_NOFOLLOW, enter(root, os.O_DIRECTORY))
        # not blocking: a pipe that somebody put there is not waited for
        config, weights = (enter(file, os.O_NOFOLLOW | os.O_NONBLOCK, inside) for file in (CONFIG, WEIGHTS))
        _check_file(config, os.path.join(folder, CONFIG), min(limit, CONFIG_LIMIT))
        _check_file(weights, os.path.join(folder, WEIGHTS), limit)
        yield config, weights


def _name_below(folder: str, root: str) -> str:
    parent, name = os.path.split(folder)
    if parent != root or name in ("", ".", "..") or "\0" in folder:
        raise AccessError(
            f"The adapter's folder {folder!r} is not right below this server's root {root!r}: nothing was opened. Set "
            f"{ROOT_VARIABLE} to the same folder for trainer and server."
        )
    return name


def _open(path: str, flags: int, parent: int | None, where: str) -> int:
    try:
        return os.open(path, flags, dir_fd=parent)
    except OSError as error:
        if error.errno in _UNSEEN:
            raise StagingError(f"{where} cannot be opened on the server ({error.strerror}).", 404) from error
        kind = "a link, or no folder or file" if error.errno in _LINKS else error.strerror
        raise AccessError(f"{where} is refused: {kind}. Only regular files in a folder are read.") from error


def _check_file(descriptor: int, where: str, limit: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise AccessError(f"{where} is refused: it is not a regular file.")
    if status.st_size > limit:
        raise too_large(where, status.st_size, limit)


def too_large(what: str, size: int, limit: int) -> StagingError:
    return StagingError(
        f"{what} has {size} bytes or more, this server takes {limit}. Raise {LIMIT_VARIABLE} (MiB, now {limit >> 20}) "
        "where it is started, if such an adapter is meant.",
        413,
    )


def _read(descriptor: int, limit: int) -> bytes:
    """No more than that, though it may grow meanwhile: then it has another digest anyway."""
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(limit)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


class Spool:
    """The weights of one adapter, in memory without a name that the processes of this host can open.

    They come in parts, or whole from a file, and are hashed meanwhile. The kernel frees them with the last process that
    has them open.
    """

    def __init__(self, config: bytes, limit: int) -> None:
        self.config, self.limit, self.size = config, limit, 0
        self._hash = ContentHash(config)
        self._digest: Callable[[], str] = self._hash.hexdigest
        self._descriptor = os.memfd_create("swift-lora-fix-spool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, chunk: bytes) -> None:
        """Raises StagingError (413) before more than the limit is held, SegmentError where there is no memory."""
        self.size += len(chunk)
        if self.size > self.limit:
            raise too_large("The adapter in the request's body", self.size, self.limit)
        self._hash.update(chunk)
        self._write_at(chunk, self.size - len(chunk))

    def copy(self, file: int) -> None:
        """All of a file, by its descriptor. Raises SegmentError where there is no memory, another OSError where it
        cannot be read."""
        self.size = min(os.fstat(file).st_size, self.limit)  # what grows meanwhile has another digest anyway
        digest = self._hash.copy(file, self._write_at, self.size)
        self._digest = lambda: digest

    def _write_at(self, data: bytes, start: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.pwrite(self._descriptor, rest, start + len(data) - len(rest)) :]
        except OSError as error:
            raise SegmentError(f"The server has no memory for the adapter's weights ({error.strerror}).") from error

    def sealed(self, digest: str) -> Source:
        """Nothing is added or changed from here on. Raises StagingError where these are not the bytes that were sent
        as ``digest``."""
        found = self._digest()
        if found != digest:
            raise different_digest(digest, found, self.size)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return Source(digest, self.config, self.path)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def spooled(folder: str, root: str, limit: int) -> Iterator[Spool]:
    """A folder's files, copied. Raises what `opened` raises, and SegmentError where there is no memory."""
    with opened(folder, root, limit) as (config, weights), Spool(_read(config, CONFIG_LIMIT), limit) as spool:
        try:
            spool.copy(weights)
        except SegmentError:
            raise
        except OSError as error:
            where = os.path.join(folder, WEIGHTS)
            raise StagingError(f"{where} cannot be read on the server ({error.strerror}).", 404) from error
        yield spool


def base_shapes(model: str) -> dict[str, TensorHeader]:
    """What the headers of a model folder's safetensors files say, by name."""
    return {name: header for file in _model_files(model) for name, header in read_header(file).items()}


def base_sums(model: str, dtype: Any = None) -> dict[str, list[Any]]:
    """Dtype, shape and checksum of each tensor of a model folder's safetensors files, as the engine holds it.

    dtype: torch's, of the engine; floats of the files are cast to it first, as vLLM does when it loads them.
    """
    import torch
    from safetensors import safe_open

    from ...common.digest import checksum

    floats, sums = (torch.float32, torch.bfloat16, torch.float16), {}
    for path in _model_files(model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                tensor = tensor.to(dtype) if dtype in floats and tensor.dtype in floats else tensor
                sums[name] = [str(tensor.dtype).split(".")[-1], list(tensor.shape), int(checksum(tensor))]
    return sums


def _model_files(model: str) -> list[Path]:
    return sorted(Path(model).glob("*.safetensors"))
