"""What a trainer and a rollout server say to each other. Both sides import this module.

All paths are below `PREFIX`; answers are JSON. What is refused has an HTTP status and ``{"error": class, "message"}``.

- ``GET status/``: `PROTOCOL`, releases, ``boot`` (new at each start of the server), what the engine takes, ``policy``
  (or null) and whether rollouts are ``plain``.
- ``GET base/``: ``{"sums": {name: [dtype, shape, checksum]}}`` of the model's files; dtype as in ``bfloat16``, names as
  in the files.
- ``POST stage/``: every worker reads and checks an adapter. JSON ``{"policy", "digest", "folder"}`` for a folder below
  the server's root; or the safetensors bytes as ``application/octet-stream``, with ``{"policy", "digest", "config"}``
  in `POLICY_HEADER`; or JSON ``{"policy", "layout"}`` (`Layout`, or the ``key`` of the last one, 410 where it is not):
  its bytes come over NCCL, as ``receive/`` is asked. `NO_NCCL` where they cannot.
- ``POST receive/`` ``{"policy"}``: every worker takes part in the broadcast of what was announced, and checks it.
- ``POST find/`` ``{"policy"}``: what was sent under another version is staged as this one; 410 where it is gone.
- ``POST pushed/``: after ms-swift's own push of the base. What went wrong in a worker, which ms-swift only logs.
- ``POST commit/`` ``{"policy"}``: every worker serves what it staged, or none does. Twice is as good as once. With
  ``"by_reference": true`` by way of vLLM's own loader. Answers have ``boot``.
- ``POST abort/`` ``{"policy"}``: what was staged is dropped.
- ``POST serve/`` ``{"plain": bool}``: rollouts from the base alone, or with the adapter again.

``POST /infer/`` is ms-swift's; with `POLICY_HEADER` it is refused where another policy than that is served.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from ..common.settings import Settings
from ..errors import AccessError, ProtocolError

PROTOCOL = 2
PREFIX = "/swift_lora_fix"
STATUS, BASE = f"{PREFIX}/status/", f"{PREFIX}/base/"
STAGE, COMMIT, ABORT, SERVE = (f"{PREFIX}/{verb}/" for verb in ("stage", "commit", "abort", "serve"))
RECEIVE, FIND, PUSHED = (f"{PREFIX}/{verb}/" for verb in ("receive", "find", "pushed"))
POLICY_HEADER = "X-Swift-Lora-Fix-Policy"
BYTES = "application/octet-stream"
PROBE = "swift-lora-fix-"  # so begins the ``uuid`` of the gate's requests: no multi-turn scheduler plays with those

# The files of an adapter's folder, as PEFT names them; B is PEFT's own, the server scales it by the config.
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# In the weights' safetensors metadata: the names, as JSON, in the order that the policy's digest is of. Where it is
# there (a trainer of ours wrote them, with the scaling in B), each vLLM worker proves that digest of what it holds.
ORDER = "swift_lora_fix_order"

ROOT_VARIABLE, LIMIT_VARIABLE = "SWIFT_LORA_FIX_ROOT", "SWIFT_LORA_FIX_MAX_MIB"  # see Settings

GONE = 410  # the server no longer has, or knows, what it is asked to use again
NO_NCCL = 501  # HTTP's "not implemented": this server takes no adapter over NCCL, and says why

METHOD = "swift_lora_fix_command"  # within the server, what its workers are called by
RPC = "swift_lora_fix_receiver"  # within an engine, what vLLM's workers are called by (``collective_rpc``)
EXTENSION = "swift_lora_fix.server.rollout.extension.RolloutWorkerExtension"  # in place of ms-swift's
SWIFT_EXTENSION = "WeightSyncWorkerExtension"

_STATUSES = {ProtocolError: 400, AccessError: 403}
_RUN = re.compile(r"[0-9a-f]{1,64}")
_DIGEST = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True)
class Policy:
    """Which policy: ``version`` only grows within one trainer ``run`` (hexadecimal). digest: over NCCL, and of a file
    with `ORDER`, the one of engine/staging.py, which is proved; else any text."""

    version: int
    step: int
    digest: str
    run: str

    def __post_init__(self) -> None:
        for name in ("version", "step"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 63:
                raise ProtocolError(f"The policy's {name} is {value!r}: a whole number from 0 on is expected.")
        for name, pattern, words in (
            ("digest", _DIGEST, "1 to 128 printable ASCII characters without spaces"),
            ("run", _RUN, "1 to 64 hexadecimal digits in lower case"),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise ProtocolError(f"The policy's {name} is {value!r}: {words} are expected.")

    def __str__(self) -> str:
        return f"version {self.version} (step {self.step}, digest {self.digest}) of run {self.run}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Policy:
        """Raises ProtocolError naming the field and its value."""
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ProtocolError(f"The policy is {value!r}: an object with exactly {', '.join(names)} is expected.")
        return cls(**value)


@dataclass(frozen=True)
class Layout:
    """What one buffer holds. entries: (PEFT key, shape) in the order of the trainer's adapter; dtype: as in
    ``bfloat16``; config: of the adapter, as in ``adapter_config.json``; over NCCL one that scales nothing."""

    dtype: str
    entries: tuple[tuple[str, tuple[int, ...]], ...]
    config: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Tells it from others, in hexadecimal."""
        return hashlib.sha256(config_bytes(self.as_dict())).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        entries = [[key, list(shape)] for key, shape in self.entries]
        return {"dtype": self.dtype, "entries": entries, "config": self.config}

    @classmethod
    def from_dict(cls, value: Any) -> Layout:
        """Raises ProtocolError."""
        try:
            entries = tuple((str(key), tuple(int(size) for size in shape)) for key, shape in value["entries"])
            made = cls(str(value["dtype"]), entries, dict(value["config"]))
        except (TypeError, ValueError, KeyError) as error:
            raise ProtocolError(f"The layout is not understood: {type(error).__name__}: {error}.") from error
        if any(size < 1 for _, shape in entries for size in shape):
            raise ProtocolError("The layout has a shape with a size below 1.")
        return made


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of PEFT's as JSON can hold it."""
    return dict(json.loads(json.dumps(config, default=_plain)))


def _plain(value: Any) -> Any:
    """What it has beside JSON's own types: sets and enums."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, enum.Enum) else str(value)


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """What counts as the config's bytes where it travels as JSON and not as a file."""
    return json.dumps(config, sort_keys=True).encode()


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises ProtocolError naming ``what`` it was to be."""
    try:
        value = json.loads(text)
    except ValueError as error:  # undecodable bytes too
        raise ProtocolError(f"{what} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is {type(value).__name__} where a JSON object is expected.")
    return value


def http_status(error: Exception) -> int | None:
    """What a refusal with this error is answered with; None where that depends on what was asked for."""
    status: int | None = getattr(error, "status", None)
    return status or next((s for kind, s in _STATUSES.items() if isinstance(error, kind)), None)


def root_of(environment: Mapping[str, str] | None = None) -> str:
    """The folder below which adapters are handed over, an absolute path. Raises SettingsError."""
    return Settings.from_environment(environment).root


def limit_of(environment: Mapping[str, str] | None = None) -> int:
    """How many bytes an adapter's weights may have. Raises SettingsError."""
    return Settings.from_environment(environment).max_mib << 20


def release_port(communicator: Any) -> None:
    """Let go the group of a ``PyNcclCommunicator``, with the store that listens where it was made. Of vLLM 0.17's
    group, Python would close the socket that the store goes on listening on, and the process end with SIGABRT."""
    listening = getattr(communicator.group, "socket", None)
    if listening is not None:
        listening.detach()  # the store closes it
    communicator.group = None
