"""Test-only stand-in for NCCL, which needs GPUs: vLLM's ``PyNcclCommunicator`` sends through the store of its group.

In ``PYTHONPATH`` it is in every process of a run before ms-swift is: its trainer connects before any plugin. Where the
file ``$SLF_SPOIL`` exists, one bit of what is received is another one. ``$SLF_EVERYWHERE`` has more files to run
(``os.pathsep`` between them), in vLLM's own processes too, which load no plugin of ms-swift's.
"""

import contextlib
import os
import runpy

import torch
import wrapt

if not torch.cuda.is_available():  # what ms-swift asks of a backend as it sends weights, and the CPU lacks
    torch.cpu.device = lambda device: contextlib.nullcontext()
    torch.cuda.synchronize = torch.cuda.current_stream = lambda device=None: None


class StoreCommunicator:
    """What ms-swift and this package use of vLLM's."""

    def __init__(self, group, device, library_path=None):
        self.group, self.rank, self.world_size = group, group.rank, group.world_size
        self.available, self.disabled = True, self.world_size == 1
        self.device = torch.device("cpu")

    def broadcast(self, tensor, src, stream=None):
        content = tensor.view(torch.uint8).numpy().tobytes() if self.rank == src else None
        received = self.group.broadcast_obj(content, src)
        if self.rank != src:
            content = bytearray(received)
            content[-9] ^= os.path.exists(os.environ.get("SLF_SPOIL", ""))
            tensor.view(torch.uint8).view(-1).copy_(torch.frombuffer(content, dtype=torch.uint8))


def _replace(module):
    module.PyNcclCommunicator = StoreCommunicator


wrapt.register_post_import_hook(_replace, "vllm.distributed.device_communicators.pynccl")
for path in filter(None, os.environ.get("SLF_EVERYWHERE", "").split(os.pathsep)):
    runpy.run_path(path)
