"""Starts real ``swift rlhf`` GRPO runs with a real colocated vLLM engine on the CPU, as subprocesses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.support import hangs

PLUGINS = Path(__file__).resolve().parent / "plugins"
REPOSITORY = PLUGINS.parents[2]
FIX = REPOSITORY / "swift_lora_fix" / "plugin" / "swift_lora_fix_plugin.py"


@dataclass
class Run:
    """One run: what to start, and afterwards what came of it.

    arguments are ms-swift's, without dashes; environment is added to the process's. ``fixed`` loads the plugin;
    ``plugins`` come before it, ``last_plugins`` after everything (their wrappers are the outermost). ``helpers``: the
    tests' reward and, on the CPU, what makes a large LoRA at once. ``launched``: by torchrun, even as a single rank
    (DeepSpeed and ms-swift's GKD read the launcher's variables).
    """

    name: str
    python: Path
    model: Path
    folder: Path
    fixed: bool
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    plugins: tuple[Path, ...] = ()
    last_plugins: tuple[Path, ...] = ()
    ranks: int = 1
    gpu: bool = False
    launched: bool = False
    probe: bool = True
    helpers: bool = True
    returncode: int | None = None

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def probes(self, rank: int = 0) -> list[dict[str, Any]]:
        """What the probe plugin recorded, one record a rollout."""
        path = self.folder / f"probe.jsonl{f'.rank{rank}' if rank else ''}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def metrics(self) -> list[dict[str, Any]]:
        """What ms-swift logged, a record a step that synced."""
        lines = [json.loads(line) for line in (self.output / "logging.jsonl").read_text().splitlines()]
        return [line for line in lines if "lora_sync/seconds" in line]

    def command(self) -> list[str]:
        cli = swift_folder(self.python)
        launcher = [str(self.python)]
        if self.ranks > 1 or self.launched:
            launcher += [
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={self.ranks}",
                f"--master_port={free_port()}",
            ]
        plugins = [] if self.gpu else [PLUGINS / "slf_cpu_shims.py"]
        plugins += [*self.plugins, *([FIX] if self.fixed else [])]
        if self.helpers:
            plugins += [PLUGINS / "slf_rewards.py", *([] if self.gpu else [PLUGINS / "slf_grow.py"])]
        plugins += [PLUGINS / "slf_probe.py"] if self.probe else []
        plugins += self.last_plugins
        command = [*launcher, str(cli / "cli" / "rlhf.py"), "--external_plugins", *map(str, plugins)]
        for name, value in {**self._defaults(cli.parent), **self.arguments}.items():
            if value is None:  # not even its default
                continue
            command += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        return command

    def start(self) -> Run:
        """Run it to its end; the exit status is in ``returncode``, never raised. Raises hangs.Hang if there is none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # with more, ms-swift wants more ranks
        environment = {
            **({"CUDA_VISIBLE_DEVICES": first_gpu} if self.gpu and self.ranks == 1 else {}),
            **({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if self.ranks > 1 else {}),  # vLLM 0.11 does not know it
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "SLF_PROBE_FILE": str(self.folder / "probe.jsonl"),
            **self.environment,
        }
        with open(self.folder / "log.txt", "w") as log:
            process = launch(self.command(), environment, self.folder, log)
            try:
                self.returncode = hangs.wait(process, self.folder)
            except hangs.Hang as hang:
                raise hangs.Hang(f"the run {self.name}: {hang}\n{self.log[-4000:]}") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # its ranks too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return self

    def _defaults(self, site_packages: Path) -> dict[str, Any]:
        swift_3 = (site_packages / "swift" / "trainers" / "rlhf_trainer").is_dir()
        device = {"attn_impl": "sdpa", "vllm_gpu_memory_utilization": 0.4} if self.gpu else {"use_cpu": "true"}
        return {
            "rlhf_type": "grpo",
            "model": self.model,
            "model_type": "qwen2",
            "template": "chatml",
            "dataset": self.model.parent / "prompts.jsonl",
            "reward_funcs": "slf_spread",
            "train_type" if swift_3 else "tuner_type": "lora",
            "lora_rank": 8,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "use_vllm": "true",
            "vllm_mode": "colocate",
            "vllm_enable_lora": "true",
            "vllm_enforce_eager": "true",
            "vllm_max_model_len": 256,
            **device,
            "torch_dtype": "bfloat16",
            "gradient_checkpointing": "false",
            "max_length": 128,
            "max_completion_length": 16,
            "num_generations": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 0.002,  # small beside what plugins/slf_grow.py adds, which makes a large LoRA
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "max_grad_norm": 100,
            "beta": 0,
            "logging_steps": 1,
            "report_to": "none",
            "output_dir": self.output,
            "add_version": "false",
            "dataloader_num_workers": 0,
        }


@dataclass
class Example(Run):
    """A script of ``examples/`` in small: it starts the run, our arguments for a CPU come after its own."""

    script: str = ""

    def __post_init__(self) -> None:
        plugins = [word for word in self._words()[0] if word.endswith(".py") and word != str(FIX)]
        self.environment.update(
            MODEL=str(self.model),
            DATASET=str(self.model.parent / "prompts.jsonl"),
            EXTRA_PLUGINS=" ".join(plugins),
            PATH=os.pathsep.join([str(self.python.parent), os.environ["PATH"]]),
        )

    def command(self) -> list[str]:
        return ["bash", str(REPOSITORY / "examples" / self.script), *self._words()[1]]

    def _words(self) -> tuple[list[str], list[str]]:
        """A run's own command in two: plugins, and the arguments after them."""
        words = super().command()[2:]
        first = words.index("--rlhf_type")
        return words[:first], words[first:]


def swift_folder(python: Path) -> Path:
    """Where ms-swift is installed for this Python."""
    code = "import importlib.util as u; print(u.find_spec('swift').submodule_search_locations[0])"
    return Path(subprocess.check_output([str(python), "-c", code], text=True).strip())


def launch(command: list[str], environment: dict[str, str], folder: Path, log: IO[Any]) -> subprocess.Popen[bytes]:
    """Start a command of ms-swift's on the CPU, in a session of its own; ``environment`` comes on top."""
    defaults = {"OMP_NUM_THREADS": "1"}
    everywhere = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "none",  # ms-swift's own vLLM plugin imports torchvision
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.Popen(
        command,
        env={**defaults, **os.environ, **everywhere, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def make_model(python: Path, folder: Path, architecture: str = "qwen2", dtype: str = "bfloat16") -> Path:
    """Make a tiny model with the Python of the environment that will load it; return its folder."""
    target = folder / architecture
    if not (target / "config.json").is_file():
        subprocess.run(
            [str(python), "-m", "tests.support.tiny", architecture, str(target), "--dtype", dtype],
            cwd=REPOSITORY,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return target


def this_python() -> Path:
    return Path(sys.executable)


@dataclass
class Verification:
    """``swift-lora-fix verify``: two runs in one command. Afterwards ``done`` is the finished process. extra: for the
    framework."""

    model: Path
    adapter: Path
    folder: Path
    arguments: tuple[str, ...] = ()
    extra: tuple[str, ...] = ("--model_type", "qwen2", "--template", "chatml", "--vllm_max_model_len", "256")
    environment: dict[str, str] = field(default_factory=dict)
    done: subprocess.CompletedProcess[str] | None = None

    def start(self) -> Verification:
        options = ("--model", self.model, "--adapter", self.adapter, "--out", self.folder, *self.arguments)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "none"}
        environment |= self.environment
        command = [this_python().parent / "swift-lora-fix", "verify", *options, "--", *self.extra]
        self.done = hangs.run(command, self.folder, env=environment)
        return self
