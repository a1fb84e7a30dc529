"""What is patched for ms-swift: its trainer, PEFT's loading of adapters, its rollout server. Megatron is refused.

Importing this module loads neither torch nor ms-swift: the hooks are imported when they go in.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from ...common.log import info, warning
from ...common.settings import Settings
from ...errors import MissingPackageError, SwiftLoraFixError, UnsupportedReleaseError, UnsupportedTrainerError
from ...install import contract, releases
from ...install.instrumentor import Arming, Instrumentor

PEFT_MODULE = "peft.peft_model"
SWIFT_PEFT_MODULE = "swift.tuners.peft"  # its import replaces PeftModel.load_adapter: ours wraps that

SWIFT_TUNERS_MODULE = "swift.tuners.base"


class Peft(Instrumentor):
    """PEFT's loading of adapters, patched once ms-swift has replaced it by its own."""

    triggers = (SWIFT_PEFT_MODULE,)

    def plan(self) -> ModuleType:
        """Resolve the target and return its module. Raises ContractError if it is missing."""
        from .. import peft

        self.patch_sets = (peft.LOADS,)
        module = importlib.import_module(PEFT_MODULE)
        peft.LOADS.plan(module)
        return module

    def instrument(self, module: ModuleType) -> None:
        peft = self.plan()
        for patch_set in self.patch_sets:
            patch_set.apply(peft)

    def step_aside(self, module: ModuleType, error: SwiftLoraFixError) -> None:
        """Say nothing. If a trainer runs, it needs this too, and will report the same error. Other programs do not."""


class Trainer(Instrumentor):
    """The trainer's rollouts and weight sync, together with PEFT's loading of adapters: all or nothing."""

    triggers = releases.rollout_modules()
    otherwise = "ms-swift runs unpatched"

    def __init__(self, arming: Arming, peft: Peft) -> None:
        super().__init__(arming)
        self.peft = peft

    def apply(self) -> None:
        """Import ms-swift's rollout module and patch it.

        Raises:
            MissingPackageError: ms-swift, vLLM or PEFT is not installed.
            UnsupportedReleaseError: ms-swift is older than 3.10.0.
            ContractError: a target is missing or has another signature.
        """
        self.paused = self.peft.paused = True
        try:
            self.instrument(import_rollout_module())
        finally:
            self.paused = self.peft.paused = False

    def instrument(self, module: ModuleType) -> None:
        _check_release()
        contract.check(module)
        try:
            swift_peft = importlib.import_module(SWIFT_PEFT_MODULE)
        except ModuleNotFoundError:
            raise contract.not_found((SWIFT_PEFT_MODULE,)) from None
        from . import hooks

        self.patch_sets, fresh = (hooks.ROLLOUT,), not hooks.ROLLOUT.is_applied
        self.peft.plan()
        hooks.ROLLOUT.plan(module)
        self.peft.instrument(swift_peft)
        hooks.ROLLOUT.apply(module)
        self.arming.reason = f"in {module.__name__}"
        if fresh:
            info(f"patched {module.__name__} of ms-swift {releases.installed_swift()}.")

    def step_aside(self, module: ModuleType, error: SwiftLoraFixError) -> None:
        """Leave all of ms-swift as it is."""
        self.uninstrument()
        self.peft.uninstrument()
        self.arming.disarm(f"stepped aside: {error}")
        super().step_aside(module, error)


class Tuners(Instrumentor):
    """The folder that a run starts from, checked before ms-swift loads it. Everything else works without it."""

    triggers = (SWIFT_TUNERS_MODULE,)
    otherwise = "a folder without a usable adapter ends in ms-swift's own error"

    def instrument(self, module: ModuleType) -> None:
        from . import hooks

        self.patch_sets = (hooks.TUNERS,)
        hooks.TUNERS.apply(module)

    @property
    def is_asked_for_by_name(self) -> bool:
        return False


class Scoring(Instrumentor):
    """The trainer's scoring of its rollouts. It only gives metrics: everything else works without it."""

    triggers = releases.scoring_modules()
    otherwise = "the rollouts' own logprobs are not compared with the trainer's"

    def instrument(self, module: ModuleType) -> None:
        contract.check_scoring(module)
        from . import hooks

        self.patch_sets = (hooks.SCORING,)
        hooks.SCORING.apply(module)

    @property
    def is_asked_for_by_name(self) -> bool:
        return False


class RolloutServer(Instrumentor):
    """``swift rollout``. Its engine is patched when a server creates one, so a colocated engine never is."""

    triggers = releases.server_modules()
    otherwise = "ms-swift's rollout server runs as it is"

    def instrument(self, module: ModuleType) -> None:
        from . import server_hooks

        self.patch_sets = (server_hooks.SERVER, server_hooks.ENGINE)
        server_hooks.SERVER.apply(module)

    @property
    def is_asked_for_by_name(self) -> bool:
        """A transport that was asked for must not be replaced by another one, so errors are raised then."""
        return bool(Settings.from_environment().transport)


class Megatron(Instrumentor):
    """Megatron's trainers, which cannot be patched."""

    triggers = releases.megatron_modules()

    def instrument(self, module: ModuleType) -> None:
        raise UnsupportedTrainerError(
            f"{module.__name__} is loaded: Megatron trainers sync weights in their own way, which swift_lora_fix does "
            "not cover. Leave its plugin out of `megatron` commands, or use `swift rlhf`."
        )

    def check_absent(self) -> None:
        """Raise UnsupportedTrainerError in a process that runs a Megatron trainer."""
        for name in self.triggers:
            if name in sys.modules:
                self.instrument(sys.modules[name])

    def step_aside(self, module: ModuleType, error: SwiftLoraFixError) -> None:
        warning(f"stepping aside: {module.__name__} is a Megatron trainer, whose LoRA sync is its own.")


class _Named(Instrumentor):
    """What is not patched, and named in one warning when it is loaded. why: what it is and what to do, in words."""

    why: str

    def instrument(self, module: ModuleType) -> None:
        raise UnsupportedTrainerError(f"{module.__name__} is loaded: {self.why}")

    @property
    def is_asked_for_by_name(self) -> bool:
        """Never: ``apply()`` asks for the patches of the trainer, which may be another one."""
        return False


class Rewrite(_Named):
    """The trainers of ms-swift's coming version 5."""

    triggers = (releases.SWIFT_REWRITE,)
    otherwise = "a run with these trainers is not protected"
    why = (
        f"the trainers of ms-swift's coming version 5 have no {releases.ROLLOUT_CLASS}, and swift_lora_fix does not "
        "know them. What it patched are the old ones. Look for a newer swift-lora-fix."
    )


class Ray(_Named):
    """Rollout engines that ms-swift starts as Ray actors."""

    triggers = releases.ray_modules()
    otherwise = "rollouts that Ray started run as they are"
    why = (
        "this rollout engine was started by Ray for a Megatron trainer, and gets its weights from Ray workers and not "
        "from `swift rlhf`. swift_lora_fix covers `swift rollout` servers."
    )


def import_rollout_module() -> ModuleType:
    version = _check_release()
    for package, what in (("vllm", "vLLM"), ("peft", "PEFT")):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{what} is not installed in this environment: pip install {package}")
    family = releases.family_of(version)
    candidates = (family.layout.rollout_module,) if family else releases.rollout_modules()
    for name in candidates:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists; something that it imports does not
    raise contract.not_found(candidates)


def _check_release() -> str:
    version = releases.installed_swift()
    if version is None:
        raise MissingPackageError("ms-swift is not installed in this environment: pip install ms-swift")
    if releases.is_too_old(version):
        raise UnsupportedReleaseError(
            f"ms-swift {version} is older than {releases.OLDEST_SUPPORTED}, the first one that swift_lora_fix knows: "
            "upgrade ms-swift."
        )
    return version
