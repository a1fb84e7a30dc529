"""Print the path of the plugin file for ms-swift's --external_plugins."""

from __future__ import annotations

import argparse

from .doctor.facts import PLUGIN_FILE

HELP = "print the plugin file's path, for --external_plugins"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    print(PLUGIN_FILE)
    return 0
