"""Reads PyTorch's file of weights without PyTorch: lists its tensors, and checks that their bytes are undamaged.

The file is a zip archive. Its entry ``data.pkl`` is a pickle with each tensor's name, dtype and shape; the entries
``data/<key>`` hold the values. No code of the file runs: `pickled_tensors` describes what the pickle would build.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.pickled_tensors import ForeignNameError, PickledTensor, describe

AGAIN = "Get model_weights.pt again, for example by `transcriptformer download`."
ITEM_BYTES = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2}
"""Storage classes of floating-point weights, and the bytes of a value."""
LARGEST_INDEX = 2**26
"""Most bytes of the pickle. That of a published checkpoint has about 50 kB."""
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of PyTorch's format before 1.6, which later versions of `torch.save` can still write."""
LOCAL_FILE = b"PK\x03\x04"
"""First bytes of a zip archive that is not empty."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""End of a zip entry's own header: the lengths of the name and of the extra field that follow."""
BLOCK = 2**24


@dataclass(frozen=True)
class _Record:
    """An entry of the archive: position and number of its bytes, and their CRC-32."""

    start: int
    size: int
    crc: int


def read_index(path: Path) -> Mapping[str, PickledTensor]:
    """Return the tensors of a saved state dict by name; `key` is the full name of the archive's entry.

    Raises
    ------
    UserError
        When the file is truncated, damaged, in PyTorch's old format, or not a dictionary of tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(OLD_FORMAT))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a file of weights that PyTorch saved. {AGAIN}"
        ) from error
    if head == OLD_FORMAT:
        raise UserError(
            f"{path} is in PyTorch's format from before 1.6; expected the zip format. Save it again: "
            f"`python -c \"import torch; torch.save(torch.load('{path}', weights_only=True), '{path}')\"`."
        )
    records = _records(path)
    if not head.startswith(LOCAL_FILE):
        # zipfile skips such bytes, PyTorch does not.
        raise UserError(f"{path} is damaged: it has bytes before its zip archive; expected none. {AGAIN}")
    indices = [name for name in records if name.endswith("/data.pkl")]
    if len(indices) != 1 or records[indices[0]].size > LARGEST_INDEX:
        raise UserError(f"{path} is a zip archive without weights; expected one that PyTorch saved. {AGAIN}")
    prefix = indices[0].removesuffix("data.pkl")
    index = records[indices[0]]
    with path.open("rb") as file:
        file.seek(index.start)
        content = file.read(index.size)
    if _has_checksums(records) and zlib.crc32(content) != index.crc:
        raise _damaged(path, indices[0])
    try:
        state = describe(content)
    except ForeignNameError as error:
        raise UserError(
            f"{path} is a pickle that names {error}; expected a dictionary of tensors and nothing else, so it was not "
            "loaded. Get model_weights.pt from its publisher again."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged: the list of its tensors cannot be read ({str(error)[:200]}). {AGAIN}"
        ) from error
    found: dict[str, PickledTensor] = {}
    for name, tensor in state.items() if isinstance(state, dict) else [("", state)]:
        if not isinstance(tensor, PickledTensor) or not isinstance(name, str) or not name:
            raise _not_a_state_dict(path, state)
        entry = f"{prefix}data/{tensor.key}"
        if entry not in records or records[entry].size < tensor.values * ITEM_BYTES.get(tensor.kind, 1):
            raise UserError(f"{path} is damaged: it lacks values of {name}; expected all of them. {AGAIN}")
        found[name] = replace(tensor, key=entry)
    return found


def require_whole(path: Path, index: Mapping[str, PickledTensor]) -> None:
    """Read a whole file of weights; check its checksums, and that the values of the given tensors are finite.

    `torch.load` checks neither. A file that was written without checksums (``set_crc32_options``) has 0 in their place;
    then only the values are checked.

    Parameters
    ----------
    path
        The file.
    index
        The tensors that must be finite, a part of the result of `read_index`.

    Raises
    ------
    UserError
        When an entry is damaged or a value is not finite. The message names the first such entry or tensor.
    """
    records = _records(path)
    checks = _has_checksums(records)
    tensors = {tensor.key: (name, tensor.kind) for name, tensor in index.items()}
    # Pages of a mapping would count as memory of this process.
    with path.open("rb") as file:
        for entry, record in records.items():
            crc = 0
            finite = True
            tensor, kind = tensors.get(entry, ("", ""))
            file.seek(record.start)
            for start in range(0, record.size, BLOCK):
                block = file.read(min(BLOCK, record.size - start))
                crc = zlib.crc32(block, crc)
                finite = finite and _all_finite(block, kind)
            if checks and crc != record.crc:
                raise _damaged(path, entry)
            if not finite:
                raise UserError(
                    f"{path}: {tensor} holds values that are NaN or infinite, so no embedding could be right; expected "
                    f"finite weights. {AGAIN}"
                )


def _records(path: Path) -> dict[str, _Record]:
    """Return the position of each entry of the archive. PyTorch compresses no entry."""
    with path.open("rb") as file:
        begins_as_zip = file.read(4) == b"PK\x03\x04"
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            found = {}
            for info in infos:
                file.seek(info.header_offset)
                name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                start = info.header_offset + LOCAL_HEADER.size + name + extra
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise ValueError(f"{info.filename} is compressed")
                found[info.filename] = _Record(start, info.file_size, info.CRC)
        except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
            what = "is damaged or truncated" if begins_as_zip else "is not a file of weights that PyTorch saved"
            raise UserError(f"{path} {what} ({error}). {AGAIN}") from error
    return found


def _has_checksums(records: Mapping[str, _Record]) -> bool:
    return any(record.crc for record in records.values())


def _damaged(path: Path, entry: str) -> UserError:
    return UserError(f"{path} is damaged: the bytes of {entry} do not match the checksum in the file. {AGAIN}")


def _all_finite(block: bytes, kind: str) -> bool:
    values: npt.NDArray[Any]
    match kind:
        case "FloatStorage" | "DoubleStorage" | "HalfStorage":
            values = np.frombuffer(block, f"<f{ITEM_BYTES[kind]}", len(block) // ITEM_BYTES[kind])
            return bool(np.isfinite(values).all())
        case "BFloat16Storage":
            # Only NaN and infinity have all bits of the exponent set.
            values = np.frombuffer(block, "<u2", len(block) // 2)
            return bool(((values & 0x7F80) != 0x7F80).all())
        case _:
            return True


def _not_a_state_dict(path: Path, state: object) -> UserError:
    inner = [key for key, value in state.items() if isinstance(value, dict)] if isinstance(state, dict) else []
    if inner:
        # Lightning's Trainer saves such files, for example.
        key = "state_dict" if "state_dict" in inner else str(inner[0])[:50]
        return UserError(
            f"{path} holds a dictionary of dictionaries (a training checkpoint?); expected a dictionary of tensors by "
            f"name. Save only that: torch.save(torch.load(path, weights_only=True)[{key!r}], path)."
        )
    return UserError(f"{path} does not hold a dictionary of tensors by name, which was expected. {AGAIN}")
