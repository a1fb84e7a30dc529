"""A finished fork: what it is, what was found on the way, and how to go on with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...install import releases
from .base import Base, quantization_of
from .precision import Cast
from .source import Source

DEFAULT_LORA_RANK = 8  # ms-swift's; it also limits the engine's rank for an adapter from --adapters


@dataclass(frozen=True)
class Fork:
    """A finished fork.

    target, sha256: the new folder and its weights file's digest. source: what it was made from. cast: None if the
    weights are the source's, byte for byte. arguments: for ``swift rlhf``, to go on. notes: what was found, in words.
    """

    target: Path
    source: Source
    sha256: str
    cast: Cast | None
    arguments: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(self.arguments)


def notes_of(
    source: Source, base: Base, done: Cast | None, before: tuple[str, ...], with_trainer_state: bool
) -> Iterator[str]:
    yield from source.notes
    yield from base.notes
    quantised = quantization_of(source)
    if quantised and base.changed:
        yield f"the source's base was quantised ({quantised}), this one is taken as it is: rollouts differ a little"
    elif quantised:
        yield f"the source's base was quantised: add {quantised} to go on so; without, it is loaded in 16 bits"
    yield str(done) if done else f"the weights are the source's, {' and '.join(before)}"
    if source.args.get("ref_adapters"):
        yield "the reference policy is the source's (--ref_adapters)"
    elif source.args.get("beta"):
        yield "the reference policy is the base model, as in the source; --ref_adapters TARGET makes it the fork's"
    if with_trainer_state:
        yield f"with the trainer's state: optimizer and step count go on from step {source.step}"
    else:
        yield "without the trainer's state: a fresh optimizer, steps count from 0"


def arguments_of(source: Source, base: Base, target: Path, rank: int, with_trainer_state: bool) -> tuple[str, ...]:
    start = "--resume_from_checkpoint" if with_trainer_state else "--adapters"
    arguments = ["--model", base.name, start, str(target)]
    if rank > DEFAULT_LORA_RANK:
        arguments += ["--lora_rank", str(releases.engine_rank(rank) or rank)]
    reference = source.args.get("ref_adapters")
    if reference:
        arguments += ["--ref_adapters", *map(str, reference if isinstance(reference, list) else [reference])]
    return tuple(arguments)
