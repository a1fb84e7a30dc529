"""The protocol between a trainer and a rollout server. Both sides import this module.

All paths are below `PREFIX`; answers are JSON. A refusal has an HTTP status and ``{"error": class, "message"}``.

- ``GET status/``: `PROTOCOL`, releases, ``boot`` (new at each start of the server), what the engine takes, ``policy``
  (or null) and whether rollouts are ``plain``.
- ``GET base/``: ``{"sums": {name: [dtype, shape, checksum]}}`` of the model's files; dtype as in ``bfloat16``, names as
  in the files.
- ``POST stage/``: every worker reads and checks an adapter. Three forms:
  JSON ``{"policy", "digest", "folder"}``: a folder below the server's root.
  ``application/octet-stream``: the safetensors bytes, with ``{"policy", "digest", "config"}`` in `POLICY_HEADER`.
  JSON ``{"policy", "layout"}``: announces bytes that come over NCCL at ``receive/``; `NO_NCCL` if they cannot. The
  layout is a `Layout`, or the ``key`` of the last one (410 if that is another).
- ``POST receive/`` ``{"policy"}``: every worker joins the broadcast of what was announced, and checks it.
- ``POST find/`` ``{"policy"}``: stage again what was sent under another version; 410 if it is gone.
- ``POST pushed/``: called after ms-swift's own push of the base. Returns errors of workers, which ms-swift only logs.
- ``POST commit/`` ``{"policy"}``: every worker serves what it staged, or none does. Idempotent. With
  ``"by_reference": true`` through vLLM's own loader. Answers have ``boot``.
- ``POST abort/`` ``{"policy"}``: drop what was staged.
- ``POST serve/`` ``{"plain": bool}``: rollouts from the base alone, or with the adapter again.

``POST /infer/`` is ms-swift's. With `POLICY_HEADER` it is refused when the server serves another policy.
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
PROBE = "swift-lora-fix-"  # prefix of the ``uuid`` of the gate's requests: multi-turn schedulers must not touch them

# The files of an adapter's folder, as PEFT names them. B is unscaled, as PEFT has it: the server scales it by the
# config.
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# In the safetensors metadata: the names, as JSON, in the order that the policy's digest is computed in. It is there
# when a trainer with this package wrote the file, with the scaling in B: then each vLLM worker checks that digest.
ORDER = "swift_lora_fix_order"

ROOT_VARIABLE, LIMIT_VARIABLE = "SWIFT_LORA_FIX_ROOT", "SWIFT_LORA_FIX_MAX_MIB"  # see Settings

GONE = 410  # the server no longer has, or does not know, what it should use again
NO_NCCL = 501  # HTTP's "not implemented": this server takes no adapter over NCCL; its message says why

METHOD = "swift_lora_fix_command"  # inside the server: the method of its workers
RPC = "swift_lora_fix_receiver"  # inside an engine: the method of vLLM's workers (``collective_rpc``)
EXTENSION = "swift_lora_fix.server.rollout.extension.RolloutWorkerExtension"  # replaces ms-swift's
SWIFT_EXTENSION = "WeightSyncWorkerExtension"

_STATUSES = {ProtocolError: 400, AccessError: 403}
_RUN = re.compile(r"[0-9a-f]{1,64}")
_DIGEST = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True)
class Policy:
    """Names one policy. version: grows within one trainer ``run`` (hexadecimal).

    digest: over NCCL, and for a file with `ORDER`, the policy digest (engine/vllm/slots/staging.py), which is checked;
        otherwise any text.
    """

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
    """The content of one buffer. entries: (PEFT key, shape) in the order of the trainer's adapter; dtype: as in
    ``bfloat16``; config: as in ``adapter_config.json``. Over NCCL it must be one of scaling 1."""

    dtype: str
    entries: tuple[tuple[str, tuple[int, ...]], ...]
    config: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Identifies this layout, in hexadecimal."""
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
    """A PEFT config, with only types that JSON has."""
    return dict(json.loads(json.dumps(config, default=_plain)))


def _plain(value: Any) -> Any:
    """Converts what JSON does not have: sets and enums."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, enum.Enum) else str(value)


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The config's bytes for its digest, when it travels as JSON and not as a file."""
    return json.dumps(config, sort_keys=True).encode()


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ProtocolError; ``what`` names it in the message."""
    try:
        value = json.loads(text)
    except ValueError as error:  # undecodable bytes too
        raise ProtocolError(f"{what} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is {type(value).__name__} where a JSON object is expected.")
    return value


def http_status(error: Exception) -> int | None:
    """The HTTP status that a refusal with this error gets; None if that depends on the route."""
    status: int | None = getattr(error, "status", None)
    return status or next((s for kind, s in _STATUSES.items() if isinstance(error, kind)), None)


def root_of(environment: Mapping[str, str] | None = None) -> str:
    """The folder below which adapters are handed over, an absolute path. Raises SettingsError."""
    return Settings.from_environment(environment).root


def limit_of(environment: Mapping[str, str] | None = None) -> int:
    """The limit on the bytes of an adapter's weights. Raises SettingsError."""
    return Settings.from_environment(environment).max_mib << 20


def release_port(communicator: Any) -> None:
    """Release the group of a ``PyNcclCommunicator`` and, where it was created, the store that listens for it. With vLLM
    0.17's group, Python would close the socket under the listening store, and the process would end with SIGABRT."""
    listening = getattr(communicator.group, "socket", None)
    if listening is not None:
        listening.detach()  # the store closes it
    communicator.group = None
