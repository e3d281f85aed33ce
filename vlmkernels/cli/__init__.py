# SPDX-License-Identifier: Apache-2.0
"""The command line: ``vlmkernels doctor | verify | bench``. Each is a module; nothing heavy is imported before it runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "doctor": "what is installed, and which backend can run which operator here",
    "verify": "compare every operator on every backend with the fp64 reference",
    "bench": "measure against what a user would run instead; writes a table, JSON, plots and an HTML report",
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="vlmkernels", description="Vision-language layers at the speed of the hardware.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        module = importlib.import_module(f"vlmkernels.cli.{name}")
        command = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 1 a wrong or failed result, 2 a wrong argument or a missing package."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (ImportError, ValueError) as error:
        print(f"vlmkernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    return code


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table in plain text, for the commands that need no extra package."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    for line in (head, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
