"""Keeps the embeddings of a file while they are computed, so that a process that was killed can go on.

A folder beside the output holds ``values.npy``, into which each megabatch is written in place, and ``journal.jsonl``:
the identity, then a line for each megabatch that is on disk, with a checksum of its values.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from census_tf_dagster.errors import UserError

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Done:
    """A megabatch that is on disk.

    Attributes
    ----------
    megabatch
        Its number.
    checksum
        XXH3 of its values.
    set_aside
        The reason for each cell without an embedding, by its position in the file.
    widened, fractional
        Numbers of cells that were computed in a wider precision, and with counts that are not whole numbers.
    """

    megabatch: int
    checksum: str
    set_aside: dict[int, str] = field(default_factory=dict)
    widened: int = 0
    fractional: int = 0


class PartialResult:
    """Embeddings under way, float32 ``(n_cells, dim)``. `open_partial` makes it."""

    def __init__(self, folder: Path, header: dict[str, Any], n_cells: int, dim: int) -> None:
        self.folder = folder
        self.shape = (n_cells, dim)
        self.done: dict[int, Done] = {}
        self._header = header
        self._values = folder / "values.npy"
        self._journal = folder / "journal.jsonl"

    @property
    def values(self) -> Path:
        """The file of the values, in numpy's format."""
        return self._values

    def add(self, start: int, values: Values, done: Done) -> None:
        """Write a megabatch, then the line that says so."""
        with self._values.open("r+b") as file:
            file.seek(self._offset + start * self.shape[1] * 4)
            file.write(values.tobytes())
            file.flush()
            os.fdatasync(file.fileno())
        self._append(asdict(done))
        self.done[done.megabatch] = done

    def read(self, start: int, stop: int) -> Values:
        """Read the rows from `start` to before `stop`."""
        offset = self._offset + start * self.shape[1] * 4
        values = np.fromfile(self._values, np.float32, (stop - start) * self.shape[1], offset=offset)
        return values.reshape(stop - start, self.shape[1])

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    @property
    def _offset(self) -> int:
        return self._values.stat().st_size - self.shape[0] * self.shape[1] * 4

    def _append(self, line: dict[str, Any]) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fdatasync(file.fileno())

    def _begin(self) -> None:
        self._journal.unlink(missing_ok=True)
        with self._values.open("wb") as file:
            descr = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, descr)
            file.truncate(file.tell() + self.shape[0] * self.shape[1] * 4)
        self._append(self._header)

    def _resume(self, ranges: list[tuple[int, int]]) -> None:
        """Take over what is on disk; not a last line that was cut, nor values that were not written whole."""
        for line in self._journal.read_text().splitlines()[1:]:
            try:
                content = json.loads(line)
                content["set_aside"] = {int(cell): why for cell, why in content["set_aside"].items()}
                done = Done(**content)
                start, stop = ranges[done.megabatch]
            except (ValueError, KeyError, TypeError, IndexError):
                continue
            if checksum(self.read(start, stop)) == done.checksum:
                self.done[done.megabatch] = done
        # What follows a line that was cut begins on a line of its own.
        if not self._journal.read_bytes().endswith(b"\n"):
            with self._journal.open("a") as file:
                file.write("\n")


def partial_folder(output: Path) -> Path:
    """Return the folder beside an output that holds it while it is computed."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_partial(
    output: Path, identity: dict[str, Any], ranges: list[tuple[int, int]], dim: int
) -> Iterator[PartialResult]:
    """Open the partial result of an output; go on with the one that a process left there.

    Parameters
    ----------
    output
        The file that it will become. The partial result lies beside it.
    identity
        What must be the same for a process to go on: of the embeddings, and of the cells.
    ranges
        First position and the one after the last of each megabatch.
    dim
        Width of the embeddings.

    Raises
    ------
    UserError
        When the folder cannot be written, another process works on it, or it belongs to another identity.
    """
    folder = partial_folder(output)
    n_cells = ranges[-1][1] if ranges else 0
    header = {"identity": identity, "megabatches": len(ranges), "shape": [n_cells, dim]}
    result = PartialResult(folder, header, n_cells, dim)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stored = _stored_header(result._journal)
            if stored not in (None, header):
                raise UserError(
                    f"{folder} is the unfinished result of other cells or other settings "
                    f"({_difference(stored, header)}). Finish it with those, remove the folder, or give another "
                    "`--out`."
                )
            if stored is None:
                result._begin()
            else:
                result._resume(ranges)
        except BlockingIOError as error:
            raise UserError(f"another process writes {output}; wait for it, or give another `--out`.") from error
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error}); expected a writable folder with free space: give another "
                "`--out`."
            ) from error
        yield result


def checksum(values: Values) -> str:
    """Return the XXH3 of values, as a journal states it."""
    return xxhash.xxh3_64_hexdigest(values.tobytes())


def _stored_header(journal: Path) -> Any:
    try:
        return json.loads(journal.read_text().partition("\n")[0])
    except (OSError, ValueError):
        return None


def _difference(stored: Any, header: dict[str, Any]) -> str:
    before = stored.get("identity", {}) if isinstance(stored, dict) else {}
    now = header["identity"]
    names = [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]
    return f"{', '.join(names)} differ{'s' if len(names) == 1 else ''}" if names else "its shape differs"
