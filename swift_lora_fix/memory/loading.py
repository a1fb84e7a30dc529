"""Worker side: vLLM's own loader, with all its checks, reads an adapter from shared memory instead of a folder.

vLLM's code does everything: ``PEFTHelper`` gets the segment's config, and ``LoRAModel.from_local_checkpoint`` finds the
segment in place of the ``adapter_model.safetensors`` that it looks for.
"""

from __future__ import annotations

import contextlib
import os
import re
import types
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Callable

from .. import errors
from ..errors import AdapterConflictError, ContractError, SwiftLoraFixError, UnsupportedAdapterError
from .segment import Address, opened, read_config

_SOURCE = "swift_lora_fix_digest"  # attribute of a loaded LoRAModel: the digest it was loaded from
_WEIGHTS = "adapter_model.safetensors"
_MARK = re.compile(r"\[swift_lora_fix\.(\w+)\]")

# While a write plan is learnt: tensors of equal values that vLLM loads in place of the segment's.
substitute: ContextVar[Mapping[str, Any] | None] = ContextVar("substitute", default=None)


def load_config(wrapped: Callable[..., Any], helper: Any, args: Any, kwargs: Any) -> Any:
    """``PEFTHelper.from_local_dir``: takes the config from the segment. vLLM checks its fields, as for a folder."""
    address = Address.parse(_argument("lora_path", args, kwargs))
    if address is None:
        return wrapped(*args, **kwargs)
    with opened(address, verify=False) as path:  # load_weights verifies, before anything is served
        config = read_config(path)
    positions = args[1] if len(args) > 1 else kwargs.get("max_position_embeddings")
    return helper.from_dict({**config, "vllm_max_position_embeddings": positions})


def load_weights(wrapped: Callable[..., Any], model_class: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModel.from_local_checkpoint``: reads the segment. Checks and reading are vLLM's own."""
    address = Address.parse(_argument("lora_dir", args, kwargs))
    if address is None:
        return wrapped(*args, **kwargs)
    with opened(address) as path, _found_at(path, str(address), wrapped):
        loaded = wrapped(*args, **kwargs)
    setattr(loaded, _SOURCE, address.digest)
    return loaded


def take_tensors(wrapped: Callable[..., Any], model_class: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModel.from_lora_tensors``: while a write plan is learnt, takes its tensors, which have the same names."""
    staged = substitute.get()
    if staged is not None and "tensors" in kwargs:
        kwargs = {**kwargs, "tensors": dict(staged)}
    return wrapped(*args, **kwargs)


def add_lora(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModelRunnerMixin.add_lora``: refuses another adapter under a taken id. Returns an error as its text.

    An error is not raised, because vLLM's ``MultiprocExecutor.collective_rpc`` stops at the first worker that raises
    and leaves the other answers in their queues, where the next call takes them for its own (0.17.1 to 0.32.0, tensor
    parallel).
    """
    request = _argument("lora_request", args, kwargs)
    address = Address.parse(request.lora_path)
    if address is None:
        return wrapped(*args, **kwargs)
    try:
        _check_conflict(runner, request, address)
        return wrapped(*args, **kwargs)
    except SwiftLoraFixError as error:
        return f"{error} {mark(type(error))}"
    except Exception as error:
        return (
            f"vLLM refused adapter {request.lora_name!r} (id {request.lora_int_id}): {error or type(error).__name__} "
            f"Nothing was loaded. {mark(UnsupportedAdapterError)}"
        )


def add_lora_everywhere(wrapped: Callable[..., Any], executor: Any, args: Any, kwargs: Any) -> Any:
    """``Executor.add_lora``, in the process of the engine core: raises an error that a worker returned as text."""
    request = _argument("lora_request", args, kwargs)
    if Address.parse(request.lora_path) is None:
        return wrapped(*args, **kwargs)
    answers = executor.collective_rpc("add_lora", args=(request,))
    refusals = [answer for answer in answers if isinstance(answer, str)]
    if refusals and len(refusals) < len(answers):
        executor.remove_lora(request.lora_int_id)  # some workers loaded it: remove it there too
    if refusals:
        raise _error(refusals[0])
    return all(answers)


def _error(text: str) -> SwiftLoraFixError:
    """The error that a marked text describes. The mark stays: between processes vLLM carries only the text."""
    found = _MARK.search(text)
    assert found is not None
    kind: type[SwiftLoraFixError] = getattr(errors, found.group(1))
    return kind(text)


def mark(kind: type[SwiftLoraFixError]) -> str:
    """The mark for an error's text that names its class."""
    return f"[swift_lora_fix.{kind.__name__}]"


def unmark(error: BaseException) -> SwiftLoraFixError | None:
    """The error that a worker met, recovered from the text that vLLM passed on; None if it was not one of ours."""
    text = str(error).replace("Call to add_lora method failed: ", "")
    found = _MARK.search(text)
    return type(_error(text))(text[: found.start()].rstrip()) if found else None


def loaded_digest(manager: Any, adapter_id: int) -> str | None:
    """The digest of the adapter with this id, if it came from memory."""
    return getattr(manager.get_adapter(adapter_id), _SOURCE, None)


def set_loaded_digest(manager: Any, adapter_id: int, digest: str) -> None:
    setattr(manager.get_adapter(adapter_id), _SOURCE, digest)


def _check_conflict(runner: Any, request: Any, address: Address) -> None:
    manager = runner.lora_manager._adapter_manager
    if request.load_inplace or manager.get_adapter(request.lora_int_id) is None:
        return
    held = loaded_digest(manager, request.lora_int_id)
    if held != address.digest:
        raise AdapterConflictError(
            f"The engine holds another adapter under id {request.lora_int_id} "
            f"({f'digest {held}' if held else 'from a folder'}) than {request.lora_name!r} (digest {address.digest}); "
            "it was left as it is. Use load_inplace=True to replace it, or another lora_int_id."
        )


@contextlib.contextmanager
def _found_at(path: str, folder: str, reader: Any) -> Iterator[None]:
    """Make vLLM's module find the file at ``path`` where it looks for the weights in ``folder``. Replaces only the name
    ``os`` in that module, and only inside this context."""
    scope = reader.__globals__ if hasattr(reader, "__globals__") else reader.__func__.__globals__
    if scope.get("os") is not os:
        raise ContractError(
            f"{scope.get('__name__')} of this vLLM does not look for adapters with `os`, so one from memory cannot be "
            "given to it: use a release that swift_lora_fix was tested with."
        )

    def join(first: Any, *rest: Any) -> str:
        return path if (first, *rest) == (folder, _WEIGHTS) else os.path.join(first, *rest)

    paths = types.SimpleNamespace(**{**vars(os.path), "join": join})
    scope["os"] = types.SimpleNamespace(**{**vars(os), "path": paths})
    try:
        yield
    finally:
        scope["os"] = os


def _argument(name: str, args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs[name]
