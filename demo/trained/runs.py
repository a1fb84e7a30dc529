"""The four runs of the demonstration: real ``swift rlhf`` GRPO with LoRA and a colocated vLLM engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.trained.task import write_questions
from tests.support.driver import REPOSITORY, Run, this_python

TASK_PLUGIN = Path(__file__).resolve().parent / "plugins" / "slf_demo_task.py"
REFERENCE, KILLED, STOCK, PLUGIN = "reference", "killed", "stock", "plugin"
WHAT = {
    REFERENCE: "from scratch with the plugin, never interrupted: what should happen",
    KILLED: "the same, killed outright some steps after its checkpoint",
    STOCK: "resumed from that checkpoint without the plugin",
    PLUGIN: "resumed from that checkpoint with the plugin",
}


@dataclass(frozen=True)
class Setting:
    """How long the runs are, and ms-swift's arguments for this kind of machine.

    A run has ``steps`` steps, the killed one leaves the checkpoint of step ``checkpoint`` and dies in the batch of step
    ``kill``.
    """

    steps: int
    checkpoint: int
    kill: int
    prompts: int  # a step, each with 8 answers
    minutes: str  # what it takes, measured
    arguments: dict[str, Any] = field(default_factory=dict)


COMMON: dict[str, Any] = {
    "model_type": "qwen2",
    "template": "chatml",
    "reward_funcs": "slf_sum",
    "lora_rank": 16,
    "lora_alpha": 32,
    "vllm_max_model_len": 128,
    "max_length": 64,
    "max_completion_length": 16,
    "num_generations": 8,
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "save_total_limit": 4,
    "seed": 42,
}
CPU = Setting(30, 18, 20, 2, "40", {"learning_rate": 1e-3})
GPU = Setting(60, 40, 44, 8, "6", {
    "learning_rate": 1e-3,
    "vllm_gpu_memory_utilization": 0.2,
    "vllm_engine_kwargs": '{"kv_cache_memory_bytes": 2147483648}',  # several engines start at once: nothing to measure
})  # fmt: skip


def setting(gpu: bool) -> Setting:
    return GPU if gpu else CPU


def make(name: str, folder: Path, model: Path, gpu: bool, plan: Setting) -> Run:
    """The run ``name`` in ``folder``/``name``; it has to be started. The resumes need the killed run's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        **COMMON,
        "dataset": write_questions(folder / "questions.jsonl"),
        "per_device_train_batch_size": 8 * plan.prompts,
        "max_steps": plan.steps,
        "save_steps": plan.checkpoint,
        **plan.arguments,
    }
    if name in (STOCK, PLUGIN):
        arguments["resume_from_checkpoint"] = checkpoint(folder, plan)
    environment = {
        "PYTHONPATH": _python_path(),
        "SLF_DEMO_RECORD": str(folder / name / "batches.jsonl"),
        **({"SLF_DEMO_KILL_AT_STEP": str(plan.kill)} if name == KILLED else {}),
    }
    return Run(
        name,
        this_python(),
        model,
        folder / name,
        name != STOCK,
        arguments=arguments,
        environment=environment,
        last_plugins=(TASK_PLUGIN,),
        gpu=gpu,
        probe=False,
        helpers=False,
    )


def checkpoint(folder: Path, plan: Setting) -> Path:
    return folder / KILLED / "run" / f"checkpoint-{plan.checkpoint}"


def batches(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the task's plugin recorded of a run so far (``task.record_of``), without a line that is being written."""
    path = folder / name / "batches.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _python_path() -> str:
    """This repository first: the task is imported from it."""
    import os

    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
