"""Keeps beside each plan the identity it was made for, so that a run which copies cells needs no checkpoint.

The identity names the folder of a release, and contains the fingerprint of the checkpoint. Without this file, a run
would have to fetch and hash gigabytes of weights to find the plan.
"""

import json
from contextlib import suppress
from dataclasses import asdict

from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import Identity
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.layout import ReleaseFolder


def identity_of(
    settings: SetSettings,
    census_uri: str,
    census_build_date: str,
    *,
    gene_fingerprint: str,
    checkpoint_fingerprint: str,
    embedding_dim: int,
) -> Identity:
    """Return the identity of a set and release; the keywords are what only Census genes and checkpoint tell."""
    return Identity(
        census_uri=census_uri,
        census_build_date=census_build_date,
        organism=settings.organism,
        value_filter=settings.value_filter,
        mod=settings.mod,
        gene_order=settings.gene_order,
        gene_fingerprint=gene_fingerprint,
        checkpoint_fingerprint=checkpoint_fingerprint,
        compute_precision=settings.compute_precision,
        storage_precision=settings.storage_precision,
        embedding_dim=embedding_dim,
        fractional_counts=settings.fractional_counts,
    )


def write_planned_identity(store: Storage, folder: ReleaseFolder, settings: SetSettings, identity: Identity) -> None:
    """Write the identity of a plan, and the addresses from which its checkpoint was read."""
    content = {"checkpoint": _checkpoint(settings), "identity": asdict(identity)}
    store.write(folder.planned_identity, json.dumps(content, indent=1).encode())


def find_planned_identity(
    settings: SetSettings, release: str, census_uri: str, census_build_date: str, store_uri: str, store: Storage
) -> Identity | None:
    """Find the identity for which a release of a set was planned with these settings. Reads no checkpoint.

    Returns
    -------
    Identity or None
        None if no plan or more than one fits. More than one fits after the files at the checkpoint's address were
        replaced; then only the checkpoint tells which one is meant. Plans of older versions have no such file.
    """
    found = []
    for entry in store.list(f"{store_uri}/{settings.name}/{release}"):
        with suppress(UserError, ValueError, TypeError, KeyError):
            folder = ReleaseFolder(entry.rstrip("/"))
            content = json.loads(store.read(folder.planned_identity))
            stored = Identity(**content["identity"])
            expected = identity_of(
                settings,
                census_uri,
                census_build_date,
                gene_fingerprint=stored.gene_fingerprint,
                checkpoint_fingerprint=settings.checkpoint_fingerprint or stored.checkpoint_fingerprint,
                embedding_dim=stored.embedding_dim,
            )
            here = ReleaseFolder.of(store_uri, settings.name, release, stored) == folder
            if content["checkpoint"] == _checkpoint(settings) and stored == expected and here:
                found.append(stored)
    return found[0] if len(found) == 1 else None


def _checkpoint(settings: SetSettings) -> list[str]:
    return [settings.checkpoint, *settings.pretrained_embeddings]
