"""Real TRL runs on the CPU, in .venv-trl (``scripts/setup --trl``). Each is started once; the tests wait for theirs."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from swift_lora_fix.install import releases
from tests.support import driver
from tests.support.trl_driver import CHECKPOINT_STEP, Run

HERE = Path(__file__).parent
RUNS_HERE = releases.installed_trl() is not None and releases.installed_swift() is None
HAS_VISION = importlib.util.find_spec("torchvision") is not None
STEPS = 5
# One a step from step 1 on, and the cause that is to be named; "" where nothing was broken.
FAULTS = {
    "double_count_in_place": "double-count",
    "removed": "not-loaded",
    "zeroed": "not-applied",
    "stale": "stale",
    "one_module_doubled": "module-doubled",
    "not_a_number": "not-finite",
    "base_by_one_ulp": "base-changed",
    "trainer_base_by_one_ulp": "trainer-base-changed",
    "none": "",
    "scaling_changed": "scaling",
    "none ": "",
}
FUSED_FAULTS = {
    "plain_base": "not-applied",
    "base_by_one_ulp": "base-changed",
    "none": "",
    "trainer_base_by_one_ulp": "trainer-base-changed",
    "none ": "",
}


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = driver.make_model(driver.this_python(), folder / "models")
        self.pool = ThreadPoolExecutor(max_workers=int(os.environ.get("SLF_PARALLEL_RUNS", "2")))
        self.futures: dict[str, Future[Run]] = {}

    def start(self, name: str) -> Future[Run]:
        """After what it needs: that is in the queue before it, so whoever waits for it waits for a run at work."""
        if name not in self.futures:
            needs = [self.start(other) for other in NEEDS.get(name, ())]
            self.futures[name] = self.pool.submit(self._run, name, needs)
        return self.futures[name]

    def _run(self, name: str, needs: list[Future[Run]]) -> Run:
        for other in needs:
            other.result()
        return self.build(name).start()

    def get(self, name: str) -> Run:
        return self.start(name).result()

    def build(self, name: str) -> Run:
        arguments: dict[str, Any] = {"max_steps": STEPS, "vllm_gpu_memory_utilization": 0.2}
        options: dict[str, Any] = {"model": str(self.model), "fixed": "stock" not in name, "arguments": arguments}
        environment = {"SWIFT_LORA_FIX_GATE_EVERY": "1"}
        if name == "killed":
            options["kill"] = CHECKPOINT_STEP + 1
        if "resumed" in name and "images" not in name:
            options["resume"] = str(self.futures["killed"].result().checkpoint())
        if "adapter" in name:
            environment["SWIFT_LORA_FIX_MODE"] = "adapter"
        if "faults" in name:
            faults = FAULTS if "adapter" in name else FUSED_FAULTS
            options["adapter"] = str(self.futures["killed"].result().checkpoint())
            options["faults"] = [fault.strip() for fault in faults]
            environment["SWIFT_LORA_FIX_ON_MISMATCH"] = "repair"
            arguments.update(max_steps=len(faults) + 1, save_steps=100)
        if "sleeping" in name:
            options["adapter"] = str(self.futures["killed"].result().checkpoint())
            arguments.update(max_steps=3, save_steps=100, vllm_enable_sleep_mode=True)
        if "images" in name:
            model = driver.make_model(driver.this_python(), self.folder / "models" / "images", "qwen2_5_vl")
            options.update(model=str(model), images=True, lora={"target_modules": LANGUAGE_MODEL})
            if "resumed" in name:
                options["resume"] = str(self.futures["images"].result().checkpoint())
        if name == "auto":
            options["adapter"] = str(self.futures["killed"].result().checkpoint())
            environment["SWIFT_LORA_FIX_MODE"] = "auto"
            arguments.update(save_steps=100)
        if name == "rloo":
            options.update(trainer="RLOO", lora={"use_dora": True, "modules_to_save": ["lm_head"]})
            arguments.update(max_steps=3, save_steps=100)
        if name == "adapter_rollout_func":  # in float32, which TRL loads models in; the engine is bf16's
            options.update(rollout=True, dtype="float32")
            arguments.update(save_steps=100, bf16=False)
        if name == "example":
            options.update(fixed=False, example=str(driver.REPOSITORY / "examples" / "trl_grpo.py"))
            arguments.update(max_steps=3, save_steps=100)
        if "two_ranks" in name:
            arguments.update(max_steps=3, save_steps=100)
        if "fsdp2" in name:
            arguments.update(fsdp="full_shard auto_wrap", fsdp_config=FSDP2)
        if name in TRAINERS:
            options["trainer"] = TRAINERS[name]
            arguments.update(max_steps=3, save_steps=100, **MORE.get(name, {}))
        return Run(self.folder / name, options, environment, ranks=2 if "two_ranks" in name else 1)


LANGUAGE_MODEL = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # of a vision-language model
FSDP2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": True}
# More trainers with the same generation, and what they ask for.
TRAINERS = {"distillation": "Distillation", "sdft": "SDFT", "sdpo": "SDPO", "gold": "GOLD"}
MORE: dict[str, dict[str, Any]] = {"gold": {"lmbda": 1.0}}
# In the order in which they start; and what each needs.
NEED_ADAPTER = ("adapter_faults", "adapter_resumed", "resumed", "faults", "sleeping", "adapter_sleeping", "auto")
RANKS = ("two_ranks", "two_ranks_fsdp2")
IMAGES = ("images", "adapter_images_resumed")
SCENARIOS = ("killed", "uninterrupted", *NEED_ADAPTER, "stock", "rloo", "example", *TRAINERS, *RANKS)
SCENARIOS += ("adapter_rollout_func",)
SCENARIOS += IMAGES if HAS_VISION else ()
NEEDS = {name: ("killed",) for name in NEED_ADAPTER} | {"adapter_images_resumed": ("images",)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not RUNS_HERE:
            item.add_marker(pytest.mark.skip(reason="needs TRL without ms-swift: scripts/setup --trl"))


@pytest.fixture(scope="session", autouse=True)  # from the first test on, beside those that need none
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    keep = os.environ.get("SLF_E2E_FOLDER")
    runs = Runs(Path(keep) if keep else tmp_path_factory.mktemp("trl"))
    items = request.session.items
    needed = {name for item in items for mark in item.iter_markers("needs") for name in mark.args}
    for name in SCENARIOS:
        if name in needed:
            runs.start(name)
    return runs


@pytest.fixture
def run(runs: Runs, request: pytest.FixtureRequest) -> Run:
    """The (first) run that the test needs, finished."""
    return [runs.get(name) for mark in request.node.iter_markers("needs") for name in mark.args][0]
