"""A base that is not sent: the engine loaded it quantised from the model's files, in the layout of its kernels.

What the trainer holds cannot be written there. So the files are compared with the trainer's base, tensor by tensor.
"""

from __future__ import annotations

from ....common.digest import checksum
from ....common.log import info, warning
from ....errors import BaseMismatchError, EngineStateError
from ....policy.adapter import Adapter, frozen_parameters, packed_buffers
from ....policy.model_files import base_sums, compared, trainer_sums
from ....trainer import TrainerPort
from ..handle import EngineHandle
from .base import BaseRecord, Piece

SENT = ("bitsandbytes",)  # quantised on both sides from files that are not: ms-swift sends the trainer's quantised one


def is_held(engine: EngineHandle) -> bool:
    """Whether the engine's base is of this kind."""
    return engine.quantization is not None and engine.quantization not in SENT


def prove(trainer: TrainerPort, engine: EngineHandle, adapter: Adapter) -> BaseRecord:
    """Compare the trainer's frozen tensors with the files that the engine loaded. All ranks together. Returns the
    checksums of both as they are now; the engine is not written to.

    Raises BaseMismatchError naming a tensor that differs, or when none can be compared; EngineStateError when the
    engine was started with random weights.
    """
    kind, folder = engine.quantization, engine.model_folder
    cannot = f"The engine holds its base quantised ({kind}), and what the trainer holds cannot be sent to it"
    if engine.load_format == "dummy":
        raise EngineStateError(f"{cannot}; it was started with random weights. Let it load the model's files.")
    dtype = engine.llm_engine.vllm_config.model_config.dtype
    sums = trainer_sums(trainer.model, adapter, trainer.device)
    differing, elsewhere = compared(sums, base_sums(folder, dtype))
    if differing or len(elsewhere) == len(sums):
        name, count = (differing or elsewhere)[0], len(differing or elsewhere)
        raise BaseMismatchError(
            f"{cannot}: {count} of the trainer's {len(sums)} base tensors are not those of the files in {folder} "
            f"({name}, ...). Let both load one model, in one dtype; an initial value that changes the base (PiSSA, "
            "OLoRA) takes a base that is not quantised."
        )
    if elsewhere:
        warning(
            f"{len(elsewhere)} of {len(sums)} base tensors have another layout in {folder} ({elsewhere[0]}) and "
            "were not compared; the agreement gate looks at what the engine computes."
        )
    same = len(sums) - len(elsewhere)
    info(
        f"the base is not sent: the engine loaded it quantised ({kind}) from files that hold {same} of the trainer's "
        f"{len(sums)} base tensors bit for bit."
    )
    pieces = [Piece(name, value.data, checksum(value.data)) for name, value in engine.model.named_parameters()]
    frozen = tuple(frozen_parameters(trainer.model))
    return BaseRecord(engine.model, tuple(pieces), frozen, lambda: packed_buffers(trainer.model))
