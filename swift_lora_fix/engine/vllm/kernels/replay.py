"""Runs work that is the same at every sync as a CUDA graph: one launch instead of hundreds of Python calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....common.log import warning


class Replayed:
    """Runs ``work`` and returns its result. On a CUDA device, runs with the same key use a CUDA graph from the second
    on.

    The work must read and write the same memory each time. The key (pointers) identifies that memory; a new key starts
    over. The result must be tensors that the work itself makes, or None: each replay overwrites the same tensors.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        self.work, self.device, self.can_capture = work, device, device.type == "cuda"
        self.key: list[int] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def run(self, key: list[int]) -> Any:
        if key != self.key:  # the first run warms up what a capture must not initialise
            self.key, self.graph, self.result = key, None, None
            return self.work()
        if self.graph is None and self.can_capture:
            self._capture()
        if self.graph is None:
            return self.work()
        self.graph.replay()
        return self.result

    def forget(self) -> None:
        """Drop the graph and with it every reference to the memory that it reads."""
        self.key, self.graph, self.result = None, None, None

    def _capture(self) -> None:
        """Not by ``torch.cuda.graph``: that first gives back all unused memory, pinned host memory too, which takes
        seconds after vLLM's sleep level 1 has filled it with the weights (torch 2.11, ``_host_emptyCache``)."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                # thread_local: other threads, of the engine or a data loader, may use the device during the capture
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.result = self.work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.can_capture, self.result = False, None
            warning(f"the sync runs without a CUDA graph: {str(error).splitlines()[0]}")
            return
        self.graph = graph
