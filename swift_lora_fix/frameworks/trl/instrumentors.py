"""What is patched for TRL: its generation with vLLM, and what that needs of vLLM, transformers and PEFT.

Importing this module loads neither torch nor TRL: the hooks are imported when they go in.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from ...common.log import info, show
from ...errors import MissingPackageError, UnsupportedReleaseError
from ...install import contract, releases
from ...install.instrumentor import Arming, Instrumentor

TRAINER_MODULE = "transformers.trainer"
PEFT_MODULE = "peft.peft_model"
MS_SWIFT = "swift"  # ms-swift imports TRL, and generates in its own way


class Generation(Instrumentor):
    """TRL's ``VLLMGeneration`` together with what it needs: all or nothing."""

    triggers = (releases.TRL_MODULE,)
    otherwise = "TRL runs unpatched"

    def apply(self) -> None:
        """Import TRL's module and patch it.

        Raises:
            MissingPackageError: TRL, vLLM or PEFT is not installed.
            UnsupportedReleaseError: TRL is older than 0.28.0.
            ContractError: a target is missing or has another signature.
        """
        for package, what in (("trl", "TRL"), ("vllm", "vLLM"), ("peft", "PEFT")):
            if importlib.util.find_spec(package) is None:
                raise MissingPackageError(f"{what} is not installed in this environment: pip install {package}")
        _check_release()
        self.paused = True
        try:
            module = importlib.import_module(releases.TRL_MODULE)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{releases.TRL_MODULE}.".startswith(f"{error.name}."):
                raise  # the module exists; something that it imports does not
            raise contract.no_trl_module() from None
        finally:
            self.paused = False
        self._patch(module)

    def instrument(self, module: ModuleType) -> None:
        """Not in a process of ms-swift's, nor where there is no vLLM or PEFT to patch: then nothing is said."""
        missing = any(importlib.util.find_spec(name) is None for name in ("vllm", "peft"))
        if not missing and not is_ms_swift():
            self._patch(module)

    def _patch(self, module: ModuleType) -> None:
        show()
        version = _check_release()
        contract.check_trl(module)
        from .. import peft
        from . import hooks

        trainer, loads = importlib.import_module(TRAINER_MODULE), importlib.import_module(PEFT_MODULE)
        plans = [(hooks.GENERATION, module), (hooks.TRANSFORMERS, trainer), (peft.LOADS, loads)]
        if releases.trl_talks_to_vllm_serve(version):
            plans.append((hooks.SERVER, module))
        fresh = not hooks.GENERATION.is_applied
        for patch_set, target in plans:
            patch_set.plan(target)
        self.patch_sets = tuple(patch_set for patch_set, _ in plans)
        for patch_set, target in plans:
            patch_set.apply(target)
        self.arming.reason = f"in {module.__name__}"
        if fresh:
            info(f"patched {module.__name__} of TRL {version}.")


class Scoring(Instrumentor):
    """The trainer's scoring of its rollouts. It only gives metrics: everything else works without it."""

    triggers = (releases.TRL_TRAINER_MODULE,)
    otherwise = "the rollouts' own logprobs are not compared with the trainer's"

    def __init__(self, arming: Arming, generation: Generation) -> None:
        super().__init__(arming)
        self.generation = generation

    def instrument(self, module: ModuleType) -> None:
        if not self.generation.is_instrumented:  # this module imports that one
            return
        contract.check_trl_scoring(module)
        from . import hooks

        self.patch_sets = (hooks.SCORING,)
        hooks.SCORING.apply(module)

    @property
    def is_asked_for_by_name(self) -> bool:
        return False


def is_ms_swift() -> bool:
    """Whether this process has loaded ms-swift."""
    return MS_SWIFT in sys.modules


def _check_release() -> str:
    version = releases.installed_trl()
    if version is None:
        raise MissingPackageError("TRL is not installed in this environment: pip install trl")
    if releases.is_trl_too_old(version):
        raise UnsupportedReleaseError(
            f"TRL {version} is older than {releases.OLDEST_TRL}, the first one that swift_lora_fix knows: upgrade TRL."
        )
    return version
