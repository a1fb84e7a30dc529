"""In each of vLLM's workers: an adapter arrives, over NCCL or from a file, is checked, and is written to the LoRA
slots.

It arrives in a second buffer, laid out as the trainer staged it (engine/vllm/slots/staging.py), so that the adapter
that is being served stays available to go back to. The rest is the sync of a colocated engine
(engine/vllm/slots/writer.py): a write plan learnt from vLLM's loader, proved against it, and read back.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch

from ... import errors
from ...common.settings import Settings
from ...engine.vllm.finite import FiniteCheck
from ...engine.vllm.handle import ADAPTER_ID, WorkerHandle
from ...engine.vllm.slots import loader
from ...engine.vllm.slots.staging import Staging
from ...engine.vllm.slots.writer import AdapterWriter
from ...errors import EngineStateError, StagingError, SwiftLoraFixError
from ...policy import adapter as adapters
from ..wire import GONE, NO_NCCL, Layout, http_status

_TOLD = re.compile(r"<swift_lora_fix>(.*?)</swift_lora_fix>", re.DOTALL)


@dataclass
class _Held:
    """A whole adapter in a staging buffer. digest: the server's name for it, None while unknown. found: the policy
    digest of what the buffer holds."""

    adapter: adapters.Adapter
    staging: Staging
    digest: str | None = None
    found: str = ""

    @classmethod
    def make(cls, layout: Layout, scales: Mapping[str, float], dtype: torch.dtype, device: torch.device) -> _Held:
        """scales: by PEFT key, the scaling that arriving B tensors do not contain yet."""
        shapes = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in layout.entries}
        planned = adapters.of_tensors("default", shapes, layout.config, scales)
        staging = Staging(planned, dtype, device, whole=True)
        views = [view for chunk in planned.chunks for view in staging.entries(chunk)]
        return cls(adapters.of_tensors("default", dict(zip(shapes, views)), layout.config), staging)


class Receiver:
    """The receiver of one vLLM worker. ``worker`` is also ms-swift's extension, whose NCCL communicator is used."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.engine = worker, WorkerHandle(worker)
        self.layout: Layout | None = None
        self.writer: AdapterWriter | None = None
        self.check: FiniteCheck | None = None
        self.served: _Held | None = None  # the writer reads this buffer
        self.other: _Held | None = None  # what arrives; after a switch, the policy before

    def do(self, command: str, **arguments: Any) -> None:
        commands = {
            "prepare": self.prepare,
            "receive": self.receive,
            "make_room": self.make_room,
            "read": self.read,
            "find": self.find,
            "serve": self.serve,
            "check_served": self.check_served,
        }
        commands[command](**arguments)

    def prepare(self, layout: dict[str, Any]) -> None:
        """Make room for an adapter that will come over NCCL. Raises StagingError (`NO_NCCL`) if it cannot."""
        communicator, dtype = self.worker.communicator, self.engine.lora_dtype
        if communicator is None or getattr(communicator, "disabled", False):
            raise StagingError("The server's vLLM workers have no NCCL connection to this trainer.", NO_NCCL)
        if layout["dtype"] != str(dtype).removeprefix("torch."):
            raise StagingError(
                f"Over NCCL an adapter comes as the engine holds it, in {dtype}, not in {layout['dtype']} "
                "(--torch_dtype, or lora_dtype of --vllm_engine_kwargs, of servers that differ).",
                NO_NCCL,
            )
        self.make_room(layout, {})

    def make_room(self, layout: dict[str, Any], scales: dict[str, float]) -> None:
        """For adapters of this layout, in the engine's dtype. Buffers of another layout are dropped."""
        asked, device = Layout.from_dict(layout), self.worker.model_runner.device  # 0.17's CPU worker has no device
        if asked == self.layout:
            return
        dtype = self.engine.lora_dtype
        self.layout = self.served = self.other = self.writer = self.check = None
        served, other = (_Held.make(asked, scales, dtype, device) for _ in range(2))
        direct = Settings.from_environment().writer == "direct"
        self.writer = AdapterWriter(self.engine, served.adapter, _request_class(self.worker), device, direct)
        self.check = FiniteCheck(other.adapter, dtype, device, lambda fine: fine)
        self.layout, self.served, self.other = asked, served, other

    @torch.no_grad()
    def receive(self, digest: str) -> None:
        """Receive the adapter with this digest. Raises StagingError or NonFiniteAdapterError; it is not served then."""
        assert self.other is not None, "prepare() comes first"
        self.other.digest = None
        buffer, communicator = self.other.staging.buffer, self.worker.communicator
        stream = torch.cuda.current_stream(buffer.device) if buffer.is_cuda else None
        communicator.broadcast(buffer.view(torch.uint8), src=self.worker.client_rank, stream=stream)
        self._accept(self.other, digest, "arrived over NCCL", True)

    @torch.no_grad()
    def read(self, path: str, digest: str, is_proved: bool) -> None:
        """The same, from a sealed safetensors file. is_proved: ``digest`` is the policy digest of what the engine will
        hold, so it can be checked; otherwise it is only the server's name for these values."""
        assert self.other is not None, "make_room() comes first"
        self.other.digest = None
        staging = self.other.staging
        with safetensors.safe_open(path, framework="pt") as file:
            for chunk in staging.adapter.chunks:
                staging.fill(chunk, [file.get_tensor(entry.key) for entry in chunk.entries])
        self._accept(self.other, digest, "was read", is_proved)

    def _accept(self, held: _Held, digest: str, came: str, is_proved: bool) -> None:
        assert self.check is not None
        held.found = held.staging.digest()
        if is_proved and held.found != digest:
            raise StagingError(f"What {came} has digest {held.found}, {digest} was announced: send it again.")
        self.check.begin([parameter.data_ptr() for parameter in held.adapter.parameters])
        self.check.finish()
        held.digest = digest

    def find(self, digest: str) -> None:
        """Raise StagingError (`GONE`) when this adapter is no longer here."""
        if digest not in [held.digest for held in (self.served, self.other) if held is not None]:
            raise StagingError(f"The server no longer has the adapter with digest {digest}: send it.", GONE)

    @torch.no_grad()
    def serve(self, digest: str, by_reference: bool = False) -> None:
        """Write the adapter with this digest, which must be here, into the LoRA slots, and read it back. by_reference:
        through vLLM's own loader."""
        assert self.writer is not None and self.served is not None and self.other is not None, "make_room() comes first"
        self.find(digest)
        if self.served.digest != digest:
            self._swap()
        if not self.writer.is_current():
            self.writer.forget()  # another writer changed the slots
        report = self.writer.write_by_reference() if by_reference else self.writer.write()
        self.writer.finish()
        if report.digest != self.served.found:
            raise EngineStateError(
                f"vLLM's LoRA layers were given {report.digest} where {self.served.found} was to be served."
            )
        if self.writer.plan is not None and self.writer.read_back() != self.writer.expected:
            self.writer.forget()
            raise EngineStateError("vLLM's LoRA slots do not hold what was written to them.")
        self.writer.accept()

    def check_served(self) -> None:
        """Raise EngineStateError when vLLM's loader took modules that no LoRA layer applies."""
        if ADAPTER_ID in self.worker.list_loras():  # with data parallelism vLLM drops it on an idle rank
            loader.check_served(self.engine)

    def _swap(self) -> None:
        """Swap the contents of the two buffers, a part at a time: the write plan is bound to one of them."""
        assert self.served is not None and self.other is not None
        for here, there in zip(self.served.staging.buffer.split(1 << 24), self.other.staging.buffer.split(1 << 24)):
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
        mine, theirs = self.served, self.other
        mine.digest, theirs.digest = theirs.digest, mine.digest
        mine.found, theirs.found = theirs.found, mine.found


def _request_class(worker: Any) -> Any:
    """ms-swift's ``TensorLoRARequest``, from the module of the worker's extension."""
    for cls in type(worker).__mro__:
        found = getattr(sys.modules[cls.__module__], "TensorLoRARequest", None)
        if found is not None:
            return found
    raise EngineStateError("ms-swift's rollout server has no TensorLoRARequest.")


# ---- errors, from a worker to the process that has the engine -------------------------------------------------------


def raise_together(problem: Exception | None) -> None:
    """Raise, in the last worker of the tensor-parallel group, what went wrong in any of them.

    vLLM's ``MultiprocExecutor.collective_rpc`` stops at the first worker that raises. It leaves the answers of the
    later workers to the next call (0.17.1 to 0.32.0). And with data parallelism, engines pass on nothing but errors.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    mine = None if problem is None else _tell(problem)
    texts: list[Any] = [mine]
    if group.world_size > 1:
        texts = [None] * group.world_size
        torch.distributed.all_gather_object(texts, mine, group=group.cpu_group)
    failed = [text for text in texts if text is not None]
    if failed and group.rank_in_group == group.world_size - 1:
        raise EngineStateError(failed[0])


def _tell(problem: Exception) -> str:
    about = {"error": type(problem).__name__, "message": str(problem), "status": http_status(problem)}
    return f"<swift_lora_fix>{json.dumps(about)}</swift_lora_fix>"


def told(error: Exception) -> Exception:
    """The error that a worker raised, recovered from the text that vLLM passed on."""
    found = _TOLD.search(str(error))
    if found is None:
        return error
    about = json.loads(found.group(1))
    kind = getattr(errors, about["error"], None)
    if kind is StagingError:
        return StagingError(about["message"], about["status"])
    if isinstance(kind, type) and issubclass(kind, SwiftLoraFixError):
        return kind(about["message"])
    return EngineStateError(f"{about['error']}: {about['message']}")
