"""The asset `shard_embeddings`, with one partition per release and shard. `pipeline.embed_shard` does the work."""

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import dagster as dg

from census_tf_dagster.config.dagster_names import APPROVAL, PLAN, SHARDS
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.durations import duration
from census_tf_dagster.orchestration.approval_gate import require_approval
from census_tf_dagster.orchestration.asset_support import (
    asset_key,
    asset_of,
    final_failure,
    partition_context,
    shard_of,
    stop_if_run_is_over,
)
from census_tf_dagster.orchestration.automation import once_for_new_partitions
from census_tf_dagster.orchestration.checks.quality import upstream_check, upstream_check_spec
from census_tf_dagster.orchestration.checks.rules import report_if_stale
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import BY_RELEASE, shard_partitions
from census_tf_dagster.orchestration.release_progress import observe_release
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.pipeline.embed_shard import ShardSummary

OBSERVE_EVERY_SECONDS = 30.0
"""A running shard reports its progress at most this often."""
SET_ASIDE_NAMED = 100
"""The most cells that a shard's metadata names. The list for consumers has all of them."""
PACKAGES = ("census-tf-dagster", "torch", "tiledbsoma", "tiledb", "numpy")
"""The packages whose versions a shard records."""


class ShardConfig(dg.Config):
    """The run configuration of a shard."""

    recompute: bool = False
    """Compute and write all cells again, even if they are already in the array."""


class ShardProgress:
    """Reports the progress of a run that embeds cells, as log lines and observations; ends a run that is over."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        asset: dg.AssetKey,
        partition: str,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self._context, self._asset, self._partition, self._also = context, asset, partition, also
        self._observed = time.monotonic()

    def __call__(self, progress: "ShardSummary") -> None:
        """Report a committed megabatch. With each observation, `also` is called."""
        stop_if_run_is_over(self._context)
        done = progress.cells_before + progress.cells_computed
        rate, left = progress.cells_per_second(), progress.seconds_left()
        limit = progress.times.limit()
        self._context.log.info(
            f"{done:,} of {progress.cells:,} cells, {rate:,.1f} cells/s, {duration(left)} left, limited by {limit}"
        )
        if time.monotonic() - self._observed < OBSERVE_EVERY_SECONDS:
            return
        self._observed = time.monotonic()
        metadata: dict[str, Any] = {
            "cells_done": done,
            "cells": progress.cells,
            "cells_per_second": round(rate, 2),
            "seconds_left": round(left),
            "time_left": duration(left),
            "limited_by": limit,
        }
        self._context.log_event(
            dg.AssetObservation(asset_key=self._asset, partition=self._partition, metadata=titled(metadata))
        )
        self._also()


def build_shard_embeddings(settings: SetSettings, placement: Mapping[str, str]) -> dg.AssetsDefinition:
    """Build the GPU asset of a set. The run coordinator copies the placement tags to its runs."""
    key, partitions = asset_key(settings, SHARDS), shard_partitions(settings.shards)

    @dg.asset(
        **asset_of(settings, SHARDS),
        partitions_def=partitions,
        deps=[dg.AssetDep(asset_key(settings, name), partition_mapping=BY_RELEASE) for name in (PLAN, APPROVAL)],
        kinds={"torch", "tiledb"},
        automation_condition=once_for_new_partitions(settings.spending),
        op_tags=placement,
        check_specs=[upstream_check_spec(settings, SHARDS, partitions)],
        description=(
            f"The embeddings of one shard of {settings.organism}, computed from the Census's counts and committed to "
            "the array megabatch by megabatch. If you run it again, it computes only what is missing."
        ),
    )
    def shard_embeddings(
        context: dg.AssetExecutionContext, config: ShardConfig, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult:  # type: ignore[type-arg]
        from census_tf_dagster.pipeline.embed_shard import SetAsideError, ShardSummary, embed_shard
        from census_tf_dagster.pipeline.upstream import find_upstream

        keys, release, shard = shard_of(context, "shard")

        def observe_whole() -> None:
            if (whole := observe_release(context.instance, settings, release)) is not None:
                context.log_event(whole)

        report = ShardProgress(context, key, keys, observe_whole)

        def show(progress: ShardSummary) -> None:
            report(progress)
            if progress.megabatches_computed == 1:
                report_if_stale(context, settings, release, opened)

        with partition_context(settings, release, census, store, require_device=True) as opened:
            require_approval(context, settings, release, opened)
            try:
                upstream = find_upstream()
                summary = embed_shard(opened, shard, recompute=config.recompute, upstream=upstream, report=show)
            except SetAsideError as error:
                # An automatic retry would meet the same cells.
                metadata = titled({"set_aside": error.details})
                raise final_failure(str(error), metadata) from error
            if summary.megabatches_computed:
                # Check again: the array may have been verified between the first commit and the last.
                report_if_stale(context, settings, release, opened)
        return dg.MaterializeResult(
            metadata=titled(shard_figures(summary, settings.spending.usd_per_gpu_hour)),
            check_results=[upstream_check(settings, SHARDS, summary.comparison)],
        )

    return shard_embeddings


def shard_figures(summary: "ShardSummary", usd_per_gpu_hour: float | None) -> dict[str, Any]:
    """Return the metadata of a run that embedded cells."""
    times = summary.times
    figures: dict[str, Any] = {
        "cells": summary.cells,
        "cells_computed": summary.cells_computed,
        "megabatches": summary.megabatches,
        "megabatches_computed": summary.megabatches_computed,
        "tokens_computed": summary.tokens_computed,
        "cells_per_second": round(summary.cells_per_second(), 2),
        "plan": summary.plan,
        "host": platform.node(),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "seconds_load": round(times.load, 3),
        "seconds_work": round(summary.seconds, 3),
        "seconds_verification": round(summary.verification_seconds, 3),
        "verified": summary.verified,
        "cells_set_aside": len(summary.set_aside),
        "cells_fractional": summary.cells_fractional,
        "cells_widened": summary.cells_widened,
        "megabatches_mended": summary.megabatches_mended,
    }
    if summary.set_aside:
        named = list(summary.set_aside.items())[:SET_ASIDE_NAMED]
        figures["set_aside"] = [f"joinid {joinid}: {why}" for joinid, why in named]
    if summary.megabatches_computed:
        # The paid time, from loading to verification.
        device_seconds = (times.load + summary.seconds + summary.verification_seconds) * len(times.devices)
        if usd_per_gpu_hour is not None:
            figures["usd"] = round(device_seconds / 3600 * usd_per_gpu_hour, 4)
        figures |= {
            "devices": ", ".join(str(device["name"]) for device in times.devices),
            "device_count": len(times.devices),
            "device_seconds": round(device_seconds, 1),
            "tokens_per_second": round(summary.tokens_per_second(), 1),
            "attention": times.devices[0]["attention"],
            "row_fill": round(times.fill(), 4),
            "limited_by": times.limit(),
            "gpu_peak_gib": round(max(one["peak_bytes"] for one in times.counters.values()) / 2**30, 2),
            "out_of_memory": int(sum(one["halvings"] for one in times.counters.values())),
        }
        for name, stage in times.stages.items():
            figures[f"seconds_busy_{name}"] = round(stage.busy, 3)
            figures[f"seconds_waiting_{name}"] = round(stage.waiting, 3)
    return figures
