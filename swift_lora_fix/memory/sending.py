"""Sending side: a request's tensors go to the engine once; their shared memory is freed when they are loaded.

``add_lora`` publishes a segment, waits until every worker has loaded it, and releases it. ``generate`` does the same
first, in the same call: an adapter that vLLM refuses is then an error of that call. (A worker that finds out in the
middle of a step takes the engine down.) Waiting requests need the bytes again only if vLLM evicts the adapter before
their turn. That is possible once more ids than ``max_cpu_loras`` were used: from then on a segment stays until the last
unfinished request for it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable

from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from ..errors import UnsupportedAdapterError
from .loading import substitute, unmark
from .request import Content, has_tensors
from .segment import DTYPES, Address, Segment

# Fields that some releases of vLLM do not read, so that they would serve the adapter as if these were not set.
_MEANINGFUL = ("rank_pattern", "alpha_pattern", "lora_bias")


@dataclass
class _Users:
    """Who may need a content's bytes again: calls in progress and unfinished requests."""

    content: Content
    count: int = 0
    segment: Segment | None = None

    def release(self) -> None:
        if self.segment is not None:
            self.segment.release()
            self.segment = None


class Ledger:
    """What this process has sent to one engine. If an engine has several front ends, each has a ledger."""

    def __init__(self, vllm_config: Any) -> None:
        self.lora_config = vllm_config.lora_config
        # with data parallelism an idle rank runs a dummy batch, which removes all adapters (LoRAModelRunnerMixin)
        self.is_forgetful = vllm_config.parallel_config.data_parallel_size > 1
        self.ids: set[int] = set()
        self.loaded: dict[int, tuple[str, LoRARequest]] = {}  # by id: version, and what vLLM was told
        self.users: dict[str, _Users] = {}  # by version
        self.writers: dict[int, Any] = {}  # by id: update.py's direct writers
        self._lock: tuple[Any, asyncio.Lock] | None = None

    @property
    def may_evict(self) -> bool:
        """Whether vLLM may evict an adapter that requests still wait for."""
        return self.is_forgetful or len(self.ids) > self.lora_config.max_cpu_loras

    @property
    def segments(self) -> list[Segment]:
        return [users.segment for users in self.users.values() if users.segment is not None]

    def publish(self, content: Content) -> Segment:
        dtype = getattr(self.lora_config, "lora_dtype", None)
        return content.publish(dtype if dtype in DTYPES else None)

    def check(self, request: Any) -> None:
        """Ask vLLM's ``PEFTHelper`` before any byte is sent. Raises UnsupportedAdapterError with its reason."""
        name, config = f"adapter {request.lora_name!r} (id {request.lora_int_id})", request.content.config
        if self.lora_config is None:
            raise UnsupportedAdapterError(f"The engine takes no LoRA, so no {name}: start it with enable_lora=True.")
        known = {field.name for field in dataclasses.fields(PEFTHelper)}
        ignored = [field for field in _MEANINGFUL if config.get(field) and field not in known]
        if ignored:
            raise UnsupportedAdapterError(
                f"This vLLM does not know {', '.join(ignored)} of {name} and would serve it wrongly: use a newer vLLM, "
                "or from_peft_model(), which folds the scaling of each module into its B."
            )
        try:
            PEFTHelper.from_dict(config).validate_legal(self.lora_config)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise UnsupportedAdapterError(f"vLLM cannot serve {name}: {error} Nothing was sent.") from error

    def note(self, adapter_id: int) -> None:
        """This id is about to be used. If vLLM may evict adapters from now on, publish those that requests wait for."""
        self.ids.add(adapter_id)
        if self.lora_config is not None and self.may_evict:
            for users in self.users.values():
                users.segment = users.segment or self.publish(users.content)

    def note_plain(self, request: Any) -> None:
        """vLLM gets a request that is not ours, maybe under the id of one of ours."""
        if request is not None and Address.parse(request.lora_path) is None:
            self.note(request.lora_int_id)
            self.drop(request.lora_int_id)

    def forget(self, adapter_id: int) -> None:
        self.ids.discard(adapter_id)
        self.drop(adapter_id)

    def drop(self, adapter_id: int) -> None:
        """Forget what the engine holds under this id."""
        self.loaded.pop(adapter_id, None)
        self.writers.pop(adapter_id, None)

    def has(self, request: Any) -> bool:
        """Whether the engine was last given exactly this request's content under its id."""
        held = self.loaded.get(request.lora_int_id)
        return held is not None and request.content.version == held[0]

    @contextlib.contextmanager
    def published(self, request: Any, segment: Segment) -> Iterator[None]:
        """Keep the bytes available inside; afterwards only while somebody may need them again."""
        users = self.hold(request.content)
        if users.segment is None:
            users.segment = segment
        else:
            segment.release()
        try:
            yield
        finally:
            if not self.may_evict:
                users.release()
            self.let_go(request.content)

    @contextlib.contextmanager
    def loading(self, request: Any) -> Iterator[LoRARequest]:
        """Yield the request to give to vLLM's ``add_lora``. A worker's error is raised here as the worker raised it."""
        self.note(request.lora_int_id)
        segment = self.users[str(request.content.version)].segment
        assert segment is not None
        self.drop(request.lora_int_id)
        try:
            yield wire(request, segment.address, request.load_inplace)
        except Exception as error:
            ours = unmark(error)
            if ours is None:
                raise
            raise ours from error
        self.loaded[request.lora_int_id] = (request.content.version, wire(request, segment.address))

    @contextlib.contextmanager
    def serving(self, request: Any) -> Iterator[LoRARequest]:
        """Yield the request for vLLM's ``add_request``. `note_unfinished` then ties the bytes to it."""
        users = self.hold(request.content)
        token = _sending.set((self, request.content))
        try:
            if self.may_evict:
                users.segment = users.segment or self.publish(request.content)
                yield wire(request, users.segment.address)
            else:
                users.release()
                yield self.loaded[request.lora_int_id][1]
        finally:
            _sending.reset(token)
            self.let_go(request.content)

    def hold(self, content: Content) -> _Users:
        users = self.users.setdefault(str(content.version), _Users(content))
        users.count += 1
        return users

    def let_go(self, content: Content) -> None:
        users = self.users[str(content.version)]
        users.count -= 1
        if not users.count:
            del self.users[str(content.version)]
            users.release()

    def lock(self) -> asyncio.Lock:
        """The lock of the running loop: tasks that use a new adapter at the same time send it once."""
        loop = asyncio.get_running_loop()
        if self._lock is None or self._lock[0] is not loop:
            self._lock = (loop, asyncio.Lock())
        return self._lock[1]


_ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
_sending: ContextVar[tuple[Ledger, Content] | None] = ContextVar("sending", default=None)


def ledger_of(engine: Any) -> Ledger:
    """The ledger of an ``LLMEngine`` or ``AsyncLLM``."""
    if engine not in _ledgers:
        _ledgers[engine] = Ledger(engine.vllm_config)
    return _ledgers[engine]


def wire(request: Any, address: Address, load_inplace: bool = False) -> LoRARequest:
    """The plain request that is sent. Its name contains the version, because vLLM keys cached KV blocks by the name."""
    plain = {field: getattr(request, field) for field in LoRARequest.__struct_fields__}
    name = f"{request.lora_name}@{request.content.version[:12]}"
    return LoRARequest(**{**plain, "lora_name": name, "lora_path": str(address), "load_inplace": load_inplace})


# ---- the hooks of LLMEngine and AsyncLLM ---------------------------------------------------------------------------


def add_lora(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
    call = _Call(wrapped, args, kwargs)
    ledger = ledger_of(engine)
    if not has_tensors(call.request):
        ledger.note_plain(call.request)
        return wrapped(*args, **kwargs)
    ledger.check(call.request)
    if ledger.has(call.request) and not call.request.load_inplace and not ledger.may_evict:
        return True
    content = call.request.content
    with ledger.published(call.request, ledger.publish(content)), ledger.loading(call.request) as plain:
        token = substitute.set(content.tensors if content.is_kept else substitute.get())
        try:
            return call.with_request(plain)
        finally:
            substitute.reset(token)


async def add_lora_async(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
    call = _Call(wrapped, args, kwargs)
    ledger = ledger_of(engine)
    if not has_tensors(call.request):
        ledger.note_plain(call.request)
        return await wrapped(*args, **kwargs)
    ledger.check(call.request)
    async with ledger.lock():
        if ledger.has(call.request) and not call.request.load_inplace and not ledger.may_evict:
            return True
        segment = await asyncio.to_thread(ledger.publish, call.request.content)
        with ledger.published(call.request, segment), ledger.loading(call.request) as plain:
            return await call.with_request(plain)


def add_request(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
    call = _Call(wrapped, args, kwargs)
    ledger = ledger_of(engine)
    if not has_tensors(call.request):
        ledger.note_plain(call.request)
        return wrapped(*args, **kwargs)
    with contextlib.ExitStack() as stack:
        if not ledger.has(call.request):
            ledger.check(call.request)
            stack.enter_context(ledger.published(call.request, ledger.publish(call.request.content)))
            with ledger.loading(call.request) as plain:
                engine.add_lora(plain)
        return call.with_request(stack.enter_context(ledger.serving(call.request)))


async def add_request_async(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
    call = _Call(wrapped, args, kwargs)
    ledger = ledger_of(engine)
    if not has_tensors(call.request):
        ledger.note_plain(call.request)
        return await wrapped(*args, **kwargs)
    with contextlib.ExitStack() as stack:
        if not ledger.has(call.request):
            ledger.check(call.request)
            async with ledger.lock():
                if not ledger.has(call.request):  # no other task sent it meanwhile
                    segment = await asyncio.to_thread(ledger.publish, call.request.content)
                    stack.enter_context(ledger.published(call.request, segment))
                    with ledger.loading(call.request) as plain:
                        await engine.add_lora(plain)
        return await call.with_request(stack.enter_context(ledger.serving(call.request)))


def remove_lora(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
    ledger_of(engine).forget(args[0] if args else kwargs["lora_id"])
    return wrapped(*args, **kwargs)


remove_lora_async = remove_lora  # the coroutine is passed on


def note_unfinished(wrapped: Callable[..., Any], processor: Any, args: Any, kwargs: Any) -> Any:
    """``OutputProcessor.add_request``: vLLM keeps a state for each request until it is finished or aborted."""
    result = wrapped(*args, **kwargs)
    sent = _sending.get()
    state = processor.request_states.get((args[0] if args else kwargs["request"]).request_id)
    if sent is not None and state is not None:
        ledger, content = sent
        ledger.hold(content)
        weakref.finalize(state, ledger.let_go, content).atexit = False
    return result


class _Call:
    """A call of vLLM's with its LoRA request: an argument, or, deprecated, inside a prepared request."""

    def __init__(self, wrapped: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.wrapped = wrapped
        self.bound = inspect.signature(wrapped).bind(*args, **kwargs)
        prompt: Any = self.bound.arguments.get("prompt", None)
        self.prepared = prompt if getattr(prompt, "lora_request", None) is not None else None
        source: Any = self.bound.arguments.get("lora_request")
        self.request: Any = source if self.prepared is None else self.prepared.lora_request

    def with_request(self, plain: LoRARequest) -> Any:
        if self.prepared is None:
            self.bound.arguments["lora_request"] = plain
        else:
            self.prepared.lora_request = plain
        return self.wrapped(*self.bound.args, **self.bound.kwargs)
