"""The protocol between a trainer and a rollout server (docs/servers.md). Both sides import this module.

All paths are below `PREFIX`; answers are JSON and begin with ``boot`` and ``epoch``. A refusal has an HTTP status and
``{"error": class, "message"}``.

- ``GET status/``: `PROTOCOL`, releases, what the engine takes, ``host``, ``holder`` and ``policy`` (or null), and
  whether rollouts are ``plain``.
- ``GET base/``: ``{"sums": {name: [dtype, shape, checksum]}}`` of the model's files, names as in the files.
- ``POST lease/`` `Lease`: from now on only this run gives orders. Refused while the process of another run is alive.
- ``POST push/`` `Push`: before ms-swift's own push of a base, and after it: then the workers' errors are answered.
- ``POST prepare/`` `Prepare`: every worker checks what will come, and makes room for it. Once for each lease.
- ``POST stage/`` `Stage`: this policy comes next; `NO_NCCL` if it cannot come that way.
- ``POST receive/`` `Receive`: the bytes come over NCCL, from shared memory of this host (404 if that cannot be opened),
  or as the body (`BYTES`; the JSON is then in `POLICY_HEADER`). Every worker proves the policy's digest of them.
- ``POST commit/`` `Commit`: every worker serves what it received, or none serves anything until the next commit.
- ``POST serve/`` `Serve`: rollouts from the base alone, or with the adapter again.

Each order names the process and the base that it is for (`To`); one for another is refused with `ANOTHER`. Orders may
be repeated. ``POST /infer/`` is ms-swift's; with `POLICY_HEADER` it is refused when the server serves another policy.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StrictBool, StrictInt, StrictStr, ValidationError

from ..errors import AccessError, ProtocolError

PROTOCOL = 6
PREFIX = "/swift_lora_fix"
POLICY_HEADER = "X-Swift-Lora-Fix-Policy"
BYTES = "application/octet-stream"
PROBE = "swift-lora-fix-"  # prefix of the ``uuid`` of the gate's requests: multi-turn schedulers must not touch them

UNSEEN = 404  # shared memory that the server cannot open; also the status of a server without this package
ANOTHER = 412  # the order is for another process, or for another base, than this one
NO_NCCL = 501  # HTTP's "not implemented": no adapter over NCCL here; the message says why

METHOD = "swift_lora_fix_command"  # inside the server: the method of its workers
RPC = "swift_lora_fix_receiver"  # inside an engine: the method of vLLM's workers (``collective_rpc``)
EXTENSION = "swift_lora_fix.server.rollout.extension.RolloutWorkerExtension"  # replaces ms-swift's
SWIFT_EXTENSION = "WeightSyncWorkerExtension"

_STATUSES = {ProtocolError: 400, AccessError: 403}
_Run = Field(pattern="^[0-9a-f]{1,64}$")
_Natural = Field(ge=0, lt=1 << 63)


class Model(BaseModel):
    """What travels: exactly these fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Policy(Model):
    """Names one policy. version: grows within one trainer's ``run`` (hexadecimal). digest: the policy digest
    (engine/vllm/slots/staging.py), which each of vLLM's workers proves of what lies on its device."""

    version: StrictInt = _Natural
    step: StrictInt = _Natural
    digest: StrictStr = Field(pattern="^[!-~]{1,128}$")
    run: StrictStr = _Run

    def __str__(self) -> str:
        return f"version {self.version} (step {self.step}, digest {self.digest}) of run {self.run}"


class To(Model):
    """Whom an order is for. boot: new at each start of the server. epoch: how often its base was written over since.
    run: who gives the order."""

    boot: StrictStr
    epoch: StrictInt = _Natural
    run: StrictStr = _Run


class Layout(Model):
    """The content of one buffer. entries: (PEFT key, shape) in the order of the trainer's adapter; dtype: as in
    ``bfloat16``; config: as in ``adapter_config.json``, of scaling 1, because the scaling is in B."""

    dtype: StrictStr
    entries: tuple[tuple[StrictStr, tuple[PositiveInt, ...]], ...]
    config: dict[str, Any]


class Holder(Model):
    """The process of a run. host: `hosts.this_host`, empty if unknown. start: when it began, in the kernel's ticks."""

    run: StrictStr = _Run
    host: StrictStr
    name: StrictStr
    pid: StrictInt
    start: StrictInt

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.name})"


class Address(Model):
    """Shared memory of a process of this host (shared.py)."""

    pid: StrictInt = Field(ge=1)
    descriptor: StrictInt = _Natural
    size: StrictInt = _Natural


class Lease(Model):
    holder: Holder


class Order(Model):
    to: To


class Push(Order):
    ends: StrictBool


class Prepare(Order):
    layout: Layout


class Stage(Order):
    policy: Policy
    nccl: StrictBool


class Receive(Order):
    """written: the bytes are in the memory that `Stage` was answered with. Else they come over NCCL, or as the body."""

    policy: Policy
    written: StrictBool = False


class Commit(Order):
    """by_reference: through vLLM's own loader."""

    policy: Policy
    by_reference: StrictBool = False


class Serve(Order):
    plain: StrictBool


def parsed(kind: type[Any], text: str | bytes, what: str) -> Any:
    """A `Model` of this kind from JSON. Raises ProtocolError naming the fields that are wrong. what: names the text."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, each['loc'])) or 'it'} is {str(each.get('input'))[:80]!r}: {each['msg']}"
            for each in error.errors()
        )
        raise ProtocolError(f"{what} is not understood: {'; '.join(problems)}") from error


def http_status(error: Exception) -> int | None:
    """The HTTP status that a refusal with this error gets; None if that depends on the route."""
    status: int | None = getattr(error, "status", None)
    return status or next((s for kind, s in _STATUSES.items() if isinstance(error, kind)), None)


def release_port(communicator: Any) -> None:
    """Release the group of a ``PyNcclCommunicator`` and, where it was created, the store that listens for it. With vLLM
    0.17's group, Python would close the socket under the listening store, and the process would end with SIGABRT."""
    listening = getattr(communicator.group, "socket", None)
    if listening is not None:
        listening.detach()  # the store closes it
    communicator.group = None
