"""scripts/matrix: runs cells of the matrix, writes their records, and makes the table of them.

scripts/matrix --list
scripts/matrix --only 'grpo/internal/*' [--folder FOLDER]
scripts/matrix --table
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import tempfile
from pathlib import Path

from . import device
from .cells import all_cells
from .running import record_path, run
from .table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/matrix", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="names of cells, with * and ?")
    parser.add_argument("--missing", action="store_true", help="only cells that have no record")
    parser.add_argument("--list", action="store_true", help="name the cells, and run none")
    parser.add_argument("--table", action="store_true", help="make the table of the records, and run none")
    parser.add_argument("--folder", type=Path, help="where the runs go; default: a temporary one")
    asked = parser.parse_args()
    if asked.table:
        write_table()
        return
    cells = [
        cell
        for cell in all_cells().values()
        if not asked.only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in asked.only)
    ]
    if asked.list:
        for cell in cells:
            print(f"{cell.name:48} {cell.architecture:12} {cell.mode:8} {cell.trainer:16} {cell.needs_gpu}")
        return
    if not cells:
        raise SystemExit(f"No cell is named {', '.join(asked.only)}: scripts/matrix --list names them.")
    folder = (asked.folder or Path(tempfile.mkdtemp(prefix="matrix-"))).resolve()
    failing = 0
    for cell in cells:
        if cell.needs_gpu and not device.gpus():
            print(f"{cell.name} needs a GPU: {cell.needs_gpu}", flush=True)
            continue
        if asked.missing and record_path(cell).is_file():
            continue
        print(f"{cell.name} ...", flush=True)
        record = run(cell, folder)
        record_path(cell).parent.mkdir(exist_ok=True)
        record_path(cell).write_text(json.dumps(record, indent=1, default=str) + "\n")
        print(f"  {record['outcome']} in {record['seconds']} s {record['why']}", flush=True)
        failing += record["outcome"] == "failing"
    write_table()
    if asked.folder is None:
        shutil.rmtree(folder)
    raise SystemExit(1 if failing else 0)


if __name__ == "__main__":
    main()
