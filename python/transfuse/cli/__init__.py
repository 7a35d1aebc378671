"""The command `transfuse`: info, demo, report, verify, bench, explain.

Exit codes: 0 done, 1 a check failed, 2 the command was not understood or something it needs is missing. Messages of
the last kind go to stderr in one line: `transfuse <command>: <argument> is <got>, expected <expected>`.
"""

import argparse
import importlib
import os
import sys

COMMANDS = {
    "info": "versions, CPU level, GPUs, what is built, which backend each op takes and why",
    "demo": "a real sentence-embedding model on real text, stock against accelerated: parity, speed, search, picture",
    "report": "what accelerate() would replace in a model, and what not and why",
    "verify": "compare every op with its float64 reference on this machine",
    "bench": "time every op against torch, parity first",
    "explain": "which backend one op takes, and the reasons against the others",
}


class MissingExtra(Exception):
    """A package of an optional extra is not installed."""

    def __init__(self, package, extra):
        super().__init__(f"needs {package}: pip install transfuse[{extra}]")


def need(module, extra):
    """Imports an optional package, or raises MissingExtra with what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Something missing further down is that package's own trouble and keeps its own words.
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(module.split(".")[0].replace("_", "-"), extra) from None


def _page(command):
    return importlib.import_module(f"transfuse.cli.{command}")


def parser():
    """The argument parser; each command's page adds its own options."""
    top = argparse.ArgumentParser(
        prog="transfuse", description="Faster PyTorch transformers, and proof that they compute the same."
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        sub = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        sub.add_argument("--quiet", action="store_true", help="results only, no progress")
        _page(name).add_arguments(sub)
    return top


def main(argv=None):
    """Runs one command and returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        return _page(arguments.command).run(arguments)
    except (ValueError, MissingExtra, NotImplementedError) as error:
        # Every page words its own refusals; the command's name stands in front exactly once.
        text = str(error).removeprefix(f"{arguments.command}: ")
        print(f"transfuse {arguments.command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"transfuse {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `transfuse info | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
