"""The command `census-tf-dagster`: its parser, its list of commands and its exit codes.

Each group of commands has its own module, which declares the arguments of its commands and calls the code that does
the work. Heavy modules are imported inside the functions, so that ``--help`` answers at once. The work itself does not
belong here.
"""

import argparse
import resource
import sys
from collections.abc import Sequence

from census_tf_dagster.cli import embed_cells, look_after_arrays, run_releases, try_it
from census_tf_dagster.cli.parsing import PROGRAM, Commands
from census_tf_dagster.errors import INTERRUPTED, DirectoryError, StoreError, UserError

GROUPS = {
    "try it": ("demo", "check", "canary"),
    "run releases": ("release", "launch", "approve", "status"),
    "look after arrays": ("verify", "inspect", "prune", "remove"),
    "embed other cells": ("embed",),
}
"""The titles and commands of the list in ``--help``, in its order."""

READING = ("demo", "canary", "verify", "inspect", "prune", "remove", "embed")
"""The commands that load the libraries for arrays and models. `launch --dry-run` does, too."""
LEAST_ADDRESS_SPACE = 700 * 2**20
"""With less, these libraries cannot be loaded; some of them print lines of their own or end the process then."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s COMMAND [-h] ...",
        description="TranscriptFormer embeddings of CELLxGENE Census releases, as Dagster assets.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, prog=parser.prog, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for group in (try_it, run_releases, look_after_arrays, embed_cells):
        group.add_commands(commands)
    parser.epilog = _list_of_commands(commands)
    return parser


def _list_of_commands(commands: Commands) -> str:
    """Return the commands by group, each with its meaning. Commands that are in no group come last."""
    meanings = {action.dest: action.help for action in commands._get_subactions()}
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "more": tuple(name for name in meanings if name not in grouped)}
    lines = []
    for title, names in groups.items():
        lines += [f"{title}:", *(f"  {name:<10} {meanings[name]}" for name in names if name in meanings), ""]
    return "\n".join(
        [
            *(lines if groups["more"] else lines[:-2]),
            "COMMAND --help shows the arguments and an example. --json prints one JSON object; progress goes to",
            "stderr. Exit codes: 0 success, 1 a problem that was printed, 2 wrong arguments, 130 interrupted.",
        ]
    )


def _lacks_memory(error: BaseException) -> bool:
    """Tell whether Python got no memory, or could not load a library in a process whose address space is limited."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    # The loader's errors have no number; those of files have one.
    loading = getattr(error, "errno", None) is None and not isinstance(error, ModuleNotFoundError)
    return isinstance(error, MemoryError) or (limited and loading)


def _no_memory(why: str) -> int:
    print(
        f"error: this process got no more memory ({why}); expected a few GB: give the machine more, or raise its limit "
        "(`ulimit -v`, the container's memory).",
        file=sys.stderr,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    loads = arguments.command in READING or (arguments.command == "launch" and arguments.dry_run)
    if loads and limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        return _no_memory(f"its limit is {limit / 2**20:,.0f} MiB of address space")
    try:
        code: int | None = arguments.run(arguments)
    except (UserError, DirectoryError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, ImportError, OSError) as error:
        # It may come from an import, before any module can name it.
        if not _lacks_memory(error):
            raise
        return _no_memory(str(error).strip().partition("\n")[0][:200] or type(error).__name__)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0
