"""What a program gives to vLLM: a ``LoRARequest`` with the adapter's tensors in place of a folder.

Legend for shapes: r rank, in/out the wrapped layer's features. A is (r, in), B is (out, r).
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from vllm.lora.request import LoRARequest

from ..errors import AdapterFileError, AdapterRequestError
from ..policy import adapter as adapters
from . import segment

PENDING = "/swift-lora-fix-memory-not-sent"  # lora_path of a request whose tensors were not sent yet


@dataclass
class Content:
    """The adapter of a request. It is read when it is sent, and must not change afterwards.

    digest: of its bytes, once they were in a segment. version: the engine's name for it: the digest, or a random one if
        it was written without a segment.
    is_kept: vLLM's worker in this process is to keep these very tensors, not copies from the segment.
    """

    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    digest: str | None = None
    version: str | None = None
    is_kept: bool = False

    def publish(self, dtype: torch.dtype | None = None) -> segment.Segment:
        """Put it into shared memory, for an engine with this LoRA dtype. Raises AdapterRequestError when the tensors
        have changed since they were sent before."""
        published = segment.Segment.write(self.tensors, self.config, dtype)
        digest = published.address.digest
        if self.digest not in (None, digest):
            published.release()
            raise AdapterRequestError(
                f"The tensors of this request were changed after it was sent (digest {self.digest}, now {digest}): "
                "make a new LoRATensorRequest for each policy."
            )
        self.digest = digest
        self.version = self.version or digest
        return published


class _RequestType(type(LoRARequest)):  # type: ignore[misc]
    """Keeps the tensors out of msgspec's fields: a Struct's fields are sent in every message."""

    def __call__(
        cls,
        lora_name: str,
        lora_int_id: int,
        peft_config: Any = None,
        lora_tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        lora_path: str | None = None,
        load_inplace: bool = False,
        **fields: Any,
    ) -> Any:
        if bool(lora_path) == (lora_tensors is not None):
            raise AdapterRequestError(
                f"LoRATensorRequest {lora_name!r} (id {lora_int_id}) needs exactly one of lora_path and lora_tensors, "
                f"and got {'both' if lora_path else 'neither'}."
            )
        if (peft_config is None) != (lora_tensors is None):
            raise AdapterRequestError(
                f"LoRATensorRequest {lora_name!r} (id {lora_int_id}): lora_tensors and peft_config go together (a "
                "folder has its own adapter_config.json)."
            )
        content = None
        if lora_tensors is not None:
            segment.check_tensors(lora_tensors)
            content = Content(plain_config(peft_config), dict(lora_tensors))
        request = super().__call__(lora_name, lora_int_id, lora_path or PENDING, load_inplace=load_inplace, **fields)
        request.content = content
        return request


class LoRATensorRequest(LoRARequest, metaclass=_RequestType, dict=True):
    """An adapter from memory, accepted wherever vLLM takes a ``LoRARequest``.

    ``LoRATensorRequest(lora_name, lora_int_id, peft_config, lora_tensors)``; with ``lora_path=`` instead of the last
    two it is a plain ``LoRARequest``.

    Args:
        lora_name: as in ``LoRARequest``. vLLM gets ``name@digest``: up to 0.17 at least, its prefix cache is keyed by
            the name alone, so with the same name a new policy would be answered from the KV cache of the old one.
        lora_int_id: as in ``LoRARequest``, above 0.
        peft_config: PEFT's ``LoraConfig``, or the content of ``adapter_config.json`` as a dict.
        lora_tensors: PEFT's names (``base_model.model.<module>.lora_A.weight``) to tensors, A (r, in), B (out, r), any
            device, float64, float32, bfloat16 or float16. They are read when the request is first sent, and not copied
            before: do not write to them while it is in use. They are never written to.
        load_inplace: replace what the engine holds under this id. Without it, another adapter under the same id raises
            `AdapterConflictError`; plain vLLM would silently keep the old one.

    Raises:
        AdapterRequestError: not exactly one of path and tensors, tensors without a config, or a value is no tensor.
    """

    content = cast(Any, None)  # None in a copied or unpickled request, which lost its tensors

    def __reduce__(self) -> Any:
        if self.content is not None:
            raise AdapterRequestError(
                f"LoRATensorRequest {self.lora_name!r} (id {self.lora_int_id}) cannot be pickled or deeply copied: its "
                "tensors would go along. Hand vLLM the object itself; it sends them once."
            )
        return LoRARequest, tuple(getattr(self, field) for field in self.__struct_fields__)

    @classmethod
    def replacing(cls, request: Any) -> Any:
        """The same content with ``load_inplace=True``. Raises AdapterRequestError when it has no tensors."""
        if not has_tensors(request):
            raise AdapterRequestError(
                f"{type(request).__name__} {request.lora_name!r} (id {request.lora_int_id}) has no tensors: only a "
                "LoRATensorRequest with lora_tensors can be an update."
            )
        twin = cls(request.lora_name, request.lora_int_id, {}, request.content.tensors, load_inplace=True)
        twin.base_model_name, twin.content = request.base_model_name, request.content
        return twin


def has_tensors(request: Any) -> bool:
    """Whether this request's adapter is in memory. Raises AdapterRequestError when it lost its tensors."""
    if not isinstance(request, LoRATensorRequest) or request.lora_path != PENDING:
        return False
    if request.content is None:
        raise AdapterRequestError(
            f"LoRATensorRequest {request.lora_name!r} (id {request.lora_int_id}) was copied or pickled and has lost "
            "its tensors on the way: hand vLLM the object itself."
        )
    return True


def from_peft_model(
    model: torch.nn.Module,
    adapter: str = adapters.DEFAULT_ADAPTER,
    *,
    lora_name: str | None = None,
    lora_int_id: int = 1,
    load_inplace: bool = False,
) -> LoRATensorRequest:
    """A request with the current LoRA of a ``peft.PeftModel``; the model is only read.

    The tensors are whole copies on the CPU. With DeepSpeed ZeRO-3 and FSDP2 they are all-gathered: call it on all
    ranks. If PEFT scales a module differently than vLLM reads from the config (rank_pattern, alpha_pattern, a changed
    scaling), PEFT's factor is multiplied into B in fp32, and the config gets scaling 1.

    Raises UnsupportedAdapterError for what vLLM cannot serve (see `swift_lora_fix.policy.adapter.bind`).
    """
    bound = adapters.bind(model, adapter)
    tensors = adapters.read_to_host(bound, bound.parameters[0].device)
    config = plain_config(bound.config)
    if not _is_scaled_as_configured(bound, config):
        for entry in bound.entries:
            if entry.scale != 1.0:
                tensors[entry.key] = tensors[entry.key].float() * entry.scale
        config.update(r=bound.max_rank, lora_alpha=bound.max_rank, use_rslora=False, rank_pattern={}, alpha_pattern={})
    return LoRATensorRequest(lora_name or adapter, lora_int_id, config, tensors, load_inplace=load_inplace)


def from_safetensors(
    source: str | Path | bytes,
    *,
    peft_config: Any = None,
    lora_name: str = "adapter",
    lora_int_id: int = 1,
    load_inplace: bool = False,
) -> LoRATensorRequest:
    """A request with the adapter of a safetensors file, of a PEFT folder, or of a file's bytes.

    peft_config: needed with bytes; for a path it defaults to the ``adapter_config.json`` beside the file.

    Raises AdapterFileError when a file is missing, truncated or not safetensors; AdapterRequestError without a config.
    """
    config = peft_config
    try:
        if isinstance(source, bytes):
            tensors = safetensors.torch.load(source)
        else:
            path = Path(source)
            path = path / "adapter_model.safetensors" if path.is_dir() else path
            tensors = safetensors.torch.load_file(str(path))
            if config is None:
                config = json.loads((path.parent / "adapter_config.json").read_text())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        what = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise AdapterFileError(f"{what}: no adapter in safetensors format could be read: {error}") from error
    if config is None:
        raise AdapterRequestError("from_safetensors(bytes) needs peft_config: the bytes hold tensors only.")
    return LoRATensorRequest(lora_name, lora_int_id, config, tensors, load_inplace=load_inplace)


def plain_config(config: Any) -> dict[str, Any]:
    """PEFT's config as ``adapter_config.json`` would hold it. Raises AdapterRequestError if it is no config."""
    fields = config if isinstance(config, Mapping) else getattr(config, "to_dict", lambda: None)()
    if not isinstance(fields, Mapping):
        raise AdapterRequestError(
            f"peft_config is a {type(config).__name__}: PEFT's LoraConfig, or the dict of an adapter_config.json, is "
            "expected."
        )
    try:
        return dict(json.loads(json.dumps(fields, default=_jsonable)))
    except (TypeError, ValueError) as error:
        raise AdapterRequestError(f"peft_config cannot be written as JSON: {error}") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"a {type(value).__name__} ({value!r})")


def _is_scaled_as_configured(bound: adapters.Adapter, config: Mapping[str, Any]) -> bool:
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    plain = not (config.get("rank_pattern") or config.get("alpha_pattern"))
    return plain and all(e.scale == (scaling if e.is_b else 1.0) for e in bound.entries)
