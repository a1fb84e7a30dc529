"""A vLLM engine without vLLM: plain layers, and one LoRA slot of which the plan is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from swift_lora_fix.engine.vllm.handle import ADAPTER_ID
from swift_lora_fix.engine.vllm.slots import plan
from swift_lora_fix.policy.adapter import Adapter
from swift_lora_fix.session import Session


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 10, bias=False)
        self.first = torch.nn.Linear(8, 12, bias=False)
        self.second = torch.nn.Linear(12, 4, bias=False)

    def load(self, weights: Any) -> None:
        for name, value in weights.items():
            for own, parameter in self.named_parameters():
                if own.split(".")[0] in name and value.shape == parameter.shape:
                    parameter.data.copy_(value)

    def load_weights(self, weights: Any) -> None:
        self.load(dict(weights))


class FakeEngine:
    """The surface of vLLM's LLMEngine that the handle touches."""

    def __init__(self) -> None:
        self.busy = False
        self.prefix_reset: Any = True
        self.loaded: set[int] = {ADAPTER_ID}
        self.slots: list[int | None] = [ADAPTER_ID]
        manager = SimpleNamespace(
            lora_index_to_id=self.slots, modules={"first": None, "second": None}, packed_modules={}
        )
        runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager), model=Model())
        driver = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
        self.model = runner.model
        self.model_executor = SimpleNamespace(is_sleeping=False, driver_worker=driver)
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16),
            model_config=SimpleNamespace(
                quantization=None, logits_processors=None, logprobs_mode="processed_logprobs", dtype=torch.bfloat16
            ),
            cache_config=SimpleNamespace(block_size=16),
            load_config=SimpleNamespace(load_format="auto"),
        )

    def has_unfinished_requests(self) -> bool:
        return self.busy

    def reset_prefix_cache(self) -> Any:
        return self.prefix_reset

    def reset_encoder_cache(self) -> None: ...

    def list_loras(self) -> set[int]:
        return self.loaded


class Accelerator:
    """Of one process, which shards nothing."""

    num_processes, is_main_process, device = 1, True, torch.device("cpu")
    distributed_type, state = SimpleNamespace(name="NO"), SimpleNamespace(deepspeed_plugin=None)

    def unwrap_model(self, model: Any) -> Any:
        return model


def with_plan(session: Session) -> torch.Tensor:
    """Let the writer know where the adapter lies: one after the other in one slot."""
    slots: Any = session.writer.slots
    slots.plan, slot = plan_of(session.adapter)
    return slot


def plan_of(adapter: Adapter, unused: int = 0) -> tuple[plan.Plan, torch.Tensor]:
    """A plan into one new slot that every A and B goes to, one after the other; ``unused`` elements of it stay."""
    slot = torch.zeros(sum(e.parameter.numel() for e in adapter.entries) + unused, dtype=torch.bfloat16)
    copies, start = [], 0
    for entry in adapter.entries:
        view = slot[start : start + entry.parameter.numel()].view(entry.parameter.shape)
        copies.append(plan.Copy(view, 0, entry.parameter.stride(), entry))
        start += entry.parameter.numel()
    return plan.Plan(((adapter.chunks[0], tuple(copies)),), (slot,), 0), slot


def planned(session: Session) -> Session:
    """The session, whose writer knows its plan from each binding on: as ``session.slot`` lies."""
    bind = session._bind

    def bind_and_plan(mode: Any) -> None:
        bind(mode)
        session.slot = with_plan(session)  # type: ignore[attr-defined]

    session._bind = bind_and_plan  # type: ignore[method-assign]
    return session
