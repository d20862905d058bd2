"""The command line beside Dagster's own: `python -m census_tf_dagster`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from census_tf_dagster.errors import DirectoryError, UserError

if TYPE_CHECKING:
    import dagster as dg

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""
WATCH_SECONDS = 10.0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m census_tf_dagster",
        usage="%(prog)s COMMAND [-h] ...",
        description="TranscriptFormer embeddings of CELLxGENE Census releases, as Dagster assets.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, prog=parser.prog, metavar="COMMAND", help=argparse.SUPPRESS
    )

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
    demo.set_defaults(run=_demo)

    check = commands.add_parser(
        "check",
        help="check the YAML of sets: every mistake with its file, line, value and remedy",
        epilog="example: python -m census_tf_dagster check census_tf_dagster/defs",
    )
    check.add_argument("sets", nargs="?", type=Path, help="folder of sets; without: this deployment's")
    check.set_defaults(run=_check)

    release = commands.add_parser(
        "release",
        help="add or list Census releases",
        epilog="example: python -m census_tf_dagster release list",
    )
    actions = release.add_subparsers(dest="action", required=True)
    add = actions.add_parser(
        "add",
        help="make a Census release a partition of every set",
        epilog="example: python -m census_tf_dagster release add 2025-11-08",
    )
    add.add_argument("name", help="name of the release")
    add.set_defaults(run=lambda arguments: add_release(arguments.name, as_json=arguments.json))
    listing = actions.add_parser(
        "list",
        help="show the releases that were added",
        epilog="example: python -m census_tf_dagster release list --json",
    )
    listing.set_defaults(run=lambda arguments: list_releases(as_json=arguments.json))

    launch = commands.add_parser(
        "launch",
        help="take a release of a set to its array in a running deployment, and follow it",
        description=(
            "Start one backfill in a running deployment: plan, all shards, array; or chosen shards, then the array. "
            "It goes on when this command is interrupted; the same command follows it again. Exit code 1: something "
            "failed, which is printed."
        ),
        epilog="example: python -m census_tf_dagster launch demo_human 2025-11-08 --shards 0,2-3",
    )
    launch.add_argument("set", help="name of the set")
    launch.add_argument("release", help="name of the release")
    launch.add_argument("--shards", metavar="3,7-12", help="only these shards, then the array; without: everything")
    launch.add_argument("--recompute", action="store_true", help="compute cells again that are in the array already")
    launch.add_argument("--dry-run", action="store_true", help="show what would be done and written; start nothing")
    launch.add_argument("--no-wait", dest="wait", action="store_false", help="start it and return")
    launch.set_defaults(run=_launch)

    approve = commands.add_parser(
        "approve",
        help="let the shards of a release spend what its plan says",
        description=(
            "Show what the current plan of a release costs, and approve it: the shards that wait for it start. The "
            "same as materializing the set's asset `approval` in the web interface. A plan that needs more later is "
            "not covered."
        ),
        epilog="example: python -m census_tf_dagster approve demo_human 2025-11-08",
    )
    approve.add_argument("set", help="name of the set")
    approve.add_argument("release", help="name of the release")
    approve.add_argument("--plan", metavar="HASH", help="approve only if this is the current plan")
    approve.set_defaults(run=_approve)

    status = commands.add_parser(
        "status",
        help="show what of a set's releases is done, runs, failed or is missing, and when it should finish",
        epilog="example: python -m census_tf_dagster status demo_human 2025-11-08",
    )
    status.add_argument("set", help="name of the set")
    status.add_argument("release", nargs="?", help="name of the release; without: every one that has anything")
    status.add_argument("--watch", action="store_true", help="show it again every 10 seconds, until Ctrl-C")
    status.set_defaults(run=_status)

    canary = commands.add_parser(
        "canary",
        help="embed a few hundred cells of a release on this machine, compare and time them, keep only their rate",
        description=(
            "Take a few hundred cells, spread over assays and lengths, through the very path of the set on this "
            "machine; compare them with upstream's own command (--upstream) or with fp32 of ours; say what the release "
            "would take. Run it on the node type that will do the work."
        ),
        epilog="example: python -m census_tf_dagster canary demo_human 2025-11-08 --cells 100",
    )
    canary.add_argument("set", help="name of the set")
    canary.add_argument("release", help="name of the release")
    canary.add_argument("--cells", type=int, default=256, help="about how many, as many of each assay (default: 256)")
    canary.add_argument(
        "--upstream", type=Path, help="upstream's transcriptformer command, in an environment of its own"
    )
    canary.set_defaults(run=_canary)

    verify = commands.add_parser(
        "verify",
        help="check every rule of a finished array: exactly the planned cells, all values, what curators ask for",
        description=(
            "Check every rule of a finished array, from metadata and from what the shards read back; --full reads "
            "every value again, on all cores of this machine. Exit code 1: a rule is broken, which is printed."
        ),
        epilog="example: python -m census_tf_dagster verify demo_human 2025-11-08 --full",
    )
    verify.add_argument("set", help="name of the set")
    verify.add_argument("release", help="name of the release")
    verify.add_argument("--full", action="store_true", help="read every value again")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser(
        "inspect",
        help="list what a store holds: sets, releases, identities, shards done, cells, bytes",
        epilog="example: python -m census_tf_dagster inspect demo-data/store",
    )
    inspect.add_argument("store", nargs="?", help="folder or S3 prefix; without: this deployment's")
    inspect.set_defaults(run=_inspect)

    remove = commands.add_parser(
        "remove",
        help="remove one identity of a release from this deployment's store, when asked for twice",
        epilog="example: python -m census_tf_dagster remove demo_human 2025-11-08 a5e26a02f29c --confirm a5e26a02f29c",
    )
    for name in ("set", "release", "identity"):
        remove.add_argument(name, help=f"as `inspect` shows the {name}")
    remove.add_argument("--confirm", metavar="IDENTITY", help="the identity once more; without it nothing is removed")
    remove.set_defaults(run=_remove)

    prune = commands.add_parser(
        "prune",
        help="do with old plans and arrays what retention.yaml says, when asked for twice",
        description=(
            "List what the deployment's retention.yaml (in the folder of sets) would remove or archive; nothing "
            "without such a file. Nothing is done until the command is repeated with the word that it shows."
        ),
        epilog="example: python -m census_tf_dagster prune --confirm 0123456789ab",
    )
    prune.add_argument("--confirm", metavar="WORD", help="as shown without it: do it to exactly those")
    prune.set_defaults(run=_prune)

    for command in (check, add, listing, launch, approve, status, canary, verify, inspect, remove, prune):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (launch, approve, status):
        command.add_argument(
            "--url",
            default=os.environ.get("CENSUS_TF_DAGSTER_URL", "http://127.0.0.1:3000"),
            help="address of the deployment's webserver (default: CENSUS_TF_DAGSTER_URL, else http://127.0.0.1:3000)",
        )
    parser.epilog = _grouped(commands)
    return parser


GROUPS = {
    "try it": ("demo", "check", "canary"),
    "run releases": ("release", "launch", "approve", "status"),
    "look after arrays": ("verify", "inspect", "prune", "remove"),
}


def _grouped(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> str:
    """Return the list of commands as a person reads it; one that is in no group comes last."""
    meanings = {one.dest: one.help for one in commands._get_subactions()}
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "more": tuple(name for name in meanings if name not in grouped)}
    lines = []
    for title, names in groups.items():
        lines += [f"{title}:", *(f"  {name:<10} {meanings[name]}" for name in names if name in meanings), ""]
    return "\n".join(
        [
            *(lines if groups["more"] else lines[:-2]),
            "COMMAND --help shows arguments and an example; --json prints one JSON object, progress goes to stderr.",
            "Exit codes: 0 all is well, 1 something is wrong and was printed, 2 wrong arguments, 130 interrupted.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int | None = arguments.run(arguments)
    except (UserError, DirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def _say(text: str) -> None:
    """Tell a person what goes on, beside what a script reads."""
    print(text, file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> int:
    from census_tf_dagster.definitions import load_settings, sets_folder
    from census_tf_dagster.set_files import find_problems

    folder = arguments.sets or sets_folder()
    problems = find_problems(folder)
    if arguments.json:
        found = [{**asdict(one), "file": str(one.file)} for one in problems]
        print(json.dumps({"sets": str(folder), "problems": found}))
    elif problems:
        print("\n".join(map(str, problems)), file=sys.stderr)
    else:
        names = sorted(load_settings(folder))
        print(f"{folder}: {len(names)} set{'s' if len(names) > 1 else ''} without a mistake: {', '.join(names)}")
        print("(their YAML; checkpoint and Census are opened by `launch SET RELEASE --dry-run`)")
    return int(bool(problems))


def _demo(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.demo.run import run_demo

    run_demo(arguments.h5ad, data_only=arguments.data_only)


def _launch(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        from census_tf_dagster.definitions import deployed_context
        from census_tf_dagster.operate.dry_run import describe, dry_run, measured_shards
        from census_tf_dagster.operate.shard_ranges import parse_shards

        shards = parse_shards(arguments.shards) if arguments.shards else None
        with deployed_context(arguments.set, arguments.release) as context:
            _say(f"reading obs of {context.release.uri}; minutes for a whole Census")
            measured = measured_shards(arguments.url, arguments.set)
            result = dry_run(context, shards, recompute=arguments.recompute, measured=measured)
        print(json.dumps(asdict(result)) if arguments.json else describe(result))
        return 0
    if arguments.json and arguments.wait:
        raise UserError("launch --json goes with --dry-run or --no-wait; `status --json` says how far a launch is.")
    from census_tf_dagster.operate.launch import LaunchRequest, launch

    request = LaunchRequest(
        set=arguments.set,
        release=arguments.release,
        shards=arguments.shards,
        recompute=arguments.recompute,
        wait=arguments.wait,
        as_json=arguments.json,
    )
    return launch(arguments.url, request)


def _approve(arguments: argparse.Namespace) -> int:
    from census_tf_dagster.operate.approve import approve

    return approve(arguments.url, arguments.set, arguments.release, arguments.plan, as_json=arguments.json)


def _status(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.operate.status import show_status

    while True:
        show_status(arguments.url, arguments.set, arguments.release, as_json=arguments.json)
        if not arguments.watch:
            return
        time.sleep(WATCH_SECONDS)
        print(flush=True)


def _canary(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.definitions import deployed_context
    from census_tf_dagster.pipeline.canary import run_canary

    with deployed_context(arguments.set, arguments.release) as context:
        result = run_canary(context, arguments.cells, arguments.upstream, _say)
    if arguments.json:
        print(json.dumps(asdict(result)))
        return
    print(f"{result.cells} cells of {result.assays} assays; compared with {result.reference}")
    print(f"relative RMS {result.relative_rms:.2e}, worst cell {result.worst_cell:.2e}")
    print(f"centred cosine {result.centred_cosine:.6f}")
    print(f"{result.cells_per_second:.1f} cells/s, {result.tokens_per_second:,.0f} tokens/s on this machine")
    print(f"the release: {result.release_cells:,} cells, {result.release_hours:,.1f} hours of one such machine")


def _verify(arguments: argparse.Namespace) -> int:
    from census_tf_dagster.definitions import deployed_context
    from census_tf_dagster.pipeline.finish_array import RuleError, verify_array

    def show(done: int, of: int) -> None:
        _say(f"read {done} of {of} shards again")

    with deployed_context(arguments.set, arguments.release) as context:
        try:
            findings = verify_array(context, full=arguments.full, report=show)
        except RuleError as error:
            findings = error.findings
    if arguments.json:
        print(json.dumps({"array": context.folder.array, "rules": {one.rule: one.wrong for one in findings}}))
    else:
        print(context.folder.array)
        for one in findings:
            print(f"  {one.rule:<16} {'; '.join(one.wrong) or 'kept'}")
    return int(any(one.wrong for one in findings))


def _inspect(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.definitions import store_resource
    from census_tf_dagster.io.names import normalise
    from census_tf_dagster.store.inventory import inspect_store

    resource = store_resource()
    store = normalise(arguments.store) if arguments.store else resource.uri()
    holdings = []
    for one in inspect_store(store, resource.storage()):
        holdings.append(asdict(one))
        if not arguments.json:
            cells = f"{one.cells_stored:,}/{one.cells_planned:,} cells  {one.bytes:,} bytes"
            line = f"{one.set}/{one.release}/{one.identity}  {one.shards_done}/{one.shards} shards  {cells}"
            print(f"{line}  {one.state} {one.problem}".rstrip(), flush=True)
    print(json.dumps({"store": store, "holdings": holdings}) if arguments.json else f"{store}: {len(holdings)} arrays")


def _remove(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.definitions import store_resource
    from census_tf_dagster.store.inventory import remove_release

    resource = store_resource()
    names = (arguments.set, arguments.release, arguments.identity)
    removed = remove_release(resource.uri(), resource.storage(), *names, arguments.confirm)
    print(json.dumps({"removed": "/".join(names)}) if arguments.json else f"removed {removed}")


def _prune(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.config.retention import read_retention
    from census_tf_dagster.definitions import sets_folder, store_resource
    from census_tf_dagster.store.prune import apply, candidates, confirms, digest

    resource, retention = store_resource(), read_retention(sets_folder())
    store, storage = resource.uri(), resource.storage()
    chosen = candidates(store, storage, retention)
    word = digest(chosen)
    if arguments.confirm and not confirms(arguments.confirm, chosen):
        raise UserError(f"--confirm {arguments.confirm}: what would go is now {word}. Nothing was done; look again.")
    done = apply(store, storage, retention, chosen, arguments.confirm) if arguments.confirm else []
    if arguments.json:
        names = [one.name for one in chosen]
        print(json.dumps({"policy": retention.policy, "chosen": names, "word": word, "done": bool(arguments.confirm)}))
        return
    print(f"policy {retention.policy}: {len(chosen)} arrays")
    print("".join(f"  {line}\n" for line in done or chosen), end="")
    if chosen and not arguments.confirm:
        print(f"Nothing was done. To {retention.policy} exactly these: prune --confirm {word}")


def _instance() -> "dg.DagsterInstance":
    import dagster as dg

    home = os.environ.get("DAGSTER_HOME")
    if home is None or not (Path(home).is_absolute() and Path(home).is_dir()):
        raise UserError(
            f"DAGSTER_HOME is {'not set' if home is None else repr(home)}; expected the absolute path of the Dagster "
            "instance's folder, which is there, such as: export DAGSTER_HOME=$PWD/demo-data/dagster_home"
        )
    return dg.DagsterInstance.get()


def add_release(name: str, *, as_json: bool = False) -> None:
    """Add a release's partition to the Dagster instance of DAGSTER_HOME, if its Census exists."""
    from census_tf_dagster.definitions import census_resource
    from census_tf_dagster.orchestration.partitions import RELEASES

    census = census_resource()
    uri = census.uri(name)
    listed = census.listed(name)
    if listed and listed.retraction:
        raise UserError(f"release {name} was {listed.retraction}. Nothing was added.")
    with _instance() as instance:
        known = name in instance.get_dynamic_partitions(str(RELEASES.name))
        instance.add_dynamic_partitions(str(RELEASES.name), [name])
    if as_json:
        print(json.dumps({"release": name, "added": not known, "census": uri}))
    else:
        print(f"release {name} was there already" if known else f"release {name} added", f"({uri})")


def list_releases(*, as_json: bool = False) -> None:
    """Print the releases that were added, one a line."""
    from census_tf_dagster.orchestration.partitions import RELEASES

    with _instance() as instance:
        names = list(instance.get_dynamic_partitions(str(RELEASES.name)))
    if as_json:
        print(json.dumps({"releases": names}))
    else:
        for name in names:
            print(name)
