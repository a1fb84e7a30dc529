"""A new policy under an id that the engine may already hold.

If the worker is in this process, a write plan (engine/vllm/slots/plan.py) writes the tensors straight into vLLM's LoRA
slots. They also go into vLLM's own CPU copy of the adapter, which vLLM reloads a slot from after another adapter had
it. Otherwise, or when vLLM's loading cannot be replayed, they are sent as with ``load_inplace=True``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.peft_helper import PEFTHelper

from ..common.log import info, warning
from ..engine.vllm.slots import plan as plans
from ..policy.kinds import is_b
from . import segment, sending
from .loading import set_loaded_digest, substitute
from .request import Content, LoRATensorRequest


def update(engine: Any, request: LoRATensorRequest) -> Any:
    """Make ``engine`` serve ``request`` under its id, whatever it held there before. Reads the tensors, keeps none.

    Args:
        engine: vLLM's ``LLM``, ``LLMEngine`` or ``AsyncLLM``.
        request: a new one for each policy.

    Returns True; for an ``AsyncLLM`` an awaitable of it. The new policy does not use KV blocks of the old one, because
    its name differs (see `LoRATensorRequest`).

    Raises:
        UnsupportedAdapterError: vLLM cannot serve it; names vLLM's reason. NonFiniteAdapterError: NaN or infinity. The
            engine keeps the adapter that it has.
    """
    engine = getattr(engine, "llm_engine", engine)
    replacing = LoRATensorRequest.replacing(request)
    manager = _manager_in_reach(engine)
    if manager is None:
        return engine.add_lora(replacing)
    return _update_in_process(engine, manager, replacing)


def _update_in_process(engine: Any, manager: Any, request: LoRATensorRequest) -> bool:
    ledger = sending.ledger_of(engine)
    writer = ledger.writers.get(request.lora_int_id)
    if engine.has_unfinished_requests() or ledger.is_forgetful:
        return bool(engine.add_lora(request))
    if isinstance(writer, DirectWriter) and writer.fits(request.content):
        ledger.check(request)
        writer.write(request.content)
        writer.announce(ledger, request)
        return True
    if writer is not _GAVE_UP:
        writer = _learn(engine, manager, request)
    else:
        engine.add_lora(request)
    ledger.writers[request.lora_int_id] = writer
    return True


def _manager_in_reach(engine: Any) -> Any:
    """vLLM's ``LoRAModelManager``, if there is one worker and it is in this process; otherwise None."""
    worker = getattr(getattr(getattr(engine, "model_executor", None), "driver_worker", None), "worker", None)
    runner = getattr(worker, "model_runner", None)
    return getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)


@dataclass(frozen=True)
class _Entry:
    key: str
    shape: torch.Size


@dataclass(frozen=True)
class _Structure:
    """What a write plan needs of an adapter: its entries, in chunks (here one)."""

    entries: tuple[_Entry, ...]

    @property
    def chunks(self) -> tuple[_Structure]:
        return (self,)


@dataclass(frozen=True)
class _Slots:
    manager: Any
    adapter_id: int

    def slot_index(self) -> int | None:
        slots = list(self.manager.lora_index_to_id)
        return slots.index(self.adapter_id) if self.adapter_id in slots else None


class DirectWriter:
    """Writes the adapter of one id, in an engine in this process. ``staged`` is the CPU copy that vLLM holds of it."""

    def __init__(self, slots: _Slots, plan: plans.Plan, staged: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.slots, self.plan, self.staged, self.dtype = slots, plan, staged, dtype
        copies = [copy for _, found in plan.copies for copy in found]
        self.destinations = [copy.destination for copy in copies]
        self.regions = [copy.region(staged[copy.entry.key]) for copy in copies]

    def fits(self, content: Content) -> bool:
        shapes = {name: tensor.shape for name, tensor in content.tensors.items()}
        same = shapes == {name: tensor.shape for name, tensor in self.staged.items()}
        return same and self.slots.slot_index() == self.plan.index

    @torch.no_grad()
    def write(self, content: Content) -> None:
        """Raises NonFiniteAdapterError before anything is written."""
        held = {name: _as_held(content.tensors[name], scale, self.dtype) for name, scale in scales_of(content)}
        bad = [name for name, tensor in held.items() if not segment.is_finite(tensor)]
        if bad:
            raise segment.not_finite(bad, len(held))
        for name, tensor in held.items():
            self.staged[name].copy_(tensor)
        torch._foreach_zero_(list(self.plan.slots))  # whatever they hold now, after a sleep maybe
        torch._foreach_copy_(self.destinations, self.regions)
        if self.destinations[0].is_cuda:  # vLLM may generate on another stream
            torch.cuda.current_stream(self.destinations[0].device).synchronize()

    def announce(self, ledger: sending.Ledger, request: LoRATensorRequest) -> None:
        content = request.content
        content.version = content.version or uuid.uuid4().hex
        set_loaded_digest(self.slots.manager, request.lora_int_id, content.digest or content.version)
        address = segment.Address(0, 0, 0, content.version)
        ledger.loaded[request.lora_int_id] = (content.version, sending.wire(request, address))


def _as_held(tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as vLLM holds it: cast, and scaled in the LoRA dtype (``LoRALayerWeights.optimize``)."""
    cast = tensor.to(dtype)  # on its own device
    return cast if scale == 1.0 else cast * scale


class _GaveUp:
    """Marks an id whose loading by vLLM cannot be replayed."""


_GAVE_UP = _GaveUp()


def _learn(engine: Any, manager: Any, request: LoRATensorRequest) -> Any:
    """Have vLLM load ``request``, learn a plan from a similar adapter, and prove that a direct write does the same."""
    engine.add_lora(request)  # raises first what vLLM refuses
    dtype = engine.vllm_config.lora_config.lora_dtype
    structure = _Structure(tuple(_Entry(name, tensor.shape) for name, tensor in request.content.tensors.items()))
    staged = _pinned(plans.signature(structure, dtype))  # type: ignore[arg-type]
    slots = _Slots(manager, request.lora_int_id)
    try:
        learnt = plans.learn(structure, staged, slots, lambda: _load_staged(engine, request, staged))  # type: ignore[arg-type]
        writer = DirectWriter(slots, learnt, staged, dtype)
        writer.write(request.content)
        written = [slot.clone() for slot in learnt.slots]
        engine.add_lora(request)
        if not all(torch.equal(mine, slot) for mine, slot in zip(written, learnt.slots)):
            raise plans.PlanError("a direct write gives other values than vLLM's loader")
        _load_staged(engine, request, staged)  # from now on a direct write updates vLLM's copy
        if writer.slots.slot_index() != learnt.index:
            raise plans.PlanError("vLLM moved the adapter to another LoRA slot")
    except plans.PlanError as error:
        warning(f"updates of adapter {request.lora_int_id} are sent through vLLM's own loader: {error}.")
        engine.add_lora(request)
        return _GAVE_UP
    writer.announce(sending.ledger_of(engine), request)
    info(f"updates of adapter {request.lora_int_id} go straight into vLLM's LoRA slots, proved against its own loader.")
    return writer


def _load_staged(engine: Any, request: LoRATensorRequest, staged: dict[str, torch.Tensor]) -> None:
    """Have vLLM load ``staged`` with scaling 1, as the slots should hold it, and keep these very tensors."""
    rank = max([request.content.config["r"], *(request.content.config.get("rank_pattern") or {}).values()])
    config = {
        **request.content.config,
        **dict(r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}),
    }
    twins = {name: tensor.clone() for name, tensor in staged.items()}  # so that only vLLM's copies come from `staged`
    token = substitute.set(staged)
    try:
        engine.add_lora(LoRATensorRequest(request.lora_name, request.lora_int_id, config, twins, load_inplace=True))
    finally:
        substitute.reset(token)


def _pinned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pin the tensors where vLLM pins what it loads: it keeps a pinned tensor itself, and would copy another one."""
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if torch.cuda.is_available() else tensors


def scales_of(content: Content) -> Iterator[tuple[str, float]]:
    """For each tensor its factor in vLLM: for B the scaling that vLLM reads from the config, otherwise 1."""
    helper = PEFTHelper.from_dict(content.config)
    for name in content.tensors:
        if not is_b(name):
            yield name, 1.0
        elif hasattr(helper, "get_rank_and_scaling"):
            module = name.split(".lora_")[0].replace("base_model.model.", "", 1)
            yield name, helper.get_rank_and_scaling(module)[1]
        else:
            yield name, helper.vllm_lora_scaling_factor
