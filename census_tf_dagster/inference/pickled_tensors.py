"""Reads the description of tensors in a pickled state dict without unpickling it: no code of the pickle runs.

Reading the values belongs in `torch_file`.
"""

import pickletools
import re
from dataclasses import dataclass
from typing import Any

NAMES = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""All names that the pickle of a state dict may contain."""
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class ForeignNameError(ValueError):
    """The pickle contains a name that does not belong to tensors."""


@dataclass(frozen=True)
class PickledTensor:
    """A tensor, as the pickle describes it.

    Attributes
    ----------
    shape
        Shape of the tensor.
    kind
        PyTorch's name of its storage class, which gives the dtype, such as ``FloatStorage``.
    key
        Name of the storage: the values are in the archive's entry ``data/<key>``.
    values
        Length of the storage, in values of that dtype.
    """

    shape: tuple[int, ...]
    kind: str
    key: str
    values: int


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    values: int


_MARK = object()


def describe(content: bytes) -> Any:
    """Return what a pickle describes: dictionaries, lists and values as they are, tensors as `PickledTensor`.

    Raises
    ------
    ForeignNameError
        When it contains a name that does not belong to tensors.
    ValueError, LookupError, TypeError, AttributeError
        When it is not a pickle, or not one that `torch.save` writes for a state dict.
    """
    operations = list(pickletools.genops(content))
    names = {str(argument) for operation, argument, _ in operations if operation.name in ("GLOBAL", "INST")}
    foreign = sorted(name for name in names if not NAMES.fullmatch(name))
    foreign += sorted({operation.name for operation, _, _ in operations if operation.name == "STACK_GLOBAL"})
    if foreign:
        raise ForeignNameError(", ".join(foreign[:3])[:200])
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in operations:
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (result,) = stack
                return result
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case "BINPUT" | "LONG_BINPUT":
                memo[_whole(argument)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_whole(argument)])
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL":
                stack.append(_Name(str(argument)))
            case "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                parts = [stack.pop() for _ in range(int(operation.name[-1]))]
                stack.append(tuple(reversed(parts)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduced(function.name, arguments))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = _since_mark(stack)
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                pairs = _since_mark(stack)
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "BUILD":
                # A state dict also contains the versions of modules, which are not needed.
                stack.pop()
            case name:
                raise ValueError(f"unexpected operation {name}")
    raise ValueError("it has no end")


def _since_mark(stack: list[Any]) -> list[Any]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _storage(found: Any) -> _Storage:
    word, kind, key, _, values = found
    if word != "storage" or not isinstance(key, str):
        raise ValueError(f"unexpected storage {found!r}"[:200])
    return _Storage(kind.name.removeprefix("torch "), key, _whole(values))


def _reduced(name: str, arguments: Any) -> Any:
    match name.rpartition(" ")[2]:
        case "OrderedDict":
            if arguments:
                raise ValueError("unexpected arguments of OrderedDict")
            return {}
        case "_rebuild_parameter":
            return arguments[0]
        case "_rebuild_tensor_v2":
            storage, offset, size, stride = arguments[:4]
            shape = tuple(map(_whole, size))
            last = _whole(offset) + sum((n - 1) * _whole(step) for n, step in zip(shape, stride, strict=True))
            if all(shape) and last >= storage.values:
                raise ValueError("a tensor is larger than its storage")
            return PickledTensor(shape, storage.kind, storage.key, storage.values)
        case other:
            raise ValueError(f"unexpected call of {other}")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"unexpected size {value!r}"[:200])
    return value
