"""The command line beside Dagster's own: `python -m census_tf_dagster`."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from census_tf_dagster.errors import UserError

if TYPE_CHECKING:
    import dagster as dg


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m census_tf_dagster",
        description="TranscriptFormer embeddings of CELLxGENE Census releases, as Dagster assets.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="build a small Census and checkpoint in the real formats and take them to the final arrays",
        description=(
            "Build a small Census and a small TranscriptFormer checkpoint in the real formats below demo-data/, then "
            "plan, embed and finish the demo sets. The checkpoint's weights are random: the embeddings mean nothing "
            "biologically."
        ),
        epilog="example: python -m census_tf_dagster demo --h5ad mus_musculus=my_cells.h5ad",
    )
    demo.add_argument("--data-only", action="store_true", help="build Census and checkpoint, run nothing")
    demo.add_argument(
        "--h5ad",
        action="append",
        default=[],
        metavar="ORGANISM=FILE",
        help="use the raw counts of this file instead of synthetic cells of that organism",
    )

    release = commands.add_parser("release", help="add or list Census releases")
    actions = release.add_subparsers(dest="action", required=True)
    add = actions.add_parser(
        "add",
        help="make a Census release a partition of every set",
        epilog="example: python -m census_tf_dagster release add 2025-11-08",
    )
    add.add_argument("name", help="name of the release")
    actions.add_parser("list", help="show the releases that were added")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "demo":
            from census_tf_dagster.demo.run import run_demo

            run_demo(arguments.h5ad, data_only=arguments.data_only)
        elif arguments.action == "add":
            add_release(arguments.name)
        else:
            list_releases()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _instance() -> "dg.DagsterInstance":
    import dagster as dg

    if "DAGSTER_HOME" not in os.environ:
        raise UserError("DAGSTER_HOME is not set: it names the folder of the Dagster instance to talk to.")
    return dg.DagsterInstance.get()


def add_release(name: str) -> None:
    """Add a release's partition to the Dagster instance of DAGSTER_HOME, if its Census exists."""
    from census_tf_dagster.definitions import census_resource
    from census_tf_dagster.partitions import RELEASES

    uri = census_resource().uri(name)
    with _instance() as instance:
        known = name in instance.get_dynamic_partitions(str(RELEASES.name))
        instance.add_dynamic_partitions(str(RELEASES.name), [name])
    print(f"release {name} was there already" if known else f"release {name} added", f"({uri})")


def list_releases() -> None:
    """Print the releases that were added, one a line."""
    from census_tf_dagster.partitions import RELEASES

    with _instance() as instance:
        for name in instance.get_dynamic_partitions(str(RELEASES.name)):
            print(name)
