"""When ms-swift or TRL is patched: lazily after this package is imported (armed), or at once by ``apply()``."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from .common.log import info, warning
from .common.settings import Settings
from .engine.vllm.dense.instrumentor import DenseLayers
from .errors import SwiftLoraFixError
from .frameworks.swift.instrumentors import Megatron, Peft, Ray, Rewrite, RolloutServer, Scoring, Trainer, Tuners
from .frameworks.trl.instrumentors import Generation, is_ms_swift
from .frameworks.trl.instrumentors import Scoring as TrlScoring
from .install import releases
from .install.instrumentor import PARENT_ARMED, Arming

_arming = Arming(PARENT_ARMED)
_peft = Peft(_arming)
_trainer = Trainer(_arming, _peft)
_scoring = Scoring(_arming)
_tuners = Tuners(_arming)
_server = RolloutServer(_arming)
_megatron = Megatron(_arming)
_trl = Generation(_arming)
_trl_scoring = TrlScoring(_arming, _trl)
TRL = "trl"
# vLLM's loading of adapters is not here: it is patched by importing swift_lora_fix.memory (memory/hooks.py).
_of_swift = (_peft, _trainer, _tuners, _scoring, _server, _megatron, Ray(_arming), Rewrite(_arming))
_dense = DenseLayers(_arming, lambda: _trainer.is_instrumented or _trl.is_instrumented or _server.is_instrumented)
_instrumentors = (*_of_swift, _trl, _trl_scoring, _dense)


@dataclass(frozen=True)
class Status:
    """What is in place. patches: each target, ``applied`` or ``not applied``. run: the sync state of the newest trainer
    (origin of its LoRA weights, syncs so far, step served); None before a trainer has prepared its engine."""

    enabled: bool
    armed: bool
    applied: bool
    reason: str
    ms_swift: str | None
    trl: str | None
    vllm: str | None
    defects: tuple[str, ...]
    patches: dict[str, str]
    run: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"swift_lora_fix: {'applied' if self.applied else 'not applied'} ({self.reason})"]
        versions = f"ms-swift {self.ms_swift}, TRL {self.trl}, vLLM {self.vllm}"
        lines.append(f"{versions}; known defects: {', '.join(self.defects) or 'none'}")
        lines += [f"  {target}: {state}" for target, state in self.patches.items()]
        if self.run:
            lines += [f"  {name}: {value}" for name, value in self.run.items()]
        return "\n".join(lines)


def is_console_script() -> bool:
    """Whether this process is the ``swift-lora-fix`` command. It trains nothing, and must start even with bad settings.

    ``python -m swift_lora_fix`` is the same: while Python imports the package, argv[0] is still "-m".
    """
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":
        given = getattr(sys, "orig_argv", [])  # Python 3.10 and later
        return given[-len(argv) :][:1] in (["swift_lora_fix"], ["-mswift_lora_fix"])
    return os.path.basename(argv[0]) == "swift-lora-fix"


def arm() -> None:
    """Patch as soon as ms-swift's rollout module, or TRL's generation with vLLM, is loaded; at once if it already is.

    If patching turns out to be impossible, one warning says why and ms-swift, or TRL, runs unpatched.
    Raises SettingsError when a setting of this package has an invalid value.
    """
    if not Settings.from_environment().enabled:
        _arming.reason = "switched off by SWIFT_LORA_FIX"
        return
    _arming.arm("armed; neither ms-swift's rollout module nor TRL's generation is loaded yet")
    for instrumentor in _instrumentors:
        instrumentor.watch()


def apply(mode: str | None = None) -> Status:
    """Patch ms-swift or TRL now, all or nothing: whichever this script imported, or is installed. Of a script that
    imported neither, where both are, nobody knows whose it is: then both, and if one of them cannot be patched there,
    that one is named and the other is. A second call changes nothing.

    Args:
        mode: ``adapter``, ``fused`` or ``auto``; sets SWIFT_LORA_FIX_MODE in this process. None leaves it as it is.

    Raises:
        SettingsError: no such mode.
        MissingPackageError: ms-swift (and TRL), vLLM or PEFT is not installed.
        UnsupportedReleaseError: ms-swift is older than 3.10.0, TRL older than 0.28.0.
        ContractError: a target is missing or has another signature; names the release, the target and what to do.
        UnsupportedTrainerError: this process runs a Megatron trainer.
    """
    if mode is not None:
        os.environ["SWIFT_LORA_FIX_MODE"] = Settings.from_environment({"SWIFT_LORA_FIX_MODE": mode}).mode
    if not Settings.from_environment().enabled:
        info("switched off by SWIFT_LORA_FIX: nothing is patched.")
        return status()
    try:
        _megatron.check_absent()
        if _trl.is_instrumented and not _trainer.is_instrumented:
            _trl.apply()  # again, whatever was loaded since
        elif is_ms_swift() or releases.installed_trl() is None:
            _trainer.apply()
        elif TRL in sys.modules or releases.installed_swift() is None:
            _trl.apply()
        else:
            _apply_both()
        arm()
        _arming.by_name = True
    except SwiftLoraFixError as error:
        if not _is_applied():
            _peft.uninstrument()
            _arming.disarm(f"apply() failed: {error}")
        raise
    return status()


def _apply_both() -> None:
    """ms-swift, which brings a TRL of its own choice with it; and that, which only TRL's own trainers notice."""
    try:
        _trainer.apply()
    except SwiftLoraFixError:
        raise
    except Exception as error:  # whatever an ms-swift that does not fit its surroundings raises
        try:
            _trl.apply()
        except Exception:
            raise error from None
        warning(f"ms-swift cannot be imported here ({type(error).__name__}: {error}): TRL alone is patched.")
        return
    reason = _arming.reason
    try:
        _trl.apply()
        _arming.reason = f"{reason} and {releases.TRL_MODULE}"
    except Exception as error:  # the same
        info(f"TRL's own trainers, if this script has any, are not patched: {error}")


def _is_applied() -> bool:
    return _trainer.is_instrumented or _trl.is_instrumented


def remove() -> Status:
    """Undo every patch and disarm. The functions are then the same objects as before.

    Raises PatchConflictError, and changes nothing, when another package has wrapped a patched function since.
    """
    for instrumentor in _instrumentors:
        instrumentor.check_removable()
    for instrumentor in _instrumentors:
        instrumentor.uninstrument()
    _arming.disarm("removed")
    if f"{__package__}.session" in sys.modules:
        from . import session

        session.forget()
    return status()


def status() -> Status:
    """What is patched in this process, and the state of the newest run. Imports nothing."""
    version, trl = releases.installed_swift(), releases.installed_trl()
    defects: tuple[releases.Defect, ...] = ()
    if not _trainer.is_instrumented and (_trl.is_instrumented or version is None):
        trl_family = releases.trl_family_of(trl) if trl else None
        defects = trl_family.defects if trl_family else ()
    elif version is not None and (family := releases.family_of(version)) is not None:
        defects = family.defects
    return Status(
        enabled=Settings.from_environment().enabled,
        armed=_arming.armed,
        applied=_is_applied(),
        reason=_arming.reason,
        ms_swift=version,
        trl=trl,
        vllm=releases.installed_vllm(),
        defects=tuple(defect.key for defect in defects),
        patches={target: state for each in _instrumentors for target, state in each.status().items()},
        run=_run(),
    )


def _run() -> dict[str, Any] | None:
    if f"{__package__}.session" not in sys.modules:
        return None
    from . import session

    newest = session.latest()
    return newest.summary() if newest is not None else None
