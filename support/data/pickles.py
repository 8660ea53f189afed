"""Reads the pickles of CIFAR's Python versions without calling anything that they name.

A pickle is a program. Python's unpickler calls the functions that the program names, and with
hostile arguments, some functions of NumPy read memory outside their arrays. Here, a name only
selects a function of this module, and only the operations that create plain values and arrays are
supported.
"""

import io
import pickle

import numpy as np

MAX_OPERATIONS = 1_000_000  # more than twice as many as CIFAR-100's training file has
MAX_NAME_LENGTH = 100  # of keys, data types and functions
MAX_ARGUMENTS = 10  # of a function; also the dimensions of an array

_OPERATIONS = (
    "PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL"
)
_DATA_TYPES = {"u1", "u2", "u4", "u8", "i8"}  # of arrays, without the byte order


def _decode(text):
    """Returns a short string of Python 2 or 3 as a string. Raises ValueError for anything else."""
    # Hashing a deeply nested tuple would crash Python.
    if not isinstance(text, bytes | str) or len(text) > MAX_NAME_LENGTH:
        raise ValueError("it has something else where a short string belongs")
    return text.decode() if isinstance(text, bytes) else text


def _check_tuple(value):
    """Returns a short tuple. Raises ValueError for anything else, such as a million bytes."""
    if not isinstance(value, tuple) or len(value) > MAX_ARGUMENTS:
        raise ValueError("it has something else where a short tuple belongs")
    return value


class _Dict(dict):  # its keys are short strings
    def __setitem__(self, key, value):
        super().__setitem__(_decode(key), value)


class _DataType:
    """The data type of an array. The pickle first creates it, and then sets its byte order."""

    byte_order = "="

    def __init__(self, name):
        self.name = _decode(name)
        if self.name not in _DATA_TYPES:
            raise ValueError(f"it has an array whose type is none of {sorted(_DATA_TYPES)}")

    def set_state(self, _, byte_order, *__):
        self.byte_order = {"<": "<", ">": ">"}.get(_decode(byte_order), "=")


class _Array:
    """An array. The pickle first creates it, and then sets its `values`."""

    values = None

    def set_state(self, _, shape, data_type, is_fortran, data):
        if not all(isinstance(size, int) and size >= 0 for size in _check_tuple(shape)):
            raise ValueError("it has an array without a shape")  # -1 would mean any size
        values = np.frombuffer(data, data_type.byte_order + data_type.name)
        self.values = values.reshape(shape, order="F" if is_fortran else "C")


def _create_array(data, data_type, shape, order):
    array = _Array()
    array.set_state(None, shape, data_type, order == "F", data)
    return array


# What the names stand for: functions, because a pickle could change the attributes of classes.
_FUNCTIONS = {
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.numeric._frombuffer": _create_array,
    "numpy.dtype": lambda name, *_: _DataType(name),
    "numpy.ndarray": None,  # an argument of `_reconstruct`
}


class _Operations(dict):
    """The methods that run operations, by their codes. Limits the number of operations."""

    count = 0

    def __getitem__(self, code):
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise ValueError(f"it has more than {MAX_OPERATIONS:,} operations")
        if code not in self:
            raise ValueError(f"it uses the operation {bytes([code])!r}")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):  # the unpickler that is written in Python
    def __init__(self, content):
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._bytes_to_convert = len(content)
        codes = [getattr(pickle, name)[0] for name in _OPERATIONS.split()]
        self.dispatch = _Operations(
            {
                **{code: self.dispatch[code] for code in codes},
                pickle.EMPTY_DICT[0]: lambda self: self.append(_Dict()),
                pickle.REDUCE[0]: _Unpickler.load_reduce,
                pickle.BUILD[0]: _Unpickler.load_build,
                # The method for this operation would reserve memory in advance.
                pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
            }
        )

    def find_class(self, module, name):
        name = f"{module[:MAX_NAME_LENGTH]}.{name[:MAX_NAME_LENGTH]}"
        name = name.replace("numpy._core", "numpy.core")  # NumPy 2
        if name == "_codecs.encode":  # how Python 3 writes bytes for Python 2
            return self._encode
        if name not in _FUNCTIONS:
            raise ValueError(f"it calls {name}")
        return _FUNCTIONS[name]

    def _encode(self, text, _):
        self._bytes_to_convert -= len(text)
        if self._bytes_to_convert < 0:
            raise ValueError("it converts the same text again and again")
        return text.encode("latin-1")

    def load_reduce(self):
        arguments = _check_tuple(self.stack.pop())
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self):
        state = _check_tuple(self.stack.pop())
        self.stack[-1].set_state(*state)  # other values have no such method


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
    loaded = _Unpickler(content).load()
    if not isinstance(loaded, dict):
        raise ValueError("it is not a pickled dict")
    return {
        key: value.values if isinstance(value, _Array) else value for key, value in loaded.items()
    }
