"""A placement as a deployment declares it: both platforms, both kinds of purchase."""

from pathlib import Path
from typing import Any

import yaml

from census_tf_dagster.config.placement import FILE, Placement

PLACEMENT: dict[str, Any] = {
    "gpus": 1,
    "cpu": 4,
    "memory_gib": 28,
    "purchase": "spot",
    "ecs": {
        "task_definition": "census-tf-worker:7",
        "capacity_providers": {"spot": "gpu-spot", "on_demand": "gpu-on-demand"},
    },
    "kubernetes": {
        "image": "registry.example/census-tf-worker:0.1.0",
        "service_account": "census-tf-worker",
        "nodes": {
            purchase: {
                "node_selector": {"example.com/pool": "gpu", "example.com/purchase": purchase},
                "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
            }
            for purchase in ("spot", "on_demand")
        },
    },
}
TAGS = Placement.model_validate(PLACEMENT).tags()


def declare(sets: Path, **changes: Any) -> None:
    """Write placement.yaml into a folder of sets."""
    sets.mkdir(parents=True, exist_ok=True)
    (sets / FILE).write_text(yaml.safe_dump(PLACEMENT | changes))
