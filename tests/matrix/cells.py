"""The cells of the matrix: each published command in shrunken form, and other architectures and adapters.

A cell is one command, run twice with the plugin: trained until it is killed in step 2, and resumed for two more steps.
What a published argument is changed to, and why, is in ``RULES``; all others go to ``swift rlhf`` as published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .models import ARCHITECTURES

PUBLISHED = Path(__file__).with_name("published.json")
SIZE = "tiny model, short texts, few steps"
NO_FLASH = "no flash attention on a CPU"
ARCHITECTURE_OF = {
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3.5": "qwen3_5",
    "Qwen3-30B-A3B": "qwen3_moe",
    "Qwen2.5": "qwen2",
    "Qwen3-4B": "qwen3",
}


@dataclass(frozen=True)
class Rule:
    """What a published value becomes (None: the argument is left out), and why."""

    becomes: Callable[[str], Any]
    why: str


def _to(value: Any) -> Callable[[str], Any]:
    return lambda published: value


RULES: dict[str, Rule] = {
    "max_length": Rule(_to(None), SIZE),
    "max_completion_length": Rule(_to(None), SIZE),
    "vllm_max_model_len": Rule(_to(None), SIZE),
    "num_generations": Rule(lambda value: min(2, int(value)), SIZE),
    "generation_batch_size": Rule(_to(None), SIZE),
    "per_device_train_batch_size": Rule(_to(2), SIZE),
    "per_device_eval_batch_size": Rule(_to(None), SIZE),
    "gradient_accumulation_steps": Rule(lambda value: min(2, int(value)), SIZE),
    "steps_per_generation": Rule(_to(None), SIZE),
    "max_steps": Rule(_to(None), SIZE),
    "max_turns": Rule(_to(2), SIZE),
    "move_model_batches": Rule(lambda value: min(2, int(value)), SIZE),
    "vllm_tensor_parallel_size": Rule(lambda value: min(2, int(value)), "two ranks"),
    "vllm_gpu_memory_utilization": Rule(_to(None), "of a GPU's memory"),
    "attn_impl": Rule(_to("sdpa"), NO_FLASH),
    "padding_free": Rule(_to(None), NO_FLASH),
    "deepspeed": Rule(
        lambda value: value.removesuffix("_offload"), "the model is on the CPU, there is nothing to offload"
    ),
    "teacher_deepspeed": Rule(
        lambda value: value.removesuffix("_offload"), "the model is on the CPU, there is nothing to offload"
    ),
    "reward_model": Rule(_to(None), "the rewards are the tests'"),
    "reward_model_plugin": Rule(_to(None), "the rewards are the tests'"),
    "use_gym_env": Rule(_to(None), "the rewards and turns are the tests'"),
    "multi_turn_scheduler": Rule(_to("slf_turns"), "the rewards and turns are the tests'"),
    "check_model": Rule(_to(None), "a local folder"),
    "teacher_model_server": Rule(_to("TEACHER"), "a tiny one, on a port of its own"),
}
SAME = ("loss_scale", "truncation_strategy")  # as published

TRITON = "where LoRA is on, vLLM computes experts by Triton alone (fused_moe/oracle/unquantized.py)"
ONEDNN = "vLLM's INT8 kernel on a CPU keeps no weight, and its LoRA layers ask for one (lora/layers/utils.py)"
WITHOUT = "a server without LoRA layers is left alone"


# ms-swift's fsdp2 (config/fsdp2.json), but for the checkpoint: a whole adapter in place of shards
FSDP2_FULL = json.dumps(
    {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "fsdp_version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT",
            "activation_checkpointing": True,
        },
    }
)


@dataclass(frozen=True)
class Cell:
    """arguments: for ``swift rlhf``, beside the defaults of tests/support/driver.py. server: those of the ``swift
    rollout`` beside it, if any. changed: published argument -> (published value, its value here, why). needs_gpu: why
    a CPU cannot run it, or ''. stock: without this package, to show what it changes."""

    name: str
    architecture: str
    arguments: dict[str, Any]
    changed: dict[str, tuple[Any, Any, str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    needs_gpu: str = ""
    published: bool = False
    plugins: tuple[str, ...] = ()
    server: dict[str, Any] | None = None
    stock: bool = False

    @property
    def mode(self) -> str:
        has_lora = self.arguments.get("vllm_enable_lora") == "true" or self.server is not None
        return "adapter" if has_lora else "fused"

    @property
    def trainer(self) -> str:
        kinds = [str(self.arguments[name]) for name in ("deepspeed", "fsdp") if self.arguments.get(name)]
        kinds = ["fsdp2, full state" if kind == FSDP2_FULL else kind for kind in kinds]
        kinds += ["DDP"] * (self.ranks > 1 and not kinds)
        kinds += ["server"] * (self.server is not None)
        kinds += ["offload"] * any(self.arguments.get(f"offload_{what}") == "true" for what in ("model", "optimizer"))
        return ", ".join(kinds) or "plain"


def published() -> Iterator[Cell]:
    """The 18 published commands, in their order."""
    for command in json.loads(PUBLISHED.read_text())["commands"]:
        yield _shrunk(command["name"], command["arguments"], command["environment"])


def _shrunk(name: str, given: dict[str, str], environment: dict[str, str]) -> Cell:
    architecture = next(kind for part, kind in ARCHITECTURE_OF.items() if part in given["model"])
    arguments: dict[str, Any] = {"vllm_enable_lora": "false"}  # ms-swift's default
    changed: dict[str, tuple[Any, Any, str]] = {}
    for argument, value in given.items():
        if argument in ("model", "teacher_model"):
            arguments[argument], changed[argument] = "MODEL", (value, f"a tiny {architecture}", SIZE)
        elif argument in RULES:
            rule = RULES[argument]
            here = rule.becomes(value)
            if here is not None:
                arguments[argument] = here
            if str(here) != value:
                changed[argument] = (value, here, rule.why)
        else:
            arguments[argument] = value
    if given["rlhf_type"] == "gkd":
        arguments.update(reward_funcs=None, num_generations=None)
    if "teacher_model_server" in given:
        arguments["gkd_logits_topk"] = 8  # a variable of the published script
    server = None
    if given["vllm_mode"] == "server":
        server = {name: arguments[name] for name in ("multi_turn_scheduler", "max_turns") if name in arguments}
        changed["vllm_enable_lora"] = ("", "true, for swift rollout", WITHOUT)
        of_server = ("vllm_enable_lora", "vllm_enforce_eager", "vllm_max_model_len")
        arguments.update(dict.fromkeys(of_server))
    parallel = "deepspeed" in arguments or "fsdp" in arguments or arguments.get("vllm_tensor_parallel_size") == 2
    parallel |= given["rlhf_type"] == "gkd"  # ms-swift's GKD reads a launcher's variables
    return Cell(
        name,
        architecture,
        arguments,
        changed,
        ranks=2 if parallel else 1,
        needs_gpu=_why_gpu(given, architecture),
        published=True,
        plugins=("slf_turns.py",) if "multi_turn_scheduler" in given else (),
        server=server,
    )


def _why_gpu(given: dict[str, str], architecture: str) -> str:
    if given["vllm_mode"] == "server" and architecture == "qwen3_moe":
        return TRITON
    if "quant_method" in given:
        return "bitsandbytes' 4-bit layers in vLLM"
    return ""


EVERYWHERE = {"freeze_vit": "false", "freeze_aligner": "false"}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank_12": ("qwen2", {"lora_rank": 12}),
    "towers/adapter": ("qwen2_5_vl", EVERYWHERE),
    "towers/fused": ("qwen2_5_vl", {**EVERYWHERE, "vllm_enable_lora": "false"}),
    "lora_llm": ("qwen2_5_vl", {"tuner_type": "lora_llm", "vllm_enable_lora": "false", "target_modules": None}),
    "experts/fused": (
        "qwen3_moe",
        {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0,
            "vllm_enable_lora": "false",
        },
    ),
}


def _architecture_cell(architecture: str, mode: str, **arguments: Any) -> Cell:
    return Cell(
        f"architectures/{architecture}/{mode}",
        architecture,
        {"vllm_enable_lora": "true" if mode == "adapter" else "false", **arguments},
        needs_gpu=TRITON if architecture == "qwen3_moe" and mode == "adapter" else "",
    )


def others() -> Iterator[Cell]:
    """Architectures, and adapters, that no published command has."""
    for architecture in ARCHITECTURES:
        for mode in ("fused", "adapter"):
            yield _architecture_cell(architecture, mode)
    for name, (architecture, arguments) in ADAPTERS.items():
        yield Cell(f"adapters/{name}", architecture, {"vllm_enable_lora": "true", **arguments})
    yield Cell("bases/int8", "qwen2_int8", {"vllm_enable_lora": "true"}, needs_gpu=ONEDNN)
    for kind in ("gptq", "awq"):
        yield Cell(f"bases/{kind}", f"qwen2_{kind}", {"vllm_enable_lora": "true", "torch_dtype": "float16"})
    published_fsdp2 = next(cell for cell in published() if cell.arguments.get("fsdp"))
    yield dataclasses.replace(
        published_fsdp2,
        name="trainers/fsdp2_full_state",
        arguments={**published_fsdp2.arguments, "fsdp": FSDP2_FULL},
        published=False,
    )
    patterns = {"SLF_PATTERNS": json.dumps({"rank_pattern": {"q_proj": 4, "down_proj": 12}})}  # above --lora_rank 8
    plugins = ("slf_patterns.py",)
    for mode in ("adapter", "fused"):
        lora = {"vllm_enable_lora": "true" if mode == "adapter" else "false"}
        yield Cell(f"adapters/rank_12_by_pattern/{mode}", "qwen2", lora, environment=patterns, plugins=plugins)


TWINS = ("adapters/towers/fused", "grpo/internal/vllm_vl7b")


def twins() -> Iterator[Cell]:
    """What ms-swift alone does with the same commands, where that tells something: models that see images."""
    cells = {cell.name: cell for cell in (*published(), *others())}
    for name in TWINS:
        yield dataclasses.replace(cells[name], name=f"stock/{name}", published=False, stock=True)


def all_cells() -> dict[str, Cell]:
    return {cell.name: cell for cell in (*published(), *others(), *twins())}
