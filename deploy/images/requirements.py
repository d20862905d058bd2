"""Print the packages that pyproject.toml names: `base`, and extras.

The Dockerfile installs them before it copies the source.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = {"base": project["dependencies"], **project["optional-dependencies"]}
for name in sys.argv[1:]:
    print(*groups[name], sep="\n")
