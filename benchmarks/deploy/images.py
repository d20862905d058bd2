"""Measure the sizes of the images and of their layers, and how long a change of code takes to rebuild.

    sudo python -m benchmarks.deploy.images    # with buildah; BASE as for deploy/images/build.sh

Builds from a copy of the checkout's tracked files. If buildah's store already has the packages, `first` is short. To
see how long a first build takes, run `buildah rmi --all` before.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

TARGETS = ("control", "worker")
CHANGED = "census_tf_dagster/cli/__init__.py"
TRIES = 3
PACKAGES = "opt/census_tf/venv/lib/python3*/site-packages"


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.check_output(command, text=True)


def build(checkout: Path) -> float:
    """Build both images; return the seconds."""
    started = time.monotonic()
    subprocess.run([checkout / "deploy/images/build.sh"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def copy_checkout(target: Path) -> None:
    """Copy the tracked files."""
    for name in output("git", "ls-files").splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target / name)


def megabytes(path: Path) -> float:
    """Return the bytes of all files below `path`, in MB."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir()) / 1e6


def measure(target: str, scratch: Path) -> dict[str, Any]:
    """Return an image's layers (MB on disk and compressed, with the step that made each) and its largest packages."""
    image = f"localhost/census-tf-{target}:latest"
    told = json.loads(output("buildah", "inspect", "--type", "image", image))
    steps = [entry["created_by"] for entry in told["Docker"]["history"] if not entry.get("empty_layer")]
    pushed = scratch / target
    subprocess.run(["buildah", "push", "--quiet", "--format", "docker", image, f"dir:{pushed}"], check=True)
    compressed = [layer["size"] / 1e6 for layer in json.loads((pushed / "manifest.json").read_text())["layers"]]
    name = output("buildah", "from", image).strip()
    root = Path(output("buildah", "mount", name).strip())
    packages: dict[str, float] = defaultdict(float)
    (site,) = root.glob(PACKAGES)
    for entry in site.iterdir():
        size = megabytes(entry) if entry.is_dir() else entry.stat().st_size / 1e6
        packages[entry.name.removesuffix(".libs")] += size
    parts = {
        "site-packages": sum(packages.values()),
        "the rest of opt": megabytes(root / "opt") - sum(packages.values()),
        "Debian's packages": megabytes(root / "usr"),
        "all": megabytes(root),
    }
    subprocess.run(["buildah", "rm", name], check=True, capture_output=True)
    largest = dict(sorted(packages.items(), key=lambda item: -item[1])[:16])
    return {"layers": list(zip(steps, compressed, strict=True)), "parts": parts, "largest": largest}


def show(target: str, found: dict[str, Any]) -> None:
    """Print an image's sizes."""
    parts = ", ".join(f"{name} {size:,.0f}" for name, size in found["parts"].items())
    print(f"\n{target}: {sum(size for _, size in found['layers']):,.0f} MB compressed. MB on disk: {parts}")
    for step, size in found["layers"]:
        print(f"  {size:8.1f} MB compressed  {' '.join(step.split())[:110]}")
    print(
        "  largest packages, MB on disk: " + ", ".join(f"{name} {size:.0f}" for name, size in found["largest"].items())
    )


def main() -> None:
    """Build, measure, change a module, build again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        checkout = Path(temporary) / "checkout"
        copy_checkout(checkout)
        print(f"{output('buildah', '--version').strip()}, base {os.environ.get('BASE', 'of the Dockerfile')}")
        print(f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        first = build(checkout)
        same = [build(checkout) for _ in range(TRIES)]
        changed = []
        for number in range(TRIES):
            with (checkout / CHANGED).open("a") as file:
                file.write(f"\nCHANGE = {number}\n")
            changed.append(build(checkout))
        print(f"both images, seconds: first {first:.0f}; nothing changed {spread(same)}; {CHANGED} {spread(changed)}")
        sizes = {target: measure(target, Path(temporary)) for target in TARGETS}
    for target in TARGETS:
        show(target, sizes[target])
    if arguments.json:
        print(json.dumps({"first_s": first, "same_s": same, "changed_s": changed, **sizes}))


def spread(seconds: list[float]) -> str:
    """Return the median with the extremes."""
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


if __name__ == "__main__":
    main()
