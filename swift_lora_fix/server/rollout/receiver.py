"""In each of vLLM's workers: an adapter arrives, over NCCL or from shared memory, is proved, and is written to the LoRA
slots.

It arrives in a buffer laid out as the trainer staged it (engine/vllm/slots/staging.py), beside the slots that are being
served. The rest is the sync of a colocated engine (engine/vllm/slots/writer.py): a write plan learnt from vLLM's
loader, proved against it, and read back.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch

from ...common.log import info
from ...common.settings import Settings
from ...engine.vllm.handle import ADAPTER_ID, ADAPTER_PATH, WorkerHandle
from ...engine.vllm.slots import loader
from ...engine.vllm.slots.staging import Staging
from ...engine.vllm.slots.writer import AdapterWriter
from ...errors import EngineStateError, NonFiniteAdapterError, StagingError
from ...memory.segment import is_finite
from ...policy import adapter as adapters
from ...policy.model_files import base_shapes
from ..shared import Opened
from ..wire import NO_NCCL, Address, Layout, http_status
from .checks import check

_TOLD = re.compile(r"<swift_lora_fix>(.*?)</swift_lora_fix>", re.DOTALL)
CPU = torch.device("cpu")


class Received:
    """A whole adapter of this layout in one buffer on ``device``. digest: of what it holds, once that is proved."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.staging = Staging(_planned(layout), getattr(torch, layout.dtype), device, whole=True)
        self.adapter = adapters.of_tensors("default", self.tensors(), layout.config)
        self.digest: str | None = None

    @staticmethod
    def size_of(layout: Layout) -> int:
        """The bytes of the buffer."""
        return Staging(_planned(layout), getattr(torch, layout.dtype), torch.device("meta"), whole=True).buffer.nbytes

    @property
    def device(self) -> torch.device:
        return self.staging.buffer.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """By PEFT key, in the layout's order, as views of the buffer."""
        chunks = self.staging.adapter.chunks
        return {e.key: view for c in chunks for e, view in zip(c.entries, self.staging.entries(c))}

    @property
    def content(self) -> torch.Tensor:
        """The buffer as bytes, to be written to."""
        self.digest = None
        return self.staging.buffer.view(torch.uint8)

    def fill(self, content: torch.Tensor) -> None:
        """Copy ``content``, (size,), uint8. Raises StagingError when it is not as large as the buffer."""
        mine = self.content
        if content.numel() != mine.numel():
            raise StagingError(f"{content.numel()} bytes came where {mine.numel()} were announced: send it again.")
        mine.copy_(content)

    def prove(self, digest: str) -> None:
        """Raises StagingError when it holds another policy than the one with this digest, NonFiniteAdapterError when
        that is not finite."""
        found = self.staging.digest()
        if found != digest:
            raise StagingError(f"What arrived has digest {found}, {digest} was announced: send it again.")
        if not is_finite(self.staging.buffer):
            bad = [name for name, tensor in self.tensors().items() if not is_finite(tensor)]
            raise NonFiniteAdapterError(
                f"{len(bad)} of the adapter's tensors are not finite in {self.staging.dtype}, the first {min(bad)!r}. "
                "The server keeps the policy that it has."
            )
        self.digest = digest


def _planned(layout: Layout) -> adapters.Adapter:
    dtype = getattr(torch, layout.dtype)
    shapes = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in layout.entries}
    return adapters.of_tensors("default", shapes, layout.config)


class Receiver:
    """The receiver of one vLLM worker. ``worker`` is also ms-swift's extension, whose NCCL communicator is used.

    Its commands are its public methods. failures: of ms-swift's own updates of the base, which only logs them.
    """

    def __init__(self, worker: Any) -> None:
        self.worker, self.engine = worker, WorkerHandle(worker)
        self.layout: Layout | None = None
        self.received: Received | None = None
        self.writer: AdapterWriter | None = None  # reads that buffer
        self.opened = Opened()  # the memory that adapters come in
        self.served: str | None = None  # the digest of what is in the slots
        self.failures: list[str] = []
        self._loads = False  # vLLM's loading has us in it

    def prepare(self, layout: dict[str, Any]) -> None:
        """Check that an adapter of this layout can be served, and make room for it. Without room on the device it comes
        into host memory, and vLLM's own loader takes it from there."""
        asked = Layout.model_validate(layout)
        if asked == self.layout:
            return
        check(asked, self.engine.lora_config, base_shapes(self.worker.vllm_config.model_config.model))
        self.layout = self.received = self.writer = None  # free them first
        self.opened = Opened()
        direct = Settings.from_environment().writer == "direct"
        try:
            received = Received(asked, self.worker.model_runner.device)  # 0.17's CPU worker has none
        except torch.OutOfMemoryError as error:
            received, direct = Received(asked, CPU), False
            info(f"adapters come into host memory, and go through vLLM's own loader: {error}")
        writer = AdapterWriter(self.engine, received.adapter, _request_class(self.worker), received.device, direct)
        self.layout, self.received, self.writer = asked, received, writer

    def check_nccl(self) -> None:
        """Raise StagingError when an adapter cannot come over NCCL."""
        communicator = self.worker.communicator
        if communicator is None or getattr(communicator, "disabled", False):
            raise StagingError("The server's vLLM workers have no NCCL connection to this trainer.", NO_NCCL)
        if self.received is None or self.received.device.type != torch.device(communicator.device).type:
            raise StagingError("The server's vLLM workers have no room for the adapter on their devices.", NO_NCCL)

    @torch.no_grad()
    def receive(self, digest: str, memory: dict[str, Any] | None) -> None:
        """Receive the adapter with this digest, from ``memory`` or over NCCL. It is not served yet. Raises StagingError
        or NonFiniteAdapterError."""
        assert self.received is not None, "prepare() comes first"
        content = self.received.content
        if memory is None:
            stream = torch.cuda.current_stream(content.device) if content.is_cuda else None
            self.worker.communicator.broadcast(content, src=self.worker.client_rank, stream=stream)
        else:
            self.received.fill(self.opened.at(Address.model_validate(memory), pins=content.is_cuda))
        self.received.prove(digest)

    @torch.no_grad()
    def serve(self, digest: str, by_reference: bool = False) -> None:
        """Write the adapter with this digest, which must be here, into the LoRA slots, and read it back. by_reference:
        through vLLM's own loader, for a repair: what a broken policy left in the KV cache's memory goes, too."""
        assert self.writer is not None and self.received is not None, "prepare() comes first"
        if self.received.digest != digest:
            raise StagingError(f"The server no longer has the adapter with digest {digest}: send it.")
        self.served = None
        if not self.writer.is_current():
            self.writer.forget()  # another writer changed the slots
        if by_reference:
            self.engine.clear_kv_memory()
        report = self.writer.write_by_reference() if by_reference else self.writer.write()
        self.writer.finish()
        if report.digest != digest:
            raise EngineStateError(f"vLLM's LoRA layers were given {report.digest} where {digest} was to be served.")
        if self.writer.plan is not None and self.writer.read_back() != self.writer.expected:
            self.writer.forget()
            raise EngineStateError("vLLM's LoRA slots do not hold what was written to them.")
        self.writer.accept()
        self.served = digest
        self._load_what_vllm_dropped()

    def _load_what_vllm_dropped(self) -> None:
        """An idle data-parallel rank runs a dummy batch, after which vLLM drops all adapters. It asks for ours again
        with the next request: then its own loader gets it from the buffer."""
        if self._loads:
            return
        manager = self.worker.model_runner.lora_manager
        load, self._loads = manager._load_adapter, True

        def loading(request: Any) -> Any:
            if request.lora_int_id == ADAPTER_ID and request.lora_path == ADAPTER_PATH and self.received is not None:
                if not hasattr(request, "lora_tensors"):
                    request = self._request()
            return load(request)

        manager._load_adapter = loading

    def _request(self) -> Any:
        received = self.received
        assert received is not None
        if received.digest is None or received.digest != self.served:
            raise EngineStateError("vLLM dropped the adapter that is served, and the next one is here already.")
        held = adapters.read_to_host(received.adapter, received.device)
        staged = loader.stage(received.adapter, held, received.staging.dtype)
        return loader.request(received.adapter, staged, _request_class(self.worker))

    def begin_push(self) -> None:
        self.failures = []

    def end_push(self) -> None:
        """Raise EngineStateError when ms-swift could not load what its trainer sent since ``begin_push``."""
        if self.failures:
            raise EngineStateError(
                f"{len(self.failures)} updates over NCCL failed in vLLM, the first: {self.failures[0]}"
            )


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


def told(error: Exception) -> dict[str, Any]:
    """An error as a worker's answer: class, message, and HTTP status or None. vLLM passes on only a text."""
    found = _TOLD.search(str(error))
    if found is not None:
        about: dict[str, Any] = json.loads(found.group(1))
        return about
    return {"error": type(error).__name__, "message": str(error), "status": http_status(error)}
