"""Say which releases are installed here, which defects they have, and whether the patches would go in."""

from __future__ import annotations

import argparse
import json

from .. import arming

HELP = "check this environment: releases, their defects, whether the patches go in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    status = arming.apply()
    print(json.dumps(status.as_dict(), indent=1) if args.json else status)
    return 0
