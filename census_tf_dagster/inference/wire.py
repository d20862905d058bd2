"""Sends and receives messages between a shard's process and its device processes.

A message is a JSON header, then the bytes of arrays. What messages mean belongs in `devices` and `device_process`.
"""

import json
import struct
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Header = dict[str, Any]
AnyArray = npt.NDArray[Any]
_LENGTH = struct.Struct("<I")


def send(stream: BinaryIO, header: Header, *arrays: AnyArray) -> None:
    """Write a message.

    Raises
    ------
    BrokenPipeError
        When the other side has closed.
    """
    described = [[array.dtype.str, list(array.shape)] for array in arrays]
    content = json.dumps({**header, "arrays": described}).encode()
    _write(stream, memoryview(_LENGTH.pack(len(content)) + content))
    for array in arrays:
        if array.size:
            _write(stream, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def receive(stream: BinaryIO) -> tuple[Header, list[AnyArray]] | None:
    """Read a message; None when the other side has closed."""
    length = bytearray(_LENGTH.size)
    if not _read(stream, memoryview(length)):
        return None
    content = bytearray(_LENGTH.unpack(length)[0])
    if not _read(stream, memoryview(content)):
        return None
    header = json.loads(content)
    arrays: list[AnyArray] = []
    for dtype, shape in header.pop("arrays"):
        array = np.empty(shape, dtype)
        if array.size and not _read(stream, array.reshape(-1).view(np.uint8).data):
            return None
        arrays.append(array)
    return header, arrays


def _write(stream: BinaryIO, content: memoryview) -> None:
    while len(content):
        content = content[stream.write(content) :]


def _read(stream: BinaryIO, into: memoryview) -> bool:
    """Fill a buffer; return False at the end of the stream."""
    while len(into):
        n = stream.readinto(into)  # type: ignore[attr-defined]
        if not n:
            return False
        into = into[n:]
    return True
