"""Write this machine's pip settings to FOLDER/pip.conf for a build, and print the mounts that the build needs.

FOLDER itself is mounted as /mnt, which every base has, and local folders of wheels are mounted below it. So not even
the names of mount points stay in an image.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

KEYS = {"index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert", "timeout", "retries"}
INSIDE = Path("/mnt")


def read_settings() -> dict[str, str]:
    """Return the settings in pip's files and in its environment, by key. The environment wins, as in pip."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    settings: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        key = key.removeprefix("default-")
        if key in KEYS and section in settings:
            settings[section][key] = ast.literal_eval(value)
    return {key: value for section in settings.values() for key, value in section.items()}


def main(folder: Path) -> None:
    """Write pip.conf, and print one mount a line."""
    mounts = [f"--volume={folder}:{INSIDE}"]
    lines = ["[global]"]
    for key, value in read_settings().items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if key == "cert":
                shutil.copy(path, folder / "cert.pem")
                words.append(str(INSIDE / "cert.pem"))
            elif path.is_absolute() and path.is_dir():
                # An index may point to files beside it, so the folder above it is mounted.
                top = path.parent if word.startswith("file://") else path
                inside = INSIDE / str(len(mounts))
                mounts.append(f"--volume={top}:{inside}:ro")
                words.append(word.replace(str(top), str(inside)))
            else:
                words.append(word)
        lines.append(f"{key} = {' '.join(words)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    print(*mounts, sep="\n")


main(Path(sys.argv[1]))
