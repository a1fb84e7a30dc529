"""Worker side: vLLM's own loader reads an adapter from shared memory instead of a folder, with all its checks.

Everything runs in vLLM's code: ``PEFTHelper`` gets the config of the segment, and ``LoRAModel.from_local_checkpoint``
is told that the segment is the ``adapter_model.safetensors`` that it looks for.
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

_SOURCE = "swift_lora_fix_digest"  # of a loaded LoRAModel: what it was made from
_WEIGHTS = "adapter_model.safetensors"
_MARK = re.compile(r"\[swift_lora_fix\.(\w+)\]")

# While a write plan is learnt: the tensors, equal to those in the segment, that vLLM is to load in their place.
substitute: ContextVar[Mapping[str, Any] | None] = ContextVar("substitute", default=None)


def load_config(wrapped: Callable[..., Any], helper: Any, args: Any, kwargs: Any) -> Any:
    """``PEFTHelper.from_local_dir``: the config from the segment; its fields are vLLM's to judge, as for a folder."""
    address = Address.parse(_argument("lora_path", args, kwargs))
    if address is None:
        return wrapped(*args, **kwargs)
    with opened(address, verify=False) as path:  # by load_weights, before anything is served
        config = read_config(path)
    positions = args[1] if len(args) > 1 else kwargs.get("max_position_embeddings")
    return helper.from_dict({**config, "vllm_max_position_embeddings": positions})


def load_weights(wrapped: Callable[..., Any], model_class: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModel.from_local_checkpoint``: the checks and the reading are vLLM's."""
    address = Address.parse(_argument("lora_dir", args, kwargs))
    if address is None:
        return wrapped(*args, **kwargs)
    with opened(address) as path, _found_at(path, str(address), wrapped):
        loaded = wrapped(*args, **kwargs)
    setattr(loaded, _SOURCE, address.digest)
    return loaded


def take_tensors(wrapped: Callable[..., Any], model_class: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModel.from_lora_tensors``: of the same names and shapes, those that a write plan is learnt with."""
    staged = substitute.get()
    if staged is not None and "tensors" in kwargs:
        kwargs = {**kwargs, "tensors": dict(staged)}
    return wrapped(*args, **kwargs)


def add_lora(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModelRunnerMixin.add_lora``: refuse another adapter under a taken id. An error comes back as its text.

    vLLM's ``MultiprocExecutor.collective_rpc`` stops at the first worker that raises and leaves the answers of the
    others in their queues, where the next call takes them for its own (0.17.1 to 0.32.0, tensor parallel).
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
    """``Executor.add_lora``, in the process of the engine core: raise what a worker has answered in place of a bool."""
    request = _argument("lora_request", args, kwargs)
    if Address.parse(request.lora_path) is None:
        return wrapped(*args, **kwargs)
    answers = executor.collective_rpc("add_lora", args=(request,))
    refusals = [answer for answer in answers if isinstance(answer, str)]
    if refusals and len(refusals) < len(answers):
        executor.remove_lora(request.lora_int_id)  # some workers have it: none shall
    if refusals:
        raise _error(refusals[0])
    return all(answers)


def _error(text: str) -> SwiftLoraFixError:
    """The error of a marked text, which it keeps: that is all of an error that vLLM carries to another process."""
    found = _MARK.search(text)
    assert found is not None
    kind: type[SwiftLoraFixError] = getattr(errors, found.group(1))
    return kind(text)


def mark(kind: type[SwiftLoraFixError]) -> str:
    """What tells the kind of an error in its text."""
    return f"[swift_lora_fix.{kind.__name__}]"


def unmark(error: BaseException) -> SwiftLoraFixError | None:
    """The error that a worker met, from what vLLM made of it on its way here; None where it was not ours."""
    text = str(error).replace("Call to add_lora method failed: ", "")
    found = _MARK.search(text)
    return type(_error(text))(text[: found.start()].rstrip()) if found else None


def loaded_digest(manager: Any, adapter_id: int) -> str | None:
    """Of what the adapter with this id was made, where it came from memory."""
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
    """vLLM's module finds the file at ``path`` where it looks for ``folder``'s weights. Only its own name ``os``
    changes, and only meanwhile."""
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
