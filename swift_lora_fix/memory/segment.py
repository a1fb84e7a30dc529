"""The bytes of one adapter in shared memory without a name: a sealed ``memfd`` of the sending process.

Its content is a safetensors file with the PEFT config as JSON in its metadata, so nothing is ever unpickled. Other
processes of this host open it through ``/proc/<pid>/fd``; the address (`Address`) also has its size and digest. No file
system has an entry for it, so the kernel frees it with its last user. A killed sender leaves nothing behind, and the
size of ``/dev/shm``, 64 MiB in a plain container, is no limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common import memfd
from ..common.digest import checksum, combine
from ..errors import AdapterRequestError, NonFiniteAdapterError, SegmentError

MEMFD_NAME = "swift-lora-fix-adapter"
CONFIG_KEY = "adapter_config"
# safetensors' names for them, widest first: in this order each tensor is aligned as the format requires.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# Starts with / so that vLLM takes it for a local path and does not look it up on a hub (get_adapter_absolute_path).
_SCHEME = "/swift-lora-fix-memory/"


@dataclass(frozen=True)
class Address:
    """Where a segment is, and what it must contain. ``str(address)`` travels as vLLM's ``lora_path``."""

    pid: int
    descriptor: int
    size: int
    digest: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.pid}/{self.descriptor}/{self.size}/{self.digest}"

    @classmethod
    def parse(cls, path: str) -> Address | None:
        """The address in a ``lora_path``; None for any other path. Raises SegmentError if it is malformed."""
        if not path.startswith(_SCHEME):
            return None
        parts = path[len(_SCHEME) :].split("/")
        if len(parts) != 4 or not all(part.isdigit() for part in parts[:3]):
            raise SegmentError(
                f"{path!r} is no address of an adapter in memory: pid, descriptor, size, digest expected."
            )
        return cls(int(parts[0]), int(parts[1]), int(parts[2]), parts[3])


class Segment:
    """A sealed segment of this process. ``release``, or dropping the object, frees the memory."""

    def __init__(self, descriptor: int, size: int, digest: str) -> None:
        self.address = Address(os.getpid(), descriptor, size, digest)
        self._close = weakref.finalize(self, os.close, descriptor)

    @property
    def is_released(self) -> bool:
        return not self._close.alive

    def release(self) -> None:
        """Free the memory once no process has it open. A second call does nothing."""
        self._close()

    @classmethod
    def write(
        cls, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype | None = None
    ) -> Segment:
        """Copy ``tensors`` (any device, `DTYPES`) and ``config`` (JSON) into a new segment; each byte is copied once.

        dtype: the engine's LoRA dtype, to which vLLM casts what it loads. Wider tensors are cast here already: the same
            bits result, and there are fewer bytes to carry.

        Raises NonFiniteAdapterError naming tensors with NaN or infinity, SegmentError when memory runs out.
        """
        header, order = _layout(tensors, config, dtype)
        descriptor = memfd.create(MEMFD_NAME)
        try:
            digest = _fill(descriptor, header, [(name, tensors[name]) for name in order], dtype)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, os.fstat(descriptor).st_size, digest)
        except BaseException:
            os.close(descriptor)
            raise


@contextlib.contextmanager
def opened(address: Address, verify: bool = True) -> Iterator[str]:
    """Yield the path of a safetensors file, valid inside only, after checking that it is the one that was sent.

    Raises SegmentError: the sender is gone or released it, it belongs to somebody else, is not sealed, has another size
    (so was truncated), or, with ``verify``, its bytes have another digest.
    """
    path = memfd.path_of(address.pid, address.descriptor)
    descriptor = memfd.opened(address.pid, address.descriptor, MEMFD_NAME)
    try:
        memfd.check(descriptor, path, address.size, _SEALS)
        if verify:
            _verify(descriptor, path, address)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def read_config(path: str) -> dict[str, Any]:
    """The PEFT config in a segment's metadata. Raises SegmentError if it has none."""
    with open(path, "rb") as file:
        return parse_config(file.read(int.from_bytes(file.read(8), "little")), path)


def parse_config(header: bytes, where: str) -> dict[str, Any]:
    """The PEFT config in a safetensors header. Raises SegmentError if this is not a header that has one."""
    try:
        return dict(json.loads(json.loads(header)["__metadata__"][CONFIG_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise SegmentError(f"{where} has no PEFT config in its safetensors metadata ({error!r}).") from error


def _layout(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype | None
) -> tuple[bytes, list[str]]:
    """The file's header, and the tensor names in the order of their bytes."""
    widest_first = list(DTYPES)
    dtypes = {name: _sent_as(tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda n: (widest_first.index(dtypes[n]), n))
    described: dict[str, Any] = {"__metadata__": {CONFIG_KEY: json.dumps(config, sort_keys=True)}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + math.prod(tensor.shape) * dtypes[name].itemsize
        described[name] = {
            "dtype": DTYPES[dtypes[name]],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


@torch.no_grad()
def _fill(
    descriptor: int, header: bytes, tensors: Sequence[tuple[str, torch.Tensor]], dtype: torch.dtype | None
) -> str:
    """Write the file and return its digest. write() is faster than mmap, and reports missing memory as an error."""
    checksums, bad = [_checksum(bytearray(header))], []
    _write(descriptor, header)
    for name, tensor in tensors:
        values = tensor.detach().to(_sent_as(tensor, dtype)).to("cpu").contiguous().view(-1)
        data = values.view(torch.uint8)
        if not is_finite(values):
            bad.append(name)
        checksums.append(int(checksum(data)))
        _write(descriptor, data.numpy())
    if bad:
        raise not_finite(bad, len(tensors))
    return combine(checksums)


def _sent_as(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and dtype.itemsize < tensor.dtype.itemsize else tensor.dtype


def _write(descriptor: int, data: Any) -> None:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        raise SegmentError(
            f"No shared memory for {len(rest)} more bytes of the adapter ({error.strerror}): free memory on this host, "
            "or raise the container's limit."
        ) from error


def is_finite(values: torch.Tensor) -> bool:
    """A finite sum has only finite terms. A sum may overflow though all terms are finite: then each term is checked."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return math.isfinite(values.sum(dtype=wide).item()) or bool(values.isfinite().all())


def not_finite(names: Sequence[str], count: int) -> NonFiniteAdapterError:
    return NonFiniteAdapterError(
        f"{len(names)} of the adapter's {count} tensors hold NaN or infinity, the first {min(names)!r}. Nothing was "
        "sent: the engine keeps what it has. Send an adapter from before the divergence."
    )


def _verify(descriptor: int, path: str, address: Address) -> None:
    digest = _digest_of_file(descriptor, address.size)
    if digest != address.digest:
        raise SegmentError(f"{path} has digest {digest} where {address.digest} was sent; nothing was read.")


def _digest_of_file(descriptor: int, size: int) -> str:
    """The digest that `_fill` returned for this file: combined checksums of its header and of each tensor."""
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as memory:  # torch wants a writable buffer
        end = 8 + int.from_bytes(memory[:8], "little")
        spans = [(0, end), *((end + start, end + stop) for start, stop in _spans(memory[8:end]))]
        return combine(_checksum(memory, start, stop) for start, stop in spans)


def _spans(header: bytes) -> list[tuple[int, int]]:
    try:
        described = json.loads(header)
        return sorted(tuple(entry["data_offsets"]) for name, entry in described.items() if name != "__metadata__")
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _checksum(buffer: Any, start: int = 0, stop: int | None = None) -> int:
    stop = len(buffer) if stop is None else min(stop, len(buffer))
    if stop <= start:
        return 0
    return int(checksum(torch.frombuffer(buffer, dtype=torch.uint8, count=stop - start, offset=start)))


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Raise AdapterRequestError unless these are named tensors of a dtype in `DTYPES`."""
    if not tensors:
        raise AdapterRequestError("lora_tensors is empty: an adapter has at least one lora_A and one lora_B.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise AdapterRequestError(
                f"lora_tensors[{name!r}] is a {type(tensor).__name__}: names (str) to torch tensors are expected, as "
                "in PEFT's get_peft_model_state_dict()."
            )
        if tensor.dtype not in DTYPES:
            raise AdapterRequestError(
                f"lora_tensors[{name!r}] is of {tensor.dtype}; a LoRA tensor is one of {', '.join(map(str, DTYPES))}."
            )
