"""Starts the runs: one real ``swift rlhf`` GRPO run of a few steps with the plugin, one without."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from ...errors import MissingPackageError, VerificationError
from ...install import releases
from ..doctor.facts import PLUGIN_FILE

OBSERVER = PLUGIN_FILE.parent / "verify" / "swift_lora_fix_verify.py"
PROMPTS = ("Name a colour of the sky.", "What is two plus two?", "Which animal barks?", "Write one short sentence.")
EXCEPTION = re.compile(r"^(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b")
RESOLVE = """
import sys
try:
    from swift.utils import safe_snapshot_download
except ImportError:
    from swift.llm import safe_snapshot_download
print("FOLDER " + safe_snapshot_download(sys.argv[1], use_hf=sys.argv[2] == "true" or None))
"""


@dataclass(frozen=True)
class Sync:
    """One sync as the observer saw it. Logprob differences are in nats a token; base_changed counts the trainer's base
    tensors (of base_tensors) whose bits are no longer those of the start; lora_changed the trainer's LoRA tensors (of
    lora_tensors) that this sync changed, in dtype or in value."""

    step: int
    seconds: float
    mean: float
    max: float
    kl: float
    floor: float
    control_base: float
    control_double: float
    agrees: bool
    is_distinguishable: bool
    cause: str | None
    base_changed: int
    base_tensors: int
    lora_changed: int
    lora_tensors: int


@dataclass(frozen=True)
class Request:
    """What to verify. extra: more ms-swift arguments, which win over ours."""

    model: str
    adapter: str
    use_hf: bool
    syncs: int
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One of the two runs. ending: why it stopped early, in its own last words; empty when it reached its end."""

    name: str
    syncs: tuple[Sync, ...]
    ending: str
    log: Path


def run(request: Request, folder: Path, progress: Callable[[str, int], None]) -> tuple[Side, Side]:
    """Ours and stock's run, one after the other; files go to ``folder``. progress(name, syncs so far).

    Raises:
        VerificationError: the adapter's folder or configuration cannot be had, or our run wrote nothing.
        MissingPackageError: ms-swift is not installed.
    """
    adapter_folder = resolve(request.adapter, request.use_hf)
    command = _command(request, adapter_folder, folder)
    ours = _start("fixed", command, [PLUGIN_FILE, OBSERVER], folder / "ours", {}, progress)
    if not ours.syncs:
        raise VerificationError(
            f"The run with the plugin made no sync: {ours.ending or 'no reason given'} Log: {ours.log}"
        )
    floor = json.dumps([ours.syncs[0].floor, 0.0, 0.0])
    off = {"SWIFT_LORA_FIX": "off", "SWIFT_LORA_FIX_VERIFY_FLOOR": floor}
    stock = _start("stock", command, [OBSERVER], folder / "stock", off, progress)
    return ours, stock


def resolve(adapter: str, use_hf: bool) -> Path:
    """The adapter's local folder; what is not one is downloaded by ms-swift itself, as its ``--adapters`` does."""
    if not os.path.isdir(adapter):
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, adapter, str(use_hf).lower()], capture_output=True, text=True
        )
        found = [line[7:] for line in done.stdout.splitlines() if line.startswith("FOLDER ")]
        if not found:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise VerificationError(
                f"The adapter {adapter!r} is no local folder, and ms-swift could not download it: {last}. Give a PEFT "
                "adapter folder, or an id of ModelScope (of Hugging Face with --use_hf true)."
            )
        adapter = found[0]
    return Path(adapter)


def rank_of(folder: Path) -> int:
    """The largest rank in the adapter's PEFT configuration. Raises VerificationError naming what is missing."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{file} is no PEFT LoRA configuration: {error!r}. Give a PEFT adapter folder."
        ) from error


def _command(request: Request, adapter_folder: Path, folder: Path) -> list[str]:
    version = releases.installed_swift()
    spec = importlib.util.find_spec("swift")
    if version is None or spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("ms-swift is not installed in this environment: pip install ms-swift")
    family = releases.family_of(version) or releases.FAMILIES[-1]
    folder.mkdir(parents=True, exist_ok=True)
    dataset = folder / "prompts.jsonl"
    rows = [json.dumps({"messages": [{"role": "user", "content": PROMPTS[i % 4]}]}) for i in range(8 * request.syncs)]
    dataset.write_text("\n".join(rows) + "\n")
    arguments: dict[str, Any] = {
        "rlhf_type": "grpo",
        "model": request.model,
        "adapters": adapter_folder.resolve(),
        "dataset": dataset.resolve(),
        "reward_funcs": "swift_lora_fix_none",
        family.layout.tuner_argument: "lora",
        "lora_rank": rank_of(adapter_folder),
        "use_vllm": "true",
        "vllm_mode": "colocate",
        "vllm_enable_lora": "true",
        "vllm_max_model_len": 1024,
        "vllm_gpu_memory_utilization": 0.4,
        "torch_dtype": "bfloat16",
        "max_completion_length": 16,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": request.syncs,
        "save_strategy": "no",
        "learning_rate": 0,
        "lr_scheduler_type": "constant",
        "beta": 0,
        "logging_steps": 1,
        "report_to": "none",
        "add_version": "false",
        **({"use_hf": "true"} if request.use_hf else {}),
        **({} if _has_gpu() else {"use_cpu": "true", "vllm_enforce_eager": "true"}),
    }
    for name in [word[2:] for word in request.extra if word.startswith("--")]:
        arguments.pop(name, None)
    command = [sys.executable, f"{list(spec.submodule_search_locations)[0]}/cli/rlhf.py"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    return [*command, *request.extra]


def _start(
    name: str,
    command: Sequence[str],
    plugins: Sequence[Path],
    folder: Path,
    environment: dict[str, str],
    progress: Callable[[str, int], None],
) -> Side:
    folder.mkdir(parents=True, exist_ok=True)
    records, log = folder / "syncs.jsonl", folder / "log.txt"
    environment = {
        **os.environ,
        "SWIFT_LORA_FIX_ON_MISMATCH": "warn",  # every sync is to be measured
        "SWIFT_LORA_FIX_GATE_EVERY": "0",
        "SWIFT_LORA_FIX_VERIFY_FILE": str(records),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **environment,
    }
    if not _has_gpu():
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    extra = ["--external_plugins", *map(str, plugins), "--output_dir", str(folder / "run")]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, *extra],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while True:
                progress(name, len(_lines(records)))
                try:
                    code = process.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Side(name, tuple(map(_sync, _lines(records))), "" if code == 0 else _last_words(log, code), log)


def _sync(line: str) -> Sync:
    record = json.loads(line)
    verdict = record["verdict"]
    return Sync(
        step=record["step"],
        seconds=record["seconds"],
        mean=verdict["distance"]["mean"],
        max=verdict["distance"]["max"],
        kl=verdict["distance"]["kl"],
        floor=verdict["floor"]["mean"],
        control_base=verdict["control_base"],
        control_double=verdict["control_double"],
        agrees=record["agrees"],
        is_distinguishable=record["is_distinguishable"],
        cause=record["cause"],
        base_changed=record["base_changed"],
        base_tensors=record["base_tensors"],
        lora_changed=record["lora_changed"],
        lora_tensors=record["lora_tensors"],
    )


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _last_words(log: Path, code: int) -> str:
    """Why a run ended: by a signal, or by the last exception of its log."""
    if code < 0:
        hint = ", out of memory perhaps" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    errors = [line for line in log.read_text(errors="replace").splitlines() if EXCEPTION.search(line)]
    return re.sub(r"^\[rank\d+\]:\s*", "", errors[-1].strip())[:300] if errors else f"exit status {code}"


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
