"""The console script ``swift-lora-fix``: arguments only. What a verb does is in its folder of ``tools/``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .errors import SwiftLoraFixError
from .tools import plugin
from .tools.doctor import view as doctor
from .tools.fork import view as fork
from .tools.report import view as report
from .tools.verify import view as verify

VERBS = {"plugin": plugin, "doctor": doctor, "verify": verify, "report": report, "fork": fork}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status. A user's mistake is reported on standard error, with status 2."""
    parser = argparse.ArgumentParser(prog="swift-lora-fix", description="LoRA sync for ms-swift and vLLM, done right.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except SwiftLoraFixError as error:
        print(f"swift-lora-fix: {error}", file=sys.stderr)
        print(f"swift-lora-fix: what it means and what to do: {error.place}", file=sys.stderr)
        return 2
