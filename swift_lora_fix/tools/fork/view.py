"""Make a folder from which a new run starts with another run's adapter, so that trainer and engine both serve it from
the first rollout on. Nothing is left of TARGET when anything fails."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from .. import fork

HELP = "start a new run from another run's adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a run's --output_dir, a checkpoint-N, any PEFT LoRA folder, or a model's folder of ART",
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="the new folder: it must not exist, or be empty")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the latest complete one)")
    parser.add_argument(
        "--dtype",
        default="keep",
        metavar="DTYPE",
        help="of the weights: keep, bf16, fp16 or fp32 (default: %(default)s)",
    )
    parser.add_argument("--base", metavar="MODEL", help="go on with this base model, an id or a folder")
    parser.add_argument(
        "--with-trainer-state", action="store_true", help="copy optimizer and step count too, to resume from"
    )


def run(args: argparse.Namespace) -> int:
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        made = fork.fork(
            args.source,
            args.target,
            step=args.step,
            dtype=args.dtype,
            base=args.base,
            with_trainer_state=args.with_trainer_state,
        )
    except KeyboardInterrupt:
        print("swift-lora-fix: interrupted, nothing was left of TARGET.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"Forked {made.source}\n    to {made.target}, SHA-256 {made.sha256}")
    for note in made.notes:
        print(f"  - {note}")
    print(f"Go on with your swift rlhf command and these arguments:\n    {made.command}")
    print("With the plugin, the first sync checks that trainer and engine hold exactly these weights.")
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
