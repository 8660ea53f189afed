"""Reads the pickles of CIFAR's Python versions without calling anything that they name.

A pickle is a program. Python's unpickler calls the functions that the program names, and with
hostile arguments, some functions of NumPy read memory outside their arrays. Here, names are only
compared, and only the operations that create plain values and arrays are supported.
"""

import io
import pickle

import numpy as np

MAX_OPERATIONS = 1_000_000  # more than twice as many as CIFAR-100's training file has

_OPERATIONS = (
    "PROTO MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL"
)
MAX_NAME_LENGTH = 100  # of a function, with its module
_DATA_TYPES = {"u1", "u2", "u4", "u8", "i8"}  # of arrays, without the byte order


class _Name(str):
    """What a pickle names, such as "numpy.ndarray"."""


class _DataType:
    """The data type of an array. The pickle first creates it, and then sets its byte order."""

    def __init__(self, name, *_):
        if _decode(name) not in _DATA_TYPES:
            raise ValueError(f"it has an array whose type is none of {sorted(_DATA_TYPES)}")
        self._name, self._byte_order = _decode(name), "="

    def set_state(self, _, byte_order, *__):
        self._byte_order = {"<": "<", ">": ">"}.get(_decode(byte_order), "=")

    def read(self, data, shape, order):
        """Returns the array in some bytes. Raises ValueError if they do not fit the shape."""
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError("it has an array without a shape")  # -1 would mean any size
        return np.frombuffer(data, self._byte_order + self._name).reshape(shape, order=order)


class _Array:
    """An array. The pickle first creates it, and then sets its `values`."""

    values = None

    def set_state(self, _, shape, data_type, is_fortran, data):
        self.values = data_type.read(data, shape, "F" if is_fortran else "C")


def _decode(text):
    if not isinstance(text, bytes | str):  # hashing a deeply nested tuple would crash Python
        raise ValueError("it has something else where a string belongs")
    return text.decode() if isinstance(text, bytes) else text


def _reduce(name, arguments):
    """Returns the stand-in for the result of a function that a pickle calls."""
    name = name.replace("numpy._core", "numpy.core") if isinstance(name, _Name) else ""  # NumPy 2
    if name == "numpy.core.multiarray._reconstruct":
        return _Array()
    if name == "numpy.core.numeric._frombuffer":
        array, (data, data_type, shape, order) = _Array(), arguments
        array.set_state(None, shape, data_type, order == "F", data)
        return array
    if name == "numpy.dtype":
        return _DataType(*arguments)
    if name == "_codecs.encode":  # how Python 3 writes bytes for Python 2
        return arguments[0].encode("latin-1")
    raise ValueError(f"it calls {name or 'something that it does not name'}")


class _CountedOperations(io.BytesIO):
    """A file that limits the number of operations, each of which starts with a read."""

    count = 0

    def read(self, size=-1):
        self.count += 1
        if self.count > 2 * MAX_OPERATIONS:  # most operations also read an argument
            raise ValueError(f"it has more than {MAX_OPERATIONS:,} operations")
        return super().read(size)


class _Operations(dict):
    """The methods that run operations, by their codes."""

    def __missing__(self, code):
        raise ValueError(f"it uses the operation {bytes([code])!r}")


def _code(name):
    return getattr(pickle, name)[0]


class _Unpickler(pickle._Unpickler):  # the unpickler that is written in Python
    def find_class(self, module, name):
        if len(module) + len(name) > MAX_NAME_LENGTH:
            raise ValueError("it has a name that is too long")
        return _Name(f"{module}.{name}")

    converted_bytes = 0
    max_bytes = None  # the size of the pickle

    def load_frame(self):
        self.read(8)  # the size of the frame, which is not needed

    def load_reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = value = _reduce(self.stack[-1], arguments)
        self.converted_bytes += len(value) if isinstance(value, bytes) else 0
        if self.converted_bytes > self.max_bytes:
            raise ValueError("it converts the same text again and again")

    def load_build(self):
        state = self.stack.pop()
        self.stack[-1].set_state(*state)  # other values have no such method

    def load_setitems(self):
        self._set_items(self.pop_mark())

    def load_setitem(self):
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def _set_items(self, items):
        keys = items[::2]
        if not all(isinstance(key, bytes | str) for key in keys):  # hashing nested tuples may crash
            raise ValueError("it has a key that is not a string")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    dispatch = _Operations(
        {
            **{code: pickle._Unpickler.dispatch[code] for code in map(_code, _OPERATIONS.split())},
            _code("BYTEARRAY8"): pickle._Unpickler.load_binbytes8,  # reserves no memory in advance
            _code("FRAME"): load_frame,
            _code("REDUCE"): load_reduce,
            _code("BUILD"): load_build,
            _code("SETITEM"): load_setitem,
            _code("SETITEMS"): load_setitems,
        }
    )


def load_dict(content):
    """Returns the dict in a pickle, with its keys as strings.

    Its values are numbers, bools, strings, bytes (also for the strings of Python 2), lists, tuples,
    dicts, None, and arrays of unsigned or 64-bit integers.

    Args:
      content: bytes; a pickle of protocol 2 or later.

    Raises:
      Exception: of any type, if the pickle is damaged or holds anything else.
    """
    if not content.startswith(pickle.PROTO):
        raise ValueError("it is not a pickle of protocol 2 or later")
    unpickler = _Unpickler(_CountedOperations(content), encoding="bytes")
    unpickler.max_bytes = len(content)
    loaded = unpickler.load()
    if not isinstance(loaded, dict):
        raise ValueError("it is not a pickled dict")
    return {
        _decode(key): value.values if isinstance(value, _Array) else value
        for key, value in loaded.items()
    }
