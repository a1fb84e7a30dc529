"""Requests and shared memory, without an engine."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import mmap
import os
import pickle
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from peft import LoraConfig

from swift_lora_fix import errors
from swift_lora_fix.memory import LoRATensorRequest, from_peft_model, from_safetensors, segment
from swift_lora_fix.memory.loading import mark, unmark
from swift_lora_fix.memory.request import PENDING, Content, has_tensors
from tests.support import forks, shm
from tests.support.peft_models import peft_model

CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {A: torch.randn(2, 6, dtype=torch.bfloat16), B: torch.randn(3, 2)}


@pytest.fixture
def written(tensors: dict[str, torch.Tensor]) -> Iterator[segment.Segment]:
    made = segment.Segment.write(tensors, CONFIG)
    yield made
    made.release()


# ---- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, {"peft_config": CONFIG, "lora_tensors": {A: torch.zeros(1)}, "lora_path": "/x"}]
)
def test_exactly_one_of_path_and_tensors(arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.AdapterRequestError, match="exactly one of lora_path and lora_tensors") as caught:
        LoRATensorRequest("policy", 1, **arguments)
    assert isinstance(caught.value, ValueError) and "'policy' (id 1)" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ((None, {A: torch.zeros(1)}), "go together"),
        ((CONFIG, {}), "is empty"),
        ((CONFIG, {A: [1.0]}), "is a list"),
        ((CONFIG, {A: torch.zeros(1, dtype=torch.int8)}), "torch.int8"),
        (("r=2", {A: torch.zeros(1)}), "peft_config is a str"),
    ],
)
def test_what_is_no_adapter_is_refused(arguments: tuple[Any, ...], phrase: str) -> None:
    with pytest.raises(errors.AdapterRequestError, match=phrase):
        LoRATensorRequest("policy", 1, *arguments)


def test_a_request_is_vllms_and_its_tensors_are_not_in_its_messages(tensors: dict[str, torch.Tensor]) -> None:
    import msgspec
    from vllm.lora.request import LoRARequest

    request = LoRATensorRequest("policy", 7, LoraConfig(r=2, target_modules=["q_proj"]), tensors, load_inplace=True)
    assert isinstance(request, LoRARequest) and request.lora_int_id == 7 and has_tensors(request)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=LoRARequest)
    assert (received.lora_name, received.lora_path, received.load_inplace) == ("policy", PENDING, True)
    assert request.content.config["target_modules"] == ["q_proj"], "a set in PEFT's config, a list in JSON"

    folder = LoRATensorRequest("folder", 8, lora_path="/somewhere")
    assert folder.lora_path == "/somewhere" and not has_tensors(folder)


def test_a_request_without_its_tensors_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    request = LoRATensorRequest("policy", 1, CONFIG, tensors)
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(errors.AdapterRequestError, match="cannot be pickled or deeply copied"):
            copier(request)
    with pytest.raises(errors.AdapterRequestError, match="lost its tensors"):
        has_tensors(copy.copy(request))
    folder = pickle.loads(pickle.dumps(LoRATensorRequest("folder", 2, lora_path="/somewhere")))
    assert (folder.lora_name, folder.lora_path) == ("folder", "/somewhere")


def test_tensors_that_change_after_they_were_sent(tensors: dict[str, torch.Tensor]) -> None:
    content = LoRATensorRequest("policy", 1, CONFIG, tensors).content
    content.publish().release()
    content.publish().release()
    tensors[B][0, 0] += 1
    with pytest.raises(errors.AdapterRequestError, match="changed after it was sent"):
        content.publish()


def test_from_safetensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    for source, config in ((tmp_path, None), (tmp_path / "adapter_model.safetensors", None), (data, CONFIG)):
        content = from_safetensors(source, peft_config=config).content
        assert content.config == CONFIG
        assert all(torch.equal(content.tensors[name], tensors[name]) for name in tensors)
    with pytest.raises(errors.AdapterRequestError, match="needs peft_config"):
        from_safetensors(data)
    for source in (data[:-1], data[:20], tmp_path / "missing"):
        with pytest.raises(errors.AdapterFileError):
            from_safetensors(source, peft_config=CONFIG)


def test_from_peft_model_is_peft_s_state_and_folds_what_the_config_does_not_say() -> None:
    from peft import get_peft_model_state_dict

    model = peft_model(r=4, lora_alpha=8)
    request = from_peft_model(model, lora_name="policy", lora_int_id=3)
    state = get_peft_model_state_dict(model)
    assert request.content.tensors.keys() == state.keys() and request.content.config["lora_alpha"] == 8
    assert all(torch.equal(request.content.tensors[name], state[name]) for name in state)
    assert not {t.data_ptr() for t in request.content.tensors.values()} & {t.data_ptr() for t in state.values()}

    for layer in model.modules():
        if hasattr(layer, "scaling") and "default" in layer.scaling:
            layer.scaling["default"] = 0.3
    folded = from_peft_model(model).content
    assert folded.config["lora_alpha"] == folded.config["r"] == 4
    for name, value in state.items():
        assert torch.equal(folded.tensors[name], value.float() * 0.3 if "lora_B" in name else value)


# ---- shared memory -------------------------------------------------------------------------------------------------


def test_another_process_reads_what_was_written(written: segment.Segment, tensors: dict[str, torch.Tensor]) -> None:
    script = f"""
        import json, safetensors
        from swift_lora_fix.memory import segment
        address = segment.Address.parse({str(written.address)!r})
        with segment.opened(address) as path:
            assert segment.read_config(path) == {CONFIG!r}
            with safetensors.safe_open(path, "pt") as file:
                print(json.dumps({{name: file.get_tensor(name).float().tolist() for name in file.keys()}}))
    """
    before = shm.names()
    done = forks.run(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: tensors[name].float().tolist() for name in tensors}
    assert shm.names() <= before


def test_what_is_released_is_gone(written: segment.Segment) -> None:
    written.release()
    written.release()
    assert written.is_released
    with (
        pytest.raises(errors.SegmentError, match="has ended or released it") as caught,
        segment.opened(written.address),
    ):
        pass
    assert isinstance(caught.value, OSError)


def test_a_sender_that_is_killed_leaves_nothing() -> None:
    script = """
        import sys, time, torch
        from swift_lora_fix.memory import segment
        made = segment.Segment.write({"x": torch.zeros(1 << 20)}, {})
        print(made.address, flush=True)
        time.sleep(60)
    """
    before = shm.names()
    sender = forks.start(textwrap.dedent(script), environment=dict(os.environ))
    said: list[segment.Address] = []
    deadline = time.monotonic() + 300
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
        lines = sender.stdout.splitlines(keepends=True)  # vLLM 0.17 logs there as well
        said = [*filter(None, (segment.Address.parse(line.strip()) for line in lines if line.endswith("\n")))]
    (address,) = said
    assert address.pid == sender.pid
    with segment.opened(address) as path:
        assert os.stat(path).st_size == address.size
    os.kill(sender.pid, signal.SIGKILL)
    assert sender.wait() == -signal.SIGKILL
    with pytest.raises(errors.SegmentError, match="has ended or released it"), segment.opened(address):
        pass
    assert shm.names() <= before


def test_it_is_sealed(written: segment.Segment) -> None:
    descriptor = written.address.descriptor
    for attack in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 8)):
        with pytest.raises(PermissionError):
            attack()
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, written.address.size)


def _forged(name: str, data: bytes, sealed: bool = True) -> int:
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    if sealed:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, segment._SEALS)
    return descriptor


@pytest.mark.parametrize("damage", ["truncated", "changed", "not sealed", "somebody else's", "a file"])
def test_another_segment_is_not_read(written: segment.Segment, damage: str, tmp_path: Path) -> None:
    with segment.opened(written.address) as path:
        data = Path(path).read_bytes()
    if damage == "truncated":
        descriptor, phrase = _forged(segment.MEMFD_NAME, data[:-1]), "truncated, or somebody else's"
    elif damage == "changed":
        descriptor, phrase = _forged(segment.MEMFD_NAME, data[:-1] + bytes([data[-1] ^ 1])), "has digest"
    elif damage == "not sealed":
        descriptor, phrase = _forged(segment.MEMFD_NAME, data, sealed=False), "is not sealed"
    elif damage == "somebody else's":
        descriptor, phrase = _forged("other", data), "is not an adapter's shared memory"
    else:
        (tmp_path / "file").write_bytes(data)
        descriptor, phrase = os.open(tmp_path / "file", os.O_RDONLY), "is not an adapter's shared memory"
    address = segment.Address(os.getpid(), descriptor, written.address.size, written.address.digest)
    try:
        with pytest.raises(errors.SegmentError, match=phrase), segment.opened(address):
            pass
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("path", ["/swift-lora-fix-memory/1/2/3", "/swift-lora-fix-memory/../etc/3/x"])
def test_a_malformed_address(path: str) -> None:
    with pytest.raises(errors.SegmentError, match="no address"):
        segment.Address.parse(path)


def test_other_paths_are_not_ours() -> None:
    assert segment.Address.parse("/models/adapter") is None and segment.Address.parse(PENDING) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors[A][1, 3] = value
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.NonFiniteAdapterError, match="q_proj.lora_A"):
        segment.Segment.write(tensors, CONFIG)
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_values_are_finite() -> None:
    huge = torch.full((4, 1000), 3e38)
    segment.Segment.write({"x": huge, "y": huge.bfloat16(), "z": torch.full((300,), 60000.0).half()}, {}).release()


def test_no_room_for_it(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(errors.SegmentError, match=r"No shared memory for \d+ more bytes .*No space left"):
            segment.Segment.write(tensors, CONFIG)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [0, 1, 3, 4097 * 4, 100_001])
def test_sizes_of_every_alignment(count: int) -> None:
    tensors = {"a": torch.randn(count).bfloat16(), "b": torch.randn(3, 5).T, "c": torch.randn(7).double()}
    made = segment.Segment.write(tensors, {})
    with segment.opened(made.address) as path, safetensors.safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    made.release()


# ---- hooks ---------------------------------------------------------------------------------------------------------


def test_errors_come_back_as_they_were() -> None:
    text = f"gone {mark(errors.SegmentError)}"
    through_vllm = RuntimeError(f"Call to add_lora method failed: {text}")
    error = unmark(through_vllm)
    assert type(error) is errors.SegmentError and str(error) == "gone"
    assert unmark(RuntimeError("something else")) is None


def test_an_address_as_path_never_leaves_vllm_unhooked() -> None:
    """What a worker without the hooks does with an address: it finds no such folder."""
    assert str(segment.Address(1, 2, 3, "x")).startswith("/") and not Path(str(segment.Address(1, 2, 3, "x"))).exists()


def run(script: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if "SWIFT_LORA_FIX" not in k}
    done = forks.run(textwrap.dedent(script), environment={**kept, "VLLM_PLUGINS": "none", **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_hooks_go_in_and_out() -> None:
    run("""
        import os, sys
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.v1.engine.llm_engine import LLMEngine
        before = [vars(PEFTHelper)["from_local_dir"], vars(LLMEngine)["add_lora"]]
        import swift_lora_fix.memory as memory
        from swift_lora_fix.memory import hooks
        assert os.environ["SWIFT_LORA_FIX_MEMORY"] == "1" and "swift" not in sys.modules
        wrapped = [vars(PEFTHelper)["from_local_dir"], vars(LLMEngine)["add_lora"]]
        assert [type(w).__name__ for w in wrapped] == ["FunctionWrapper"] * 2
        import vllm.v1.engine.async_llm, vllm.v1.worker.lora_model_runner_mixin, vllm.lora.lora_model
        assert all(hooks.is_installed().values()) and len(hooks.is_installed()) == 7
        hooks.install()
        assert vars(LLMEngine)["add_lora"] is wrapped[1], "twice changes nothing"
        hooks.uninstall()
        assert [vars(PEFTHelper)["from_local_dir"], vars(LLMEngine)["add_lora"]] == before
        assert "SWIFT_LORA_FIX_MEMORY" not in os.environ and not any(hooks.is_installed().values())
    """)


def test_the_entry_point_does_nothing_unless_the_parent_imported_this() -> None:
    script = """
        import sys
        from swift_lora_fix_vllm import register
        register()
        print("swift_lora_fix.memory" in sys.modules)
    """
    assert run(script).split()[-1] == "False"
    assert run(script, SWIFT_LORA_FIX_MEMORY="1").split()[-1] == "True"


@pytest.mark.parametrize("side, value, alpha", [("A", 70_000.0, 2), ("B", 70_000.0, 2), ("B", 40_000.0, 4)])
def test_what_overflows_in_the_engines_dtype_is_not_served(side: str, value: float, alpha: int) -> None:
    """A direct write casts, and scales B, in the LoRA dtype: 70,000 is infinity in float16."""
    from swift_lora_fix.memory.update import DirectWriter

    names = {s: f"base_model.model.a.q_proj.lora_{s}.weight" for s in "AB"}
    content = {names["A"]: torch.ones(2, 4), names["B"]: torch.ones(6, 2)}
    staged = {name: torch.zeros_like(tensor, dtype=torch.float16) for name, tensor in content.items()}
    slot = torch.zeros(2, 4, dtype=torch.float16)
    copy = SimpleNamespace(destination=slot, entry=SimpleNamespace(key=names["A"]), region=lambda tensor: tensor)
    plan = SimpleNamespace(copies=[(None, [copy])], slots=[slot], index=0)
    writer = DirectWriter(None, plan, staged, torch.float16)  # type: ignore[arg-type]
    config = {"r": 2, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    writer.write(Content(config, content))
    assert slot.eq(1).all()
    content[names[side]] = torch.full_like(content[names[side]], value)
    with pytest.raises(errors.NonFiniteAdapterError, match=f"lora_{side}"):
        writer.write(Content(config, content))
    assert slot.eq(1).all() and staged[names["B"]].eq(alpha / 2).all(), "nothing was written"
