"""When the patches go in and out: at import (armed, lazily), by ``apply()`` (now, or an error), by ``remove()``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from ..common.log import info, warning
from ..common.settings import Settings
from ..errors import MissingPackageError, SwiftLoraFixError, UnsupportedReleaseError, UnsupportedTrainerError
from ..vllm_plugin import PARENT_ARMED
from . import contract, releases

if TYPE_CHECKING:
    from .registry import PatchSet

PACKAGE = "swift_lora_fix"
PEFT_MODULE = "peft.peft_model"
SWIFT_PEFT_MODULE = (
    "swift.tuners.peft"  # replaces PeftModel.load_adapter by its own as it is imported: ours goes on top
)


@dataclass
class _Arming:
    """What has been asked for in this process."""

    hooked: bool = False  # import hooks registered; wrapt has no way to take them out again
    armed: bool = False  # ... and they may act
    explicit: bool = False  # apply() is running and patches by itself
    by_name: bool = False  # apply() has succeeded: what turns out to be impossible raises
    reason: str = "not armed"  # why nothing is patched, in words


_arming = _Arming()


@dataclass(frozen=True)
class Status:
    """What is in place. ``patches`` maps each target to ``applied`` or ``not applied``; ``run`` is the newest trainer's
    sync state (origin of its LoRA weights, syncs so far, step served), None before a trainer prepared its engine."""

    enabled: bool
    armed: bool
    applied: bool
    reason: str
    ms_swift: str | None
    vllm: str | None
    defects: tuple[str, ...]
    patches: dict[str, str]
    run: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"swift_lora_fix: {'applied' if self.applied else 'not applied'} ({self.reason})"]
        lines.append(f"ms-swift {self.ms_swift}, vLLM {self.vllm}; known defects: {', '.join(self.defects) or 'none'}")
        lines += [f"  {target}: {state}" for target, state in self.patches.items()]
        if self.run:
            lines += [f"  {name}: {value}" for name, value in self.run.items()]
        return "\n".join(lines)


def is_console_script() -> bool:
    """Whether this process is ``swift-lora-fix``, which trains nothing and must start with settings that are wrong.

    So is ``python -m swift_lora_fix``: while that imports the package, argv[0] is still "-m".
    """
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":
        given = getattr(sys, "orig_argv", [])  # Python 3.10 and later
        return given[-len(argv) :][:1] in (["swift_lora_fix"], ["-mswift_lora_fix"])
    return os.path.basename(argv[0]) == "swift-lora-fix"


def arm() -> None:
    """Let the patches go in as soon as ms-swift's rollout module is loaded (now, if it already is).

    Where that turns out to be impossible, one warning says why and ms-swift runs unpatched.
    """
    if not Settings.from_environment().enabled:
        _arming.reason = "switched off by SWIFT_LORA_FIX"
        return
    _arming.armed = True
    os.environ[PARENT_ARMED] = "1"  # inherited by the processes that vLLM starts
    _arming.reason = "armed; ms-swift's rollout module is not loaded yet"
    if not _arming.hooked:
        _arming.hooked = True
        wrapt.register_post_import_hook(_on_peft, SWIFT_PEFT_MODULE)
        for name in releases.rollout_modules():
            wrapt.register_post_import_hook(_on_rollout, name)
        for name in releases.megatron_modules():
            wrapt.register_post_import_hook(_on_megatron, name)
        for name in releases.server_modules():
            wrapt.register_post_import_hook(_on_server, name)


def apply(mode: str | None = None) -> Status:
    """Patch ms-swift now, all or nothing; calling it again changes nothing.

    Args:
        mode: ``adapter``, ``fused`` or ``auto``; sets SWIFT_LORA_FIX_MODE in this process. None leaves it as it is.

    Raises:
        SettingsError: no such mode.
        MissingPackageError: ms-swift, vLLM or PEFT is not installed.
        UnsupportedReleaseError: ms-swift is older than 3.10.0.
        ContractError: a target is missing or has another signature; names the release, the target and what to do.
        UnsupportedTrainerError: this process runs a Megatron trainer.
    """
    if mode is not None:
        os.environ["SWIFT_LORA_FIX_MODE"] = Settings.from_environment({"SWIFT_LORA_FIX_MODE": mode}).mode
    if not Settings.from_environment().enabled:
        info("switched off by SWIFT_LORA_FIX: nothing is patched.")
        return status()
    _arming.explicit = True
    try:
        loaded = [name for name in releases.megatron_modules() if name in sys.modules]
        if loaded:
            _refuse_megatron(loaded[0])
        module = _import_rollout_module()
        arm()
        _patch(module)
        _arming.by_name = True
    except SwiftLoraFixError as error:
        if not status().applied:
            _undo(f"apply() failed: {error}")
        raise
    finally:
        _arming.explicit = False
    return status()


def remove() -> Status:
    """Take every patch out again and disarm; the functions are the very objects they were before.

    Raises PatchConflictError, changing nothing, when another package has wrapped a patched function since.
    """
    applied = [patch_set for patch_set in (*_patch_sets(), *_server_sets()) if patch_set.is_applied]
    for patch_set in applied:
        patch_set.check_removable()
    for patch_set in applied:
        patch_set.undo()
    _disarm("removed")
    _arming.by_name = False
    if f"{PACKAGE}.session" in sys.modules:
        from .. import session

        session.forget()
    return status()


def status() -> Status:
    """What is patched in this process and what the newest run does. Loads nothing."""
    version = releases.installed_swift()
    family = releases.family_of(version) if version else None
    sets = _patch_sets()
    return Status(
        enabled=Settings.from_environment().enabled,
        armed=_arming.armed,
        applied=bool(sets) and all(patch_set.is_applied for patch_set in sets),
        reason=_arming.reason,
        ms_swift=version,
        vllm=releases.installed_vllm(),
        defects=tuple(defect.key for defect in family.defects) if family else (),
        patches={
            f"{s.name}: {p.target}": "applied" if s.is_applied else "not applied"
            for s in (*sets, *_server_sets())
            for p in s.patches
        },
        run=_run(),
    )


def _import_rollout_module() -> ModuleType:
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
                raise  # the module is there; something that it imports is not
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


def _patch(module: ModuleType) -> None:
    """Resolve everything, then patch everything."""
    contract.check(module)
    try:
        importlib.import_module(SWIFT_PEFT_MODULE)
    except ModuleNotFoundError:
        raise contract.not_found((SWIFT_PEFT_MODULE,)) from None
    peft, rollout = _patch_sets(load=True)
    peft_module = importlib.import_module(PEFT_MODULE)
    peft.plan(peft_module)
    rollout.plan(module)
    fresh = not rollout.is_applied
    peft.apply(peft_module)
    rollout.apply(module)
    _arming.reason = f"in {module.__name__}"
    if fresh:
        info(f"patched {module.__name__} of ms-swift {releases.installed_version('ms-swift')}.")


def _on_rollout(module: ModuleType) -> None:
    if not _arming.armed or _arming.explicit:
        return  # removed, or apply() is importing it and patches it itself
    try:
        _check_release()
        _patch(module)
    except SwiftLoraFixError as error:
        _step_aside(error)


def _on_peft(module: ModuleType) -> None:
    if not _arming.armed or _arming.explicit:
        return
    try:
        _patch_sets(load=True)[0].apply(importlib.import_module(PEFT_MODULE))
    except SwiftLoraFixError as error:
        _step_aside(error)


def _on_megatron(module: ModuleType) -> None:
    if not _arming.armed:
        return
    if _arming.by_name:
        _refuse_megatron(module.__name__)
    warning(f"stepping aside: {module.__name__} is a Megatron trainer, whose LoRA sync is its own.")


def _on_server(module: ModuleType) -> None:
    """Whoever asks for a transport by name must not get another one: what is missing is raised out of the import."""
    if not _arming.armed:
        return
    from ..frameworks.swift import server_hooks as server

    try:
        server.SERVER.apply(module)
    except SwiftLoraFixError as error:
        if Settings.from_environment().transport:
            raise
        warning(f"stepping aside, ms-swift's rollout server runs as it is: {error}")


def _refuse_megatron(name: str) -> None:
    raise UnsupportedTrainerError(
        f"{name} is loaded: Megatron trainers sync weights in their own way, which swift_lora_fix does not cover. "
        "Leave its plugin out of `megatron` commands, or use `swift rlhf`."
    )


def _step_aside(error: SwiftLoraFixError) -> None:
    _undo(f"stepped aside: {error}")
    warning(f"stepping aside, ms-swift runs unpatched: {error}")


def _undo(reason: str) -> None:
    for patch_set in _patch_sets():
        patch_set.undo()
    _disarm(reason)


def _disarm(reason: str) -> None:
    _arming.armed = False
    _arming.reason = reason
    os.environ.pop(PARENT_ARMED, None)


def _patch_sets(load: bool = False) -> tuple[PatchSet, ...]:
    """PEFT's and ms-swift's patches; empty while their hooks (which need torch) are not loaded, unless ``load``."""
    if not load and f"{PACKAGE}.frameworks.swift.hooks" not in sys.modules:
        return ()
    from ..frameworks.swift import hooks as swift

    return swift.PEFT, swift.ROLLOUT


def _server_sets() -> tuple[PatchSet, ...]:
    """Those of the rollout server, where this process may be one."""
    if f"{PACKAGE}.frameworks.swift.server_hooks" not in sys.modules:
        return ()
    from ..frameworks.swift import server_hooks as server

    return server.SERVER, server.ENGINE


def _run() -> dict[str, Any] | None:
    if f"{PACKAGE}.session" not in sys.modules:
        return None
    from .. import session

    newest = session.latest()
    return newest.summary() if newest is not None else None
