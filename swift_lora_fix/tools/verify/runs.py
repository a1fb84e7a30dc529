"""Starts the runs: one real GRPO run of a few steps with the plugin, one without. ``swift rlhf``, or TRL (trl.py)."""

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
from pathlib import Path
from typing import Any, Callable

from ...errors import MissingPackageError, VerificationError
from ...install import releases
from ..plugin import PLUGIN_FILE
from .facts import Request, Side, Sync
from .inputs import check_model, prepare, rank_of, resolve

OBSERVER = Path(__file__).parent / "plugin" / "swift_lora_fix_verify.py"
COMMON = {  # of both frameworks' runs
    "max_completion_length": 16,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "learning_rate": 0,
    "lr_scheduler_type": "constant",
    "beta": 0,
    "logging_steps": 1,
    "report_to": "none",
}
EXCEPTION = re.compile(r"^(\[rank\d+\]:\s*)?[\w.]*(Error|Exception|Interrupt)\b")


def run(request: Request, folder: Path, progress: Callable[[str, int], None]) -> tuple[Side, Side]:
    """Run ours, then stock's; files go to ``folder``. Calls progress(name, syncs so far).

    Raises:
        VerificationError: the model, the adapter's folder or its configuration cannot be had, ``folder`` cannot be
            written, or our run wrote nothing.
        MissingPackageError: the framework is not installed.
    """
    check_model(request.model)
    is_swift = request.framework == "ms-swift"
    swift = _swift_folder() if is_swift else _trl_script()
    adapter_folder = resolve(request.adapter, request.use_hf, request.framework)
    rank = rank_of(adapter_folder)
    prompts = prepare(folder, request.syncs, request.framework)
    command = (_swift_command if is_swift else _trl_command)(request, swift, adapter_folder, rank, prompts)
    plugins = [PLUGIN_FILE, OBSERVER] if is_swift else []
    ours = _start("fixed", command, plugins, folder / "ours", {}, progress)
    if not ours.syncs:
        raise VerificationError(
            f"The run with the plugin made no sync: {ours.ending or 'no reason given'} Log: {ours.log}"
        )
    off = {"SWIFT_LORA_FIX": "off", "SWIFT_LORA_FIX_VERIFY_FLOORS": json.dumps(ours.floors)}
    stock = _start("stock", command, plugins[1:], folder / "stock", off, progress)
    return ours, stock


def _swift_folder() -> Path:
    spec = importlib.util.find_spec("swift")
    if releases.installed_swift() is None or spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("ms-swift is not installed in this environment: pip install ms-swift")
    return Path(list(spec.submodule_search_locations)[0])


def _trl_script() -> Path:
    for package, what in (("trl", "TRL"), ("vllm", "vLLM"), ("peft", "PEFT")):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{what} is not installed in this environment: pip install {package}")
    return Path(__file__).with_name("trl.py")


def _trl_command(request: Request, script: Path, adapter_folder: Path, rank: int, prompts: Path) -> list[str]:
    arguments: dict[str, Any] = {
        "model": request.model,
        "adapter": adapter_folder.resolve(),
        "prompts": prompts.resolve(),
        "vllm_max_model_length": 1024,
        "vllm_gpu_memory_utilization": 0.4,
        **COMMON,
        "max_steps": request.syncs,
        **({} if _has_gpu() else {"use_cpu": "true"}),
    }
    return _with_extra([sys.executable, "-m", f"{__package__}.{script.stem}"], arguments, request.extra)


def _swift_command(request: Request, swift: Path, adapter_folder: Path, rank: int, prompts: Path) -> list[str]:
    version = releases.installed_swift()
    family = (releases.family_of(version) if version else None) or releases.FAMILIES[-1]
    arguments: dict[str, Any] = {
        "rlhf_type": "grpo",
        "model": request.model,
        "adapters": adapter_folder.resolve(),
        "dataset": prompts.resolve(),
        "reward_funcs": "swift_lora_fix_none",
        family.layout.tuner_argument: "lora",
        "lora_rank": releases.engine_rank(rank) or rank,  # stock gives it to vLLM as it is
        "use_vllm": "true",
        "vllm_mode": "colocate",
        "vllm_enable_lora": "true",
        "vllm_max_model_len": 1024,
        "vllm_gpu_memory_utilization": 0.4,
        "torch_dtype": "bfloat16",
        **COMMON,
        "max_steps": request.syncs,
        "add_version": "false",
        **({"use_hf": "true"} if request.use_hf else {}),
        **({} if _has_gpu() else {"use_cpu": "true", "vllm_enforce_eager": "true"}),
    }
    return _with_extra([sys.executable, str(swift / "cli" / "rlhf.py")], arguments, request.extra)


def _with_extra(command: list[str], arguments: dict[str, Any], extra: Sequence[str]) -> list[str]:
    """The command with ``arguments``, of which those that ``extra`` names are left out."""
    for name in [word[2:] for word in extra if word.startswith("--")]:
        arguments.pop(name, None)
    return [*command, *(word for name, value in arguments.items() for word in (f"--{name}", str(value))), *extra]


def _start(
    name: str,
    command: Sequence[str],
    plugins: Sequence[Path],
    folder: Path,
    environment: dict[str, str],
    progress: Callable[[str, int], None],
) -> Side:
    records, log = folder / "syncs.jsonl", folder / "log.txt"
    records.unlink(missing_ok=True)  # of an earlier verification with the same --out
    environment = {
        **os.environ,
        "SWIFT_LORA_FIX_ON_MISMATCH": "warn",  # measure every sync, stop at none
        "SWIFT_LORA_FIX_GATE_EVERY": "0",
        "SWIFT_LORA_FIX_VERIFY_FILE": str(records),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **environment,
    }
    if not _has_gpu():
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    extra = ["--external_plugins", *map(str, plugins)] if plugins else []
    extra += ["--output_dir", str(folder / "run")]
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
    seen = [json.loads(line) for line in _lines(records)]
    floors = seen[0]["floors"] if seen else {}
    return Side(name, tuple(map(_sync, seen)), "" if code == 0 else _last_words(log, code), log, floors)


def _sync(record: dict[str, Any]) -> Sync:
    verdict = record["verdict"]
    return Sync(
        step=record["step"],
        seconds=record["seconds"],
        mean=verdict["distance"]["mean"],
        max=verdict["distance"]["max"],
        kl=verdict["distance"]["kl"],
        noise=verdict["noise"],
        ratio=verdict["ratio"],
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
    """Why a run ended: a signal, or the last exception in its log."""
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
