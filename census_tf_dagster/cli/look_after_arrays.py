"""The commands for finished and old arrays in the store: `verify`, `inspect`, `prune` and `remove`."""

import argparse
import json
from dataclasses import asdict

from census_tf_dagster.cli.parsing import PROGRAM, Commands, add_json, add_set_and_release, print_progress
from census_tf_dagster.errors import UserError


def add_commands(commands: Commands) -> None:
    """Declare the commands of this group."""
    verify = commands.add_parser(
        "verify",
        help="check every rule of a finished array: exactly the planned cells, all values, the curators' rules",
        description=(
            "Check every rule of a finished array, from its metadata and from what the shards read back. --full reads "
            "every value again, on all cores of this machine. Exit code 1: a rule is broken; it was printed."
        ),
        epilog=f"example: {PROGRAM} verify demo_human 2025-11-08 --full",
    )
    add_set_and_release(verify)
    verify.add_argument("--full", action="store_true", help="read every value again")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser(
        "inspect",
        help="list what a store holds: sets, releases, identities, shards done, cells, bytes",
        epilog=f"example: {PROGRAM} inspect demo-data/store",
    )
    inspect.add_argument("store", nargs="?", help="folder or S3 prefix (default: this deployment's store)")
    inspect.set_defaults(run=_inspect)

    remove = commands.add_parser(
        "remove",
        help="remove one identity of a release from this deployment's store; asks for confirmation",
        epilog=f"example: {PROGRAM} remove demo_human 2025-11-08 a5e26a02f29c --confirm a5e26a02f29c",
    )
    for name in ("set", "release", "identity"):
        remove.add_argument(name, help=f"the {name}, as `inspect` shows it")
    remove.add_argument("--confirm", metavar="IDENTITY", help="the same identity again; nothing is removed without it")
    remove.set_defaults(run=_remove)

    prune = commands.add_parser(
        "prune",
        help="remove or archive old plans and arrays, as retention.yaml says; asks for confirmation",
        description=(
            "List the plans and arrays that retention.yaml (in the folder of sets) says to remove or archive. Without "
            "that file the list is empty. Nothing is removed or archived until you repeat the command with --confirm "
            "and the word that it shows."
        ),
        epilog=f"example: {PROGRAM} prune --confirm 0123456789ab",
    )
    prune.add_argument(
        "--confirm", metavar="WORD", help="the word that `prune` showed: remove or archive exactly what it listed"
    )
    prune.set_defaults(run=_prune)
    add_json(verify, inspect, remove, prune)


def _verify(arguments: argparse.Namespace) -> int:
    from census_tf_dagster.definitions import deployed_context
    from census_tf_dagster.pipeline.finish_array import RuleError, verify_array

    def show(done: int, total: int) -> None:
        print_progress(f"read {done} of {total} shards again")

    with deployed_context(arguments.set, arguments.release) as context:
        try:
            findings = verify_array(context, full=arguments.full, report=show)
        except RuleError as error:
            findings = error.findings
    if arguments.json:
        rules = {finding.rule: finding.wrong for finding in findings}
        print(json.dumps({"array": context.folder.array, "rules": rules}))
    else:
        print(context.folder.array)
        for finding in findings:
            print(f"  {finding.rule:<16} {'; '.join(finding.wrong) or 'kept'}")
    return int(any(finding.wrong for finding in findings))


def _inspect(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.definitions import store_resource
    from census_tf_dagster.io.names import normalise
    from census_tf_dagster.store.inventory import inspect_store

    resource = store_resource()
    store = normalise(arguments.store) if arguments.store else resource.uri()
    holdings = []
    for held in inspect_store(store, resource.storage()):
        holdings.append(asdict(held))
        if not arguments.json:
            cells = f"{held.cells_stored:,}/{held.cells_planned:,} cells  {held.bytes:,} bytes"
            line = f"{held.set}/{held.release}/{held.identity}  {held.shards_done}/{held.shards} shards  {cells}"
            print(f"{line}  {held.state} {held.problem}".rstrip(), flush=True)
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
        raise UserError(
            f"--confirm is {arguments.confirm}; expected {word}, the word of the present list. Nothing was done. Run "
            "`prune` without --confirm and read the list again."
        )
    done = apply(store, storage, retention, chosen, arguments.confirm) if arguments.confirm else []
    if arguments.json:
        names = [candidate.name for candidate in chosen]
        print(json.dumps({"policy": retention.policy, "chosen": names, "word": word, "done": bool(arguments.confirm)}))
        return
    print(f"policy {retention.policy}: {len(chosen)} arrays")
    print("".join(f"  {line}\n" for line in done or chosen), end="")
    if chosen and not arguments.confirm:
        print(f"Nothing was done. To {retention.policy} exactly these: {PROGRAM} prune --confirm {word}")
