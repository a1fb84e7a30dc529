"""Every real run is started once, some at a time, as soon as a selected test needs it; the tests wait for theirs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import PriorityQueue
from typing import Any, Callable

import pytest

from swift_lora_fix.install import releases
from tests.support import faults
from tests.support.driver import PLUGINS, Example, Run, Verification, make_model, this_python

FAMILY = releases.family_of(releases.installed_swift() or "0")
assert FAMILY is not None, "the suite runs with a release of the table"
DOUBLE_COUNTS = FAMILY.has(releases.DOUBLE_COUNT) or FAMILY.has(releases.DOUBLE_COUNT_ON_RESUME)
DOWNCASTS = FAMILY.has(releases.LORA_DOWNCAST)
FIRST_BATCH_BASE = FAMILY.has(releases.FIRST_BATCH_BASE)
CHECKPOINT_STEP = 2
LAST_STEP = 6


class Runs:
    """The runs of this environment. One whose ``needs`` are not finished takes no place from another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(max_workers=int(os.environ.get("SLF_PARALLEL_RUNS", "3")))
        self.futures: dict[str, Future[Run]] = {}
        self.ready: PriorityQueue[tuple[int, str]] = PriorityQueue()
        self.model = make_model(this_python(), folder / "models")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "train_fixed" / "run" / f"checkpoint-{CHECKPOINT_STEP}"

    def start(self, name: str) -> Future[Run]:
        if name not in self.futures:
            needs, _ = SCENARIOS[name]
            self.futures[name] = Future()
            left = iter([self.start(other) for other in needs])

            def submit_or_wait(_: object = None) -> None:
                waited_for = next(left, None)
                if waited_for is None:
                    self.ready.put((list(SCENARIOS).index(name), name))
                    self.pool.submit(self._run_first)
                else:
                    waited_for.add_done_callback(submit_or_wait)

            submit_or_wait()
        return self.futures[name]

    def _run_first(self) -> None:
        _, name = self.ready.get()
        needs, build = SCENARIOS[name]
        try:
            for other in needs:
                self.futures[other].result()
            self.futures[name].set_result(build(self, name).start())
        except BaseException as error:  # the test's to raise
            self.futures[name].set_exception(error)

    def get(self, name: str) -> Run:
        return self.start(name).result()

    def make(self, name: str, fixed: bool, environment: dict[str, str] | None = None, **arguments: object) -> Run:
        ranks = int(arguments.pop("ranks", 1))  # type: ignore[call-overload]
        plugins = arguments.pop("plugins", ())
        return Run(
            name,
            this_python(),
            self.model,
            self.folder / name,
            fixed,
            arguments=dict(arguments),
            environment=environment or {},
            plugins=plugins,  # type: ignore[arg-type]
            ranks=ranks,
        )


FROZEN = {"SLF_FREEZE": "1", "SLF_DROP_ADAPTER_AT_STEP": str(LAST_STEP)}


def _train(runs: Runs, name: str) -> Run:
    """From scratch, killed outright in step 3 as a preempted machine would be; checkpoint-2 is left behind."""
    return runs.make(name, fixed=True, environment={"SLF_KILL_AT_STEP": "3"})


def _resume(fixed: bool) -> Callable[[Runs, str], Run]:
    """Issue 8233: resume with a reference adapter, learning rate 0; before the last step the adapter is lost."""

    def build(runs: Runs, name: str) -> Run:
        return runs.make(
            name,
            fixed,
            FROZEN,
            resume_from_checkpoint=runs.checkpoint,
            ref_adapters=runs.checkpoint,
            beta=0.04,
            max_steps=LAST_STEP + 1,
            save_steps=100,
        )

    return build


def _adapters(fixed: bool, **arguments: object) -> Callable[[Runs, str], Run]:
    def build(runs: Runs, name: str) -> Run:
        return runs.make(name, fixed, adapters=runs.checkpoint, max_steps=3, save_steps=100, **arguments)

    return build


def _ddp(fixed: bool) -> Callable[[Runs, str], Run]:
    def build(runs: Runs, name: str) -> Run:
        return runs.make(name, fixed, ranks=2, max_steps=3, save_steps=100)

    return build


def _sharded(environment: dict[str, str], **arguments: object) -> Callable[[Runs, str], Run]:
    """Two ranks that hold half of every parameter each."""

    def build(runs: Runs, name: str) -> Run:
        plugins = (PLUGINS / "slf_sharded_shims.py",)
        return runs.make(name, True, environment, ranks=2, plugins=plugins, max_steps=4, save_steps=100, **arguments)

    return build


def _faults(runs: Runs, name: str) -> Run:
    run = runs.make(
        name,
        True,
        faults.environment(runs.folder / name),
        adapters=runs.checkpoint,
        max_steps=len(faults.FAULTS) + 3,
        save_steps=100,
        max_length=220,  # room for a probe longer than a block of the prefix cache
    )
    run.probe, run.last_plugins = False, (PLUGINS / "slf_faults.py",)
    return run


def forked(runs: Runs, name: str, source: Path, *options: str) -> tuple[Path, dict[str, object]]:
    """The folder that `swift-lora-fix fork` makes, and the arguments that it prints; its output is kept beside it."""
    target = runs.folder / "forks" / name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    command = [this_python().with_name("swift-lora-fix"), "fork", source, target, *options]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    target.with_suffix(".txt").write_text(done.stdout)
    words = shlex.split(next(line for line in done.stdout.splitlines() if line.strip().startswith("--model")))
    return target, {key[2:]: value for key, value in zip(words[::2], words[1::2])}


def _fork(runs: Runs, name: str) -> Run:
    """From fp32 to bf16 with a fresh optimizer, or over fp16 to bf16 with the trainer's state; started as printed."""
    source = runs.checkpoint.parent
    if DOUBLE_COUNTS:
        source, _ = forked(runs, "fp16", source, "--dtype", "fp16", "--with-trainer-state")
        _, arguments = forked(runs, name, source, "--dtype", "bf16", "--with-trainer-state")
        return runs.make(name, True, {"SLF_FREEZE": "1"}, max_steps=CHECKPOINT_STEP + 2, save_steps=100, **arguments)
    _, arguments = forked(runs, name, source, "--dtype", "bf16", "--step", str(CHECKPOINT_STEP))
    return runs.make(name, True, {"SLF_FREEZE": "1"}, max_steps=2, save_steps=100, **arguments)


def _emptied(fixed: bool) -> Callable[[Runs, str], Run]:
    """A fork whose adapter somebody emptied afterwards: file and trainer agree, and both hold nothing."""

    def build(runs: Runs, name: str) -> Run:
        from safetensors.torch import load_file, save_file

        target, arguments = forked(runs, name, runs.checkpoint.parent)
        file = target / "adapter_model.safetensors"
        tensors = {key: tensor * ("lora_A" in key) for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return runs.make(name, fixed, max_steps=2, save_steps=100, **arguments)

    return build


FUSED = {
    # in one adapter what the LoRA kernels of vLLM cannot serve: magnitudes, a module that is trained whole
    "dora": dict(use_dora="true", modules_to_save="lm_head"),
    # a changed base, ranks and scalings of their own, embeddings
    "pissa": dict(init_weights="pissa", target_modules=["all-linear", "all-embedding"]),
}


def _fused(adapter: str, resume: bool) -> Callable[[Runs, str], Run]:
    """Fused mode: three steps; resumed after the second one with the policy frozen, and broken before the last step."""

    def build(runs: Runs, name: str) -> Run:
        arguments: dict[str, object] = dict(FUSED[adapter], vllm_enable_lora="false")
        environment = {"SWIFT_LORA_FIX_GATE_EVERY": "1"}
        plugins = (PLUGINS / "slf_patterns.py",) if adapter == "pissa" else ()
        if not resume:
            return runs.make(name, True, environment, plugins=plugins, max_steps=3, **arguments)
        checkpoint = runs.folder / f"fused_{adapter}" / "run" / f"checkpoint-{CHECKPOINT_STEP}"
        arguments.update(resume_from_checkpoint=checkpoint, max_steps=5, save_steps=100)
        environment.update(SLF_FREEZE="1", SLF_PLAIN_BASE_AT_STEP="4")
        return runs.make(name, True, environment, plugins=plugins, **arguments)

    return build


def _auto(runs: Runs, name: str) -> Run:
    """Measured in the first rollout, decided at the second sync, and taken back once too much of the update is lost."""
    environment = {"SWIFT_LORA_FIX_MODE": "auto", "SWIFT_LORA_FIX_GATE_EVERY": "1"}
    environment["SLF_SET_AT_STEP"] = "3:SWIFT_LORA_FIX_LOST_SHARE=0.001"
    # so that it is a plugin that makes the fused mode faster, no machine; and that a little is lost
    plugins = (PLUGINS / "slf_slow_lora.py", PLUGINS / "slf_lossy.py")
    return runs.make(name, True, environment, plugins=plugins, max_steps=6, save_steps=100)


def _faults_offloaded(runs: Runs, name: str) -> Run:
    run = _faults(runs, name)
    run.arguments.update(offload_model="true", offload_optimizer="true")
    return run


def _faults_fused(runs: Runs, name: str) -> Run:
    run = _faults(runs, name)
    run.arguments.update(vllm_enable_lora="false")
    return run


def _offloaded(runs: Runs, name: str) -> Run:
    """The flags of ms-swift's own examples: the trainer's model is away while rollouts are made, so the gate asks then
    and judges afterwards. In step 2 somebody empties the engine's LoRA slots: the rollouts are made again. There is
    room for the long prompts of the probe, too."""
    run = runs.make(
        name,
        True,
        {
            "SWIFT_LORA_FIX_GATE_EVERY": "1",
            "SWIFT_LORA_FIX_ON_MISMATCH": "repair",
            "SLF_FAULTS": "none,zeroed,none,none",
            "SLF_FAULTS_FILE": str(runs.folder / name / "faults.jsonl"),
        },
        adapters=runs.checkpoint,
        top_k=-1,  # the defaults from ms-swift 4.0.3 on; before, vLLM's logprobs are of what top_p leaves
        top_p=1.0,
        offload_model="true",
        offload_optimizer="true",
        max_steps=4,
        save_steps=100,
        max_length=700,
        vllm_max_model_len=768,
    )
    run.probe, run.last_plugins = False, (PLUGINS / "slf_faults.py",)
    return run


def _media(runs: Runs, name: str) -> Run:
    """Qwen2.5-VL, an image with every other prompt; whatever has one is also asked with it."""
    model = make_model(this_python(), runs.folder / "vision", "qwen2_5_vl")
    environment = {
        "SWIFT_LORA_FIX_GATE_EVERY": "1",
        "SLF_MEDIA_FILE": str(runs.folder / name / "media.jsonl"),
        "PYTHONPATH": os.pathsep.join([str(PLUGINS.parent / "vision"), os.environ.get("PYTHONPATH", "")]).strip(":"),
    }
    run = runs.make(
        name,
        True,
        environment,
        plugins=(PLUGINS / "slf_vision.py",),
        model_type="qwen2_5_vl",
        template="qwen2_5_vl",
        dataset=model.parent / "pictures.jsonl",
        vllm_limit_mm_per_prompt='{"image": 1}',
        vllm_max_model_len=512,
        max_length=448,
        attn_impl="sdpa",
        torch_dtype="float32",  # what is off by more than 1e-4 is no rounding
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=3,
        save_steps=100,
    )
    run.model, run.probe, run.last_plugins = model, False, (PLUGINS / "slf_media.py",)
    return run


@dataclass
class CellRun:
    """A cell of the matrix (tests/matrix): two runs of one command. ``record``: what came of it."""

    name: str
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def start(self) -> CellRun:
        from tests.matrix import cells, running

        self.record = running.run(cells.all_cells()[self.name], self.folder)
        return self


def _cell(cell: str) -> Callable[[Runs, str], CellRun]:
    return lambda runs, name: CellRun(cell, runs.folder / "matrix")


def _verify(runs: Runs, name: str) -> Verification:
    return Verification(runs.model, runs.checkpoint, runs.folder / name, ("--syncs", "3", "--json"))


def _example(runs: Runs, name: str) -> Example:
    """The example that most users need: a resume, two steps."""
    run = Example(name, this_python(), runs.model, runs.folder / name, fixed=True, script="grpo_resume.sh")
    run.arguments = {"max_steps": CHECKPOINT_STEP + 2, "save_steps": 100}
    run.environment.update(CHECKPOINT=str(runs.checkpoint), SLF_FREEZE="1")
    return run


def _example_fused(runs: Runs, name: str) -> Example:
    """Fused, with both offloads: three steps. The tests' probe would need the model, which is away: the gate looks."""
    script = "grpo_fused_offload.sh"
    run = Example(name, this_python(), runs.model, runs.folder / name, fixed=True, probe=False, script=script)
    run.arguments = {"max_steps": 3, "save_steps": 100, "vllm_enable_lora": "false", "sleep_level": 0}  # awake on a CPU
    run.environment["SWIFT_LORA_FIX_GATE_EVERY"] = "1"
    return run


# In the order in which they start: first what others need or what takes long.
SCENARIOS: dict[str, tuple[tuple[str, ...], Callable[[Runs, str], Any]]] = {
    "train_fixed": ((), _train),
    "fused_dora": ((), _fused("dora", resume=False)),
    "fused_pissa": ((), _fused("pissa", resume=False)),
    "faults": (("train_fixed",), _faults),
    "verify": (("train_fixed",), _verify),
    "zero3_fixed": ((), _sharded({"DS_ACCELERATOR": "cpu"}, deepspeed="zero3")),
    "fsdp2_fixed": ((), _sharded({}, fsdp="fsdp2")),
    "ddp_fixed": ((), _ddp(True)),
    "ddp_stock": ((), _ddp(False)),
    "fused_auto": ((), _auto),
    "faults_offloaded": (("train_fixed",), _faults_offloaded),
    "faults_fused": (("train_fixed",), _faults_fused),
    "offloaded": (("train_fixed",), _offloaded),
    "media": ((), _media),
    "cell_rank": ((), _cell("adapters/rank_12")),
    "cell_rank_by_pattern": ((), _cell("adapters/rank_12_by_pattern/adapter")),
    "cell_experts": ((), _cell("adapters/experts/fused")),
    "cell_towers": ((), _cell("adapters/towers/adapter")),
    "fused_dora_resume": (("fused_dora",), _fused("dora", resume=True)),
    "fused_pissa_resume": (("fused_pissa",), _fused("pissa", resume=True)),
    "resume_fixed": (("train_fixed",), _resume(True)),
    "resume_stock": (("train_fixed",), _resume(False)),
    "adapters_fixed": (("train_fixed",), _adapters(True, move_model_batches=2)),
    "adapters_stock": (("train_fixed",), _adapters(False)),
    "example_resume": (("train_fixed",), _example),
    "example_fused": ((), _example_fused),
    "fork_fixed": (("train_fixed",), _fork),
    "fork_emptied_fixed": (("train_fixed",), _emptied(True)),
    "fork_emptied_stock": (("train_fixed",), _emptied(False)),
}


def _needed(items: list[pytest.Item]) -> list[str]:
    run = [item for item in items if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    names = [name for item in run for mark in item.iter_markers("needs") for name in mark.args]
    return sorted(dict.fromkeys(names), key=list(SCENARIOS).index)


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    keep = os.environ.get("SLF_E2E_FOLDER")
    runs = Runs(Path(keep) if keep else tmp_path_factory.mktemp("e2e"))
    for name in _needed(request.session.items):
        runs.start(name)
    return runs


@pytest.fixture
def run(runs: Runs, request: pytest.FixtureRequest) -> Run:
    """The (first) run that the test needs, finished."""
    return [runs.get(name) for mark in request.node.iter_markers("needs") for name in mark.args][0]
