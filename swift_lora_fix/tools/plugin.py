"""Print the path of the plugin file for ms-swift's --external_plugins."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "print the plugin file's path, for --external_plugins"
PLUGIN_FILE = Path(__file__).resolve().parents[1] / "plugin" / "swift_lora_fix_plugin.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    print(PLUGIN_FILE)
    return 0
