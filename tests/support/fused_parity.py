"""Runs in a process of its own: one real vLLM engine on the CPU without LoRA layers, many real PEFT adapters folded in.

    python -m tests.support.fused_parity MODEL_FOLDER SYNCS CASE...

The trainer is ms-swift's own rollout mixin around a PEFT model, without the training. After each sync every parameter
of the engine is compared with a reference that shares nothing with the package: the same PEFT model in float32, merged
by ``merge_and_unload``, rounded down to bf16 and rounded up, and sent to the engine by stock ms-swift as fully trained
models. Where the merged value is a bf16 number, both are the same.

Prints one JSON object by case. ``path``: how the weights were written. ``differing``: engine elements that are neither
the one nor the other. ``lost``: the share of the update that does not arrive. ``audited``: syncs that the read-back
audit found right. ``trainer_changed``: bits of the trainer that changed. ``moved``: engine elements that the adapter
changes. ``zero_differing``: elements that differ from the plain base (the model's files, as vLLM loaded them) once the
adapter is taken out again.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.parity import CASES, PROJECTIONS, build_engine, peft_model

FUSED_CASES: dict[str, dict[str, Any]] = {
    **CASES,
    "dora": {"target_modules": PROJECTIONS, "use_dora": True},
    "dora-embed": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "pissa": {"target_modules": PROJECTIONS, "init_lora_weights": "pissa", "r": 8},
    "modules_to_save": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": PROJECTIONS, "bias": "all"},
    "lora-bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


def trainer_of(engine: Any, model: Any) -> Any:
    """ms-swift's rollout mixin, real methods on an object that was not trained with."""
    import importlib

    import torch

    from swift_lora_fix.install import releases

    family = releases.family_of(releases.installed_swift() or "0")
    assert family is not None
    mixin = importlib.import_module(family.layout.rollout_module).RolloutTrainerMixin
    trainer = mixin.__new__(type("Trainer", (mixin,), {}))
    trainer.model, trainer.engine, trainer.vllm_mode = model, engine, "colocate"
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=None), unwrap_model=lambda m: m, device=torch.device("cpu")
    )
    trainer.args = SimpleNamespace(move_model_batches=None)
    trainer._is_fsdp2 = trainer.rollout_enable_lora = trainer.base_sync_done = False
    trainer.should_merge_adapter = False
    trainer.parameter_groups, trainer.parameter_groups_no_lora = trainer.split_batches()
    return trainer


def held(engine: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in engine.inner_model.named_parameters()}


def differing(first: dict[str, Any], second: dict[str, Any]) -> int:
    return sum(int((first[name] != second[name]).sum()) for name in first)


def reference(engine: Any, trained: Any, up: bool) -> dict[str, Any]:
    """What the engine holds once the merged model was sent to it, each value rounded up, or down."""
    import torch

    merged = copy.deepcopy(trained).float().merge_and_unload()
    for parameter in merged.parameters():
        bits = parameter.data.contiguous().view(torch.int32)
        to_zero = bits & -(1 << 16)
        away = torch.where(bits == to_zero, to_zero, to_zero + (1 << 16))
        parameter.data = torch.where((bits < 0) == up, to_zero, away).view(torch.float32)
    trainer_of(engine, merged.to(torch.bfloat16))._move_full_model_to_vllm()
    return held(engine)


def run_case(engine: Any, model: Path, name: str, syncs: int, disk: dict[str, Any]) -> dict[str, Any]:
    import torch

    from swift_lora_fix.engine.vllm.handle import EngineHandle
    from swift_lora_fix.engine.vllm.weights import base
    from swift_lora_fix.engine.vllm.weights.fused import FusedWriter
    from swift_lora_fix.frameworks.swift.port import SwiftTrainer
    from swift_lora_fix.policy import adapter, merging
    from swift_lora_fix.proof import audit

    dtype = {"bf16-trainer": "bfloat16", "fp16-trainer": "float16"}.get(name, "float32")
    trained = peft_model(model, 1, FUSED_CASES.get(name, FUSED_CASES["all-linear"]), dtype)
    whole, handle, cpu = trainer_of(engine, trained), EngineHandle(engine.engine), torch.device("cpu")
    trainer = SwiftTrainer(whole)
    bound, modules = adapter.bind(trained, apart=False), merging.bind(trained, "default")
    writer = FusedWriter(handle, bound, modules, cpu, partial(base.reload, trainer, handle, bound))
    before = {n: p.detach().clone() for n, p in trained.named_parameters()}
    pushed = base.push(trainer, handle, bound, writer.changing)
    writer.accept_base(pushed)
    # PiSSA changes the trainer's base; a bias that is trained is trained with the adapter out, too; and vLLM's CPU
    # backend packs experts that it reads from files, but not those that it is sent
    packs = any("experts" in n for n in disk)
    plain = held(engine) if packs or name in ("pissa", "bias") else disk
    assert not audit.base(pushed.record, set()), "right after the push"
    result: dict[str, Any] = dict.fromkeys(("differing", "trainer_changed", "audited"), 0)
    generator = torch.Generator().manual_seed(3)
    for number in range(syncs):
        with torch.no_grad():
            for parameter in bound.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
        now = {n: p.detach().clone() for n, p in trained.named_parameters()}
        writer.begin_validation()
        writer.validate()
        report = writer.write()
        writer.finish()
        finding, rounding = audit.merged(writer)
        result["audited"] += finding is None
        result["lost"] = rounding and rounding.lost_share
        compared = number % (50 if syncs > 10 else 1) == 0
        with writer.plain_base():
            without = held(engine) if compared else {}
        result["trainer_changed"] += sum(int((now[n] != p).sum()) for n, p in trained.named_parameters())
        if not compared:
            continue
        written = held(engine)
        least, most = (reference(engine, trained, up) for up in (False, True))
        result["differing"] += sum(
            int(((value != least[name]) & (value != most[name])).sum()) for name, value in written.items()
        )
        result["zero_differing"] = differing(
            {n: t for n, t in without.items() if name != "bias" or "bias" not in n}, plain
        )
        result["moved"] = differing(written, plain)
    changed = {n for n, p in trained.named_parameters() if not torch.equal(before[n], p)}
    trained_names = {n for n, p in trained.named_parameters() if p.requires_grad}
    result["path"], result["base_changed"] = report.path, len(changed - trained_names)
    return result


def main() -> None:
    model, syncs, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    engine = build_engine(model)
    disk = held(engine)
    for name in names:
        try:
            result = run_case(engine, model, name, syncs if name == "syncs" else 2, disk)
        except Exception as error:  # reported, so that one case does not hide the others
            import traceback

            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        print("PARITY " + json.dumps({"case": name, **result}), flush=True)


if __name__ == "__main__":
    main()
