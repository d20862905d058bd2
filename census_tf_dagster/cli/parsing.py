"""Arguments and output that several commands share. Nothing that belongs to one command is here."""

import argparse
import os
import sys
from typing import TypeAlias

PROGRAM = "census-tf-dagster"
"""The name of the installed command. Messages that tell people what to run use it as well."""

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_json(*commands: argparse.ArgumentParser) -> None:
    """Add the option ``--json`` to commands."""
    for command in commands:
        command.add_argument("--json", action="store_true", help="print one JSON object")


def add_url(*commands: argparse.ArgumentParser) -> None:
    """Add the option ``--url`` to commands that ask a running deployment."""
    for command in commands:
        command.add_argument(
            "--url",
            default=os.environ.get("CENSUS_TF_DAGSTER_URL", "http://127.0.0.1:3000"),
            help="address of the deployment's webserver (default: CENSUS_TF_DAGSTER_URL, else http://127.0.0.1:3000)",
        )


def add_set_and_release(*commands: argparse.ArgumentParser) -> None:
    """Add the positional arguments ``set`` and ``release`` to commands."""
    for command in commands:
        command.add_argument("set", help="name of the set")
        command.add_argument("release", help="name of the release")


def print_progress(text: str) -> None:
    """Print progress for a person to stderr, so that scripts can read stdout."""
    print(text, file=sys.stderr, flush=True)
