"""The commands for trying the package before a release is computed: `demo`, `check` and `canary`."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from census_tf_dagster.cli.parsing import PROGRAM, Commands, add_json, add_set_and_release, print_progress


def add_commands(commands: Commands) -> None:
    """Declare the commands of this group."""
    demo = commands.add_parser(
        "demo",
        help="build a small Census and a small checkpoint in the real formats, and embed the demo sets",
        description=(
            "Build a small Census and a small TranscriptFormer checkpoint in the real formats below demo-data/. Then "
            "plan, embed and finish the demo sets. The checkpoint has random weights, so the embeddings have no "
            "biological meaning."
        ),
        epilog=f"example: {PROGRAM} demo --h5ad mus_musculus=my_cells.h5ad",
    )
    demo.add_argument("--data-only", action="store_true", help="build the Census and the checkpoint, embed nothing")
    demo.add_argument(
        "--h5ad",
        action="append",
        default=[],
        metavar="ORGANISM=FILE",
        help="use the raw counts of this file instead of synthetic cells of that organism",
    )
    demo.set_defaults(run=_demo)

    check = commands.add_parser(
        "check",
        help="check the YAML files of sets and print every mistake with its file, line, value and remedy",
        epilog=f"example: {PROGRAM} check census_tf_dagster/defs",
    )
    check.add_argument("sets", nargs="?", type=Path, help="folder of sets (default: this deployment's)")
    check.set_defaults(run=_check)

    canary = commands.add_parser(
        "canary",
        help="embed a few hundred cells of a release on this machine, compare and time them; keep only the rate",
        description=(
            "Embed a few hundred cells of many assays and lengths on this machine, as the set would. Compare them with "
            "upstream's own command (--upstream), or with our own computation in fp32. Print how long the release "
            "would take. Run it on the node type that will do the work."
        ),
        epilog=f"example: {PROGRAM} canary demo_human 2025-11-08 --cells 100",
    )
    add_set_and_release(canary)
    canary.add_argument(
        "--cells", type=int, default=256, help="approximate number of cells, the same from each assay (default: 256)"
    )
    canary.add_argument(
        "--upstream",
        type=Path,
        help="upstream's transcriptformer command in another environment (default: the one beside this Python or on "
        "the PATH)",
    )
    canary.set_defaults(run=_canary)
    add_json(check, canary)


def _demo(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.demo.run import run_demo

    run_demo(arguments.h5ad, data_only=arguments.data_only)


def _check(arguments: argparse.Namespace) -> int:
    from census_tf_dagster.config.settings import FileSetSettings
    from census_tf_dagster.definitions import load_settings, sets_folder
    from census_tf_dagster.set_files import find_problems

    folder = arguments.sets or sets_folder()
    problems = find_problems(folder)
    if arguments.json:
        found = [{**asdict(problem), "file": str(problem.file)} for problem in problems]
        print(json.dumps({"sets": str(folder), "problems": found}))
    elif problems:
        print("\n".join(map(str, problems)), file=sys.stderr)
    else:
        sets = load_settings(folder)
        names = sorted(sets)
        print(f"{folder}: {len(names)} set{'s' if len(names) > 1 else ''} without a mistake: {', '.join(names)}")
        print("(Only their YAML was checked. `launch SET RELEASE --dry-run` opens the checkpoint and the Census.)")
        if any(isinstance(one, FileSetSettings) for one in sets.values()):
            print("(For a set of files, the asset obs_id_plan opens the checkpoint and a file.)")
    return int(bool(problems))


def _canary(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.definitions import deployed_context
    from census_tf_dagster.own_cells.file_context import file_sample
    from census_tf_dagster.pipeline.canary import Sample, release_sample, run_canary
    from census_tf_dagster.pipeline.context import ReleaseContext
    from census_tf_dagster.pipeline.upstream import find_upstream

    with deployed_context(arguments.set, arguments.release) as context:

        def choose() -> Sample:
            if isinstance(context, ReleaseContext):
                return release_sample(context, arguments.cells, print_progress)
            return file_sample(context, arguments.cells)

        result = run_canary(context, choose, arguments.upstream or find_upstream(), print_progress)
    if arguments.json:
        print(json.dumps(asdict(result)))
        return
    print(f"{result.cells} cells of {result.assays} assays; compared with {result.reference}")
    print(f"relative RMS {result.relative_rms:.2e}, worst cell {result.worst_cell:.2e}")
    print(f"centred cosine {result.centred_cosine:.6f}")
    print(f"{result.cells_per_second:.1f} cells/s, {result.tokens_per_second:,.0f} tokens/s on this machine")
    print(f"{arguments.release}: {result.release_cells:,} cells, {result.release_hours:,.1f} hours of one such machine")
