"""Runs in a process of its own: one real vLLM engine on the CPU, many real PEFT adapters, direct writes against loads.

    python -m tests.support.parity MODEL_FOLDER LORA_DTYPE SYNCS CASE...

Prints one JSON object by case. ``path``: how the writer wrote. ``differing``: slot elements where the direct write and
vLLM's own loader differ. ``trainer_changed``: bits of the trainer that changed. ``filled``: slot elements that are not
zero. For the case ``syncs``, SYNCS syncs with a new policy each, and the growth of memory over the second half.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="none", VLLM_CPU_KVCACHE_SPACE="1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
sys.path.insert(0, str(Path(__file__).parent / "plugins"))

MAX_RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": PROJECTIONS},
    "subset": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "low-rank": {"target_modules": PROJECTIONS, "r": 4},
    "rslora": {"target_modules": PROJECTIONS, "use_rslora": True, "lora_alpha": 12},
    "patterns": {
        "target_modules": PROJECTIONS,
        "r": 8,
        "lora_alpha": 12,
        "rank_pattern": {"q_proj": 16, "down_proj": 4},
        "alpha_pattern": {"v_proj": 5},
    },
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embed": {"target_modules": ["q_proj", "embed_tokens"]},
    "bf16-trainer": {"target_modules": PROJECTIONS},
    "fp16-trainer": {"target_modules": PROJECTIONS},
}


def build_engine(model: Path, lora_dtype: str = "") -> Any:
    """With LoRA layers of that dtype, or without any."""
    import slf_cpu_shims  # noqa: F401
    from vllm import LLM

    lora: dict[str, Any] = dict(enable_lora=True, max_loras=1, max_lora_rank=MAX_RANK, lora_dtype=lora_dtype)
    llm = LLM(
        str(model),
        **(lora if lora_dtype else {}),
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
    )
    engine = llm.llm_engine
    executor = engine.model_executor
    model_runner = executor.driver_worker.worker.model_runner
    return SimpleNamespace(engine=engine, inner_model_executor=executor, inner_model=model_runner.model, llm=llm)


def request_class() -> Any:
    """ms-swift's in-memory request, and its loader for it."""
    from swift_lora_fix.install import releases

    family = releases.family_of(releases.installed_swift() or "0")
    assert family is not None
    module = importlib.import_module(family.layout.rollout_module.rsplit(".", 1)[0] + ".utils")
    module.patch_vllm_load_adapter()
    return module.TensorLoRARequest


def peft_model(model: Path, seed: int, config: dict[str, Any], dtype: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    sees = hasattr(AutoConfig.from_pretrained(model), "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    base = kind.from_pretrained(model, torch_dtype=torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(**{"r": MAX_RANK, "lora_alpha": 32, **config}))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape) * 0.1).to(getattr(torch, dtype))
    return adapted


def slots(engine: Any) -> dict[str, Any]:
    """Copies of every LoRA buffer of the engine, whoever plans whatever."""
    found = {}
    for name, module in engine.inner_model.named_modules():
        for side in ("lora_a_stacked", "lora_b_stacked"):
            tensors = getattr(module, side, ())
            for index, tensor in enumerate(tensors if isinstance(tensors, (tuple, list)) else [tensors]):
                found[f"{name}.{side}.{index}"] = tensor.clone()
    return found


def differing(first: dict[str, Any], second: dict[str, Any]) -> int:
    return sum(int((first[name] != second[name]).sum()) for name in first)


def run_case(engine: Any, model: Path, config: dict[str, Any], name: str, syncs: int) -> dict[str, Any]:
    import torch

    from swift_lora_fix.engine.vllm.handle import EngineHandle
    from swift_lora_fix.engine.vllm.slots import loader
    from swift_lora_fix.engine.vllm.slots.writer import AdapterWriter
    from swift_lora_fix.policy import adapter
    from swift_lora_fix.proof import audit

    dtype = {"bf16-trainer": "bfloat16", "fp16-trainer": "float16"}.get(name, "float32")
    trained = peft_model(model, 1, config, dtype)
    cpu = torch.device("cpu")
    handle, bound = EngineHandle(engine.engine), adapter.bind(trained)
    writer = AdapterWriter(handle, bound, request_class(), cpu)
    result: dict[str, Any] = {"differing": 0, "trainer_changed": 0}
    generator = torch.Generator().manual_seed(3)
    compared = 10 if syncs > 10 else 1  # which of many are also loaded by vLLM; the read-back audit sees each
    base = {n: p.detach().clone() for n, p in trained.named_parameters() if "lora_" not in n}
    rss = []
    for number in range(syncs):
        with torch.no_grad():
            for parameter in bound.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
        before = {entry.key: entry.parameter.detach().clone() for entry in bound.entries}
        writer.begin_validation()
        writer.validate()
        report = writer.write()
        writer.finish()
        rss.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        result["audited"] = result.get("audited", 0) + (audit.adapter(writer) is None)
        result["trainer_changed"] += sum(int((before[e.key] != e.parameter).sum()) for e in bound.entries)
        if number % compared and number != syncs - 1:
            continue
        written = slots(engine)
        staged = loader.stage(bound, adapter.read_to_host(bound, cpu), handle.lora_dtype)
        loader.load(handle, bound, staged, writer.request_class)
        result["differing"] += differing(written, slots(engine))
        assert not writer.plan or not writer.is_current(), "the reference load must be noticed as a stranger's"
    result["path"] = report.path
    result["filled"] = sum(int((tensor != 0).sum()) for tensor in written.values())
    result["base_changed"] = sum(int((base[n] != p).sum()) for n, p in trained.named_parameters() if n in base)
    result["rss_growth_mib"] = (rss[-1] - rss[len(rss) // 2]) / 1024
    return result


def main() -> None:
    model, lora_dtype, syncs, names = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    engine = build_engine(model, lora_dtype)
    for name in names:
        try:
            config = CASES.get(name, CASES["all-linear"])
            result = run_case(engine, model, config, name, syncs if name == "syncs" else 3)
        except Exception as error:  # reported, so that one case does not hide the others
            result = {"error": f"{type(error).__name__}: {error}"}
        print("PARITY " + json.dumps({"case": name, **result}), flush=True)


if __name__ == "__main__":
    main()
