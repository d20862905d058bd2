"""PyTorch's file of weights, read without PyTorch: which tensors it holds, and whether their bytes are whole.

The file is a zip archive. ``data.pkl`` in it is a pickle with each tensor's name, dtype and shape; ``data/<key>`` are
the values. Nothing of the file runs: `pickled_tensors` describes what the pickle would build.
"""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.pickled_tensors import ForeignNameError, PickledTensor, describe

AGAIN = "Get model_weights.pt again, for example by `transcriptformer download`."
ITEM_BYTES = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2}
"""Floating-point storages, which weights can be in, and the bytes of a value."""
LARGEST_INDEX = 2**26
"""Bytes of a pickle at most; that of a published checkpoint has about 50 kB."""
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""How a file begins that `torch.save` wrote before PyTorch 1.6, or was told to write so."""
LOCAL_FILE = b"PK\x03\x04"
"""How a zip archive begins that holds anything."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""The end of a zip entry's own header: the lengths of the name and of the extra field that follow."""
BLOCK = 2**24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the index describes it.

    Attributes
    ----------
    shape
        Its size.
    kind
        PyTorch's name of its storage, which says the dtype: ``FloatStorage``.
    entry
        The archive's entry with its values.
    """

    shape: tuple[int, ...]
    kind: str
    entry: str


@dataclass(frozen=True)
class _Record:
    """An entry of the archive: where its bytes are, and their CRC-32."""

    start: int
    size: int
    crc: int


def read_index(path: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a saved state dict, by name.

    Raises
    ------
    UserError
        When the file is cut short or damaged, in PyTorch's old format, or holds anything but a dictionary of tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(OLD_FORMAT))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected PyTorch's file of weights.") from error
    if head == OLD_FORMAT:
        raise UserError(
            f"{path} is in PyTorch's format of before 1.6; expected the zip format. Save it again: "
            f"`python -c \"import torch; torch.save(torch.load('{path}', weights_only=True), '{path}')\"`."
        )
    records = _records(path)
    if not head.startswith(LOCAL_FILE):
        # zipfile passes over it, PyTorch does not.
        raise UserError(f"{path} is damaged: something stands before its zip archive. {AGAIN}")
    indices = [name for name in records if name.endswith("/data.pkl")]
    if len(indices) != 1 or records[indices[0]].size > LARGEST_INDEX:
        raise UserError(f"{path} is a zip archive, but not one of PyTorch's with weights. {AGAIN}")
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
            f"{path} is a pickle that names {error}; only a dictionary of tensors may be in it, and it was not loaded. "
            "Get model_weights.pt from its publisher again."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged: the list of its tensors cannot be read ({str(error)[:200]}). {AGAIN}"
        ) from error
    found: dict[str, StoredTensor] = {}
    for name, tensor in state.items() if isinstance(state, dict) else [("", state)]:
        if not isinstance(tensor, PickledTensor) or not isinstance(name, str) or not name:
            raise _not_a_state_dict(path, state)
        entry = f"{prefix}data/{tensor.key}"
        if entry not in records or records[entry].size < tensor.values * ITEM_BYTES.get(tensor.kind, 1):
            raise UserError(f"{path} is damaged: the values of {name} are not in it, or not all. {AGAIN}")
        found[name] = StoredTensor(tensor.shape, tensor.kind, entry)
    return found


def require_whole(path: Path, index: Mapping[str, StoredTensor]) -> None:
    """Read all of a file of weights: its checksums must hold, and the values of some tensors be finite.

    `torch.load` looks at neither. A file that was written without checksums (``set_crc32_options``) has 0 in their
    place; then values are judged alone.

    Parameters
    ----------
    path
        The file.
    index
        The tensors that have to be finite, as `read_index` returned them.

    Raises
    ------
    UserError
        Naming the first entry that is damaged, or the first tensor with a value that is not finite.
    """
    records = _records(path)
    checks = _has_checksums(records)
    tensors = {tensor.entry: (name, tensor.kind) for name, tensor in index.items()}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for entry, record in records.items():
            crc = 0
            finite = True
            tensor, kind = tensors.get(entry, ("", ""))
            for start in range(record.start, record.start + record.size, BLOCK):
                block = content[start : min(start + BLOCK, record.start + record.size)]
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
    """Return where each entry of the archive is; PyTorch compresses none."""
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
            what = "is damaged or cut short" if begins_as_zip else "is no PyTorch file of weights"
            raise UserError(f"{path} {what} ({error}). {AGAIN}") from error
    return found


def _has_checksums(records: Mapping[str, _Record]) -> bool:
    return any(record.crc for record in records.values())


def _damaged(path: Path, entry: str) -> UserError:
    return UserError(f"{path} is damaged: the bytes of {entry} do not match the checksum kept with them. {AGAIN}")


def _all_finite(block: bytes, kind: str) -> bool:
    values: npt.NDArray[Any]
    match kind:
        case "FloatStorage" | "DoubleStorage" | "HalfStorage":
            values = np.frombuffer(block, f"<f{ITEM_BYTES[kind]}", len(block) // ITEM_BYTES[kind])
            return bool(np.isfinite(values).all())
        case "BFloat16Storage":
            # The exponent's bits are all set in NaN and infinity alone.
            values = np.frombuffer(block, "<u2", len(block) // 2)
            return bool(((values & 0x7F80) != 0x7F80).all())
        case _:
            return True


def _not_a_state_dict(path: Path, state: object) -> UserError:
    inner = [key for key, value in state.items() if isinstance(value, dict)] if isinstance(state, dict) else []
    if inner:
        # What Lightning's Trainer saves, for one.
        key = "state_dict" if "state_dict" in inner else str(inner[0])[:50]
        return UserError(
            f"{path} holds a dictionary of dictionaries (a training checkpoint?); expected the tensors themselves, by "
            f"name. Save those alone: torch.save(torch.load(path, weights_only=True)[{key!r}], path)."
        )
    return UserError(f"{path} does not hold a dictionary of tensors by name. {AGAIN}")
