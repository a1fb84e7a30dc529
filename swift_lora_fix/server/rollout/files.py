"""The only way to an adapter's bytes: a folder directly below the root, opened without following links, limited.

The web server's process copies the bytes once and checks their digest. Its workers parse that copy, which is sealed, so
later changes of the file do not matter.
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
_UNSEEN = {errno.ENOENT, errno.EACCES}  # a folder of another host or user: HTTP can carry the bytes
_LINKS = {errno.ELOOP, errno.ENOTDIR}
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Source:
    """An adapter's bytes, held by the web server's process while its workers stage them (`Spool`).

    digest: of both files, `content_digest`; already checked. config: the bytes of an ``adapter_config.json``. weights:
        path of a sealed safetensors file, which processes of this host and user can open.
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

    Raises AccessError: not directly below ``root``, a link, not a regular file. StagingError: missing or unreadable
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
        # non-blocking, so that a pipe put there is not waited for
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
    """Read at most ``limit`` bytes. A file that grows meanwhile has another digest anyway."""
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(limit)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


class Spool:
    """The weights of one adapter, in nameless memory that the processes of this host can open.

    They arrive in parts, or whole from a file, and are hashed on the way. The kernel frees the memory with the last
    process that has it open.
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
        """Raises StagingError (413) before it holds more than the limit, SegmentError when memory runs out."""
        self.size += len(chunk)
        if self.size > self.limit:
            raise too_large("The adapter in the request's body", self.size, self.limit)
        self._hash.update(chunk)
        self._write_at(chunk, self.size - len(chunk))

    def copy(self, file: int) -> None:
        """Copy all of the file. Raises SegmentError when memory runs out, another OSError if it cannot be read."""
        self.size = min(os.fstat(file).st_size, self.limit)  # a file that grows meanwhile has another digest anyway
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
        """Seal the bytes against any change. Raises StagingError if their digest is not ``digest``."""
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
    """A folder's files, copied. Raises what `opened` raises, and SegmentError when memory runs out."""
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
    """The headers of a model folder's safetensors files, by tensor name."""
    return {name: header for file in _model_files(model) for name, header in read_header(file).items()}


def base_sums(model: str, dtype: Any = None) -> dict[str, list[Any]]:
    """Dtype, shape and checksum of each tensor in a model folder's safetensors files, as the engine holds it.

    dtype: the engine's torch dtype. Floats in the files are cast to it first, as vLLM does when it loads them.
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
