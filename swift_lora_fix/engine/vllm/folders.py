"""A plain ``vllm serve``, without this package: each policy goes to it as a folder, under a name of its own.

vLLM loads the folder (``/v1/load_lora_adapter``), and rollouts ask for its name, which ends with the policy's digest. A
new name has no prefix cache yet, so that no answer mixes two policies; the name before is unloaded. vLLM says only
which names it holds: what it computes, the gate sees in its answers. Only the main rank talks to the server; the other
ranks are told the result.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import requests
import torch

from ...common.atomic import all_or_nothing
from ...common.clock import Clock
from ...common.log import warning
from ...common.ranks import on_main_rank, ranks_agree
from ...common.settings import Settings
from ...common.shadowing import holding
from ...errors import RolloutServerError
from ...install import releases
from ...policy import adapter as adapters
from ...policy.adapter import Adapter
from ...trainer import TrainerPort
from ..port import ServingPort, WriteReport
from .finite import FiniteCheck
from .slots import loader
from .slots.staging import host_digest

DTYPE = torch.float32  # of the files: vLLM casts to its own, which rounds once
HOW = "start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"


def why_not(url: str, lora_config: Any, rank: int) -> str:
    """Why a server cannot take adapters of this rank as folders; "" if it can. lora_config: what its ``/server_info``
    says of LoRA, None where it has no LoRA layers."""
    if lora_config is None:
        return f"the vLLM server {url} has no LoRA layers: {HOW}"
    if rank > lora_config["max_lora_rank"]:
        room = releases.engine_rank(rank) or rank
        return f"the vLLM server {url} has no room for rank {rank}: start it with --max-lora-rank {room}"
    # without a name vLLM refuses, and changes nothing; without the route it is 404
    if _post(url, "unload_lora_adapter", {"lora_name": ""}).status_code == 404:
        return f"the vLLM server {url} takes no adapter while it runs: {HOW}"
    return ""


class FolderEngine:
    """The server of one trainer.

    client: the framework's own, on the main rank only, else None. It has ``base_url``, and ``model``: the name that its
        requests ask for. name: of the policy that rollouts ask for; None: of none, so the base model's.
    """

    is_shared = True
    is_asleep = False
    cache_block = 128  # vLLM's largest default, that of its CPU backend
    logits_processors: Sequence[str] = ()  # nobody tells us

    def __init__(self, trainer: TrainerPort) -> None:
        self.client = trainer.server_client
        self.name: str | None = None

    def is_of(self, trainer: TrainerPort) -> bool:
        return self.client is None or trainer.server_client is self.client

    def make_ready(self) -> bool:
        return False

    def generate(self, infer: Callable[[], Any]) -> Any:
        """Rollouts ask for the policy's name: a server that does not know it refuses them."""
        if self.client is None:
            return infer()
        with holding(self.client, model=self.name or self.client.model):
            return infer()

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Requests ask for the base model, for the gate."""
        name, self.name = self.name, None
        try:
            yield
        finally:
            self.name = name

    def load(self, name: str, folder: Path) -> None:
        """Have the server hold the policy in ``folder``, and rollouts ask for it. Raises RolloutServerError when it
        refuses, with its own words; it then serves what it served."""
        url = self.client.base_url
        answer = _post(url, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if answer.status_code != 200:
            raise RolloutServerError(
                f"vLLM server {url} did not take the adapter in {folder}, which it must be able to read "
                f"({answer.status_code}: {answer.text[:500]})."
            )
        before, self.name = self.name, name
        if before is not None:
            self._unload(before)

    def _unload(self, name: str) -> None:
        """A policy that nothing asks for any more. One that stays costs memory, and is a warning."""
        url = self.client.base_url
        try:
            answer = _post(url, "unload_lora_adapter", {"lora_name": name})
            why = "" if answer.status_code == 200 else answer.text[:200]
        except RolloutServerError as error:
            why = str(error)
        if why:
            warning(f"vLLM server {url} did not unload {name}: {why}")

    def held(self) -> set[str]:
        """The names that the server knows. Raises RolloutServerError when it does not answer."""
        url = f"{self.client.base_url}/v1/models"
        try:
            return {str(model["id"]) for model in requests.get(url, timeout=_deadline()).json()["data"]}
        except (requests.RequestException, ValueError, KeyError) as error:
            raise RolloutServerError(f"vLLM server {url} does not answer: {error}") from error


class FolderWriter:
    """Writes one trainer's policy into a folder of its own at each sync, and has the server load it."""

    mode: ClassVar[Literal["adapter", "fused"]] = "adapter"
    keeps_base = False
    slots = weights = None  # we cannot see the server's memory

    def __init__(self, trainer: TrainerPort, engine: FolderEngine, adapter: Adapter) -> None:
        self.trainer, self.engine, self.adapter = trainer, engine, adapter
        self.serving: ServingPort = FolderServing(engine, adapter)
        self._run, self._version = uuid.uuid4().hex[:8], 0
        self._names: list[str] = []  # those that the server took, on the main rank
        self._root = Path(trainer.output_folder).absolute() / "swift_lora_fix"
        self._check = FiniteCheck(adapter, DTYPE, trainer.device, self.all_ranks)

    @property
    def place(self) -> str:
        return "vLLM server's LoRA layers, from a folder"

    def all_ranks(self, fine: bool) -> bool:
        return fine if self.trainer.ranks == 1 else ranks_agree(fine, self.trainer.device)

    def begin_validation(self) -> None:
        self._check.begin([parameter.data_ptr() for parameter in self.adapter.parameters])

    def validate(self) -> None:
        self._check.finish()

    def send_base(self, straight: bool = False) -> None:
        """The server has its model's own. Whether that is the trainer's, the gate asks."""

    def write(self) -> WriteReport:
        """All ranks together. Raises RolloutServerError when the server does not take it."""
        clock = Clock()
        held = adapters.read_to_host(self.adapter, self.trainer.device)
        digest = self.digest_of(held)
        clock.lap("read")
        self._version += 1  # also where the server refuses: it may have taken the name
        sizes: list[int] = []
        self._on_main(lambda: sizes.append(self._send(held, digest)))
        clock.lap("write")
        return WriteReport("folder", clock.laps, sum(sizes), digest)

    def write_by_reference(self) -> WriteReport:
        """There is no other way."""
        return self.write()

    def _send(self, held: dict[str, torch.Tensor], digest: str) -> int:
        """Returns the bytes of the adapter."""
        from safetensors.torch import save_file

        name = f"swift-lora-fix-{self._run}-{self._version}-{digest}"
        self._root.mkdir(parents=True, exist_ok=True)
        tensors = loader.stage(self.adapter, held, DTYPE)
        with all_or_nothing(self._root / name) as folder:
            save_file(tensors, folder / "adapter_model.safetensors")
            config = loader.plain_config(self.adapter)
            (folder / "adapter_config.json").write_text(json.dumps(config))
        try:
            self.engine.load(name, self._root / name)
        except BaseException:
            shutil.rmtree(self._root / name, ignore_errors=True)
            raise
        self._names.append(name)
        for stale in self._names[-3:-2]:  # the one before may be looked up once more
            shutil.rmtree(self._root / stale, ignore_errors=True)
        return sum(value.numel() * value.element_size() for value in tensors.values())

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        return host_digest(self.adapter, held, DTYPE)

    def what_is_missing(self) -> str | None:
        """Asks the server: one that was started again holds no policy."""
        name = self.engine.name
        if self.engine.client is None or name is None or name in self.engine.held():
            return None
        return (
            f"the vLLM server {self.engine.client.base_url} does not hold it any more, it was started again or told so"
        )

    def is_current(self) -> bool:
        return True  # a name is one policy for ever

    def adapted_parameters(self) -> set[str]:
        return set()  # the engine's parameters are unknown here

    def _on_main(self, work: Callable[[], Any]) -> None:
        """On the main rank; its error is raised on every rank."""
        trainer = self.trainer
        problem = on_main_rank(work, trainer.is_main_rank, trainer.ranks, trainer.device)
        if problem is not None:
            raise problem


class FolderServing:
    """The server's LoRA layers apply the adapter. They round nothing that the trainer does not round too."""

    rounds, copies = False, 1
    stand_ins: Collection[torch.nn.Module] = ()
    reset_caches = abort_unfinished = None
    dtype = torch.bfloat16  # unless it was told otherwise, vLLM computes in 16 bits; nobody tells us

    def __init__(self, engine: FolderEngine, adapter: Adapter) -> None:
        self._engine, self._adapter = engine, adapter

    def engine_without_adapter(self) -> contextlib.AbstractContextManager[None]:
        return self._engine.plain()

    def trainer_without_adapter(self) -> contextlib.AbstractContextManager[None]:
        return adapters.scaled(self._adapter, 0.0)

    def trainer_as_rounded(self) -> contextlib.AbstractContextManager[None]:
        raise AssertionError("nothing is rounded here")


def _deadline() -> float:
    return Settings.from_environment().server_deadline


def _post(url: str, route: str, content: dict[str, str]) -> requests.Response:
    try:
        return requests.post(f"{url}/v1/{route}", json=content, timeout=_deadline())
    except requests.RequestException as error:
        raise RolloutServerError(f"vLLM server {url} does not answer: {error}") from error
