"""The requirements that `benchmarks/gpu.sh` installs on a GPU machine."""

import re

from tests.support.project import REPOSITORY


def constrained(name: str) -> set[str]:
    """Return the lines ``name==version`` of a file, names in their normal form."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / name).read_text(), re.M)
    return {f"{re.sub(r'[-_.]+', '-', package).lower()}=={version}" for package, version in lines}


def test_versions_of_all_carried_packages_are_constrained() -> None:
    listed = (REPOSITORY / "benchmarks" / "gpu-packages.txt").read_text().splitlines()
    packages = [line for line in listed if not line.startswith("#")]
    ours = {line.split("==")[0] for line in constrained("constraints.txt")}
    assert {package for package in packages if "==" not in package} <= ours
    assert {package for package in packages if "==" in package} <= constrained("constraints-upstream.txt")
