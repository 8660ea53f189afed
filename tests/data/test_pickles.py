"""Tests of the reader of pickles: what it reads, and what damaged and hostile pickles cannot do."""

import pickle
import re
import time

import numpy as np
import pytest

from support.data import pickles

# What a pickle needs to create an array, after which BUILD sets its state.
DATA_TYPE = b"cnumpy\ndtype\n\x8c\x02u1K\x00K\x01\x87R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
TEXT = b"]\x8c\x80" + b"a" * 128 + b"\x94a"  # a list with a text that can be repeated
BATCH = {
    "labels": [3, 1, 2],
    "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
    b"names": ["a", b"b"],
    "counts": np.arange(-1, 2, dtype=">i8"),
    "order": np.asfortranarray(np.arange(6, dtype=np.uint16).reshape(2, 3)),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_plain_values_are_read(protocol):
    loaded = pickles.load_dict(pickle.dumps(BATCH, protocol))
    assert (loaded.pop("labels"), loaded.pop("names")) == ([3, 1, 2], ["a", b"b"])
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, BATCH[name])
        assert array.dtype == BATCH[name].dtype
    # The array that the hostile cases below damage.
    assert pickles.load_dict(array_of())["data"].tolist() == [97, 98, 99, 100]


def dict_of(value):
    """Returns a pickle of {"data": value} for the operations that create a value."""
    return b"\x80\x04}\x8c\x04data" + value + b"s."


def array_of(data_type=DATA_TYPE, shape=b"K\x04\x85", data=b"C\x04abcd"):
    return dict_of(ARRAY + b"(K\x01" + shape + data_type + b"\x89" + data + b"tb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array_of(DATA_TYPE.replace(b"u1", b"O8")), "an array whose type is none of"),
        # NumPy's own type would let this clear the flag of its objects.
        (
            array_of(DATA_TYPE + b"(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"),
            None,
        ),
        (array_of(shape=b"J\xff\xff\xff\xff\x85"), "an array without a shape"),
        (array_of(shape=b"K\x05\x85"), "cannot reshape"),
        # A call for which a million bytes would become a million arguments.
        (dict_of(ARRAY[:-8] + b"C\xff" + bytes(255) + b"R"), "where a short tuple belongs"),
        (array_of(shape=b"C\xff" + bytes(255)), "where a short tuple belongs"),
        (dict_of(ARRAY + b"C\xff" + bytes(255) + b"b"), "where a short tuple belongs"),
        (dict_of(b"cnumpy\nload\n\x8c\x01a\x85R"), "it calls numpy.load"),
        (dict_of(b"cnumpy\ndtype\n)b"), "no attribute 'set_state'"),
        # A tuple so deep that its hash would crash: the name of a type, a byte order, a key.
        (dict_of(b"cnumpy\ndtype\n)" + b"\x85" * 9_000 + b"R"), "where a short string belongs"),
        (array_of(DATA_TYPE + b"(K\x03)" + b"\x85" * 9_000 + b"tb"), "a short string belongs"),
        (b"\x80\x04})" + b"\x85" * 10_000 + b"K\x01s.", "where a short string belongs"),
        (dict_of(b"K\x01s\x8c\x65" + b"a" * 101 + b"K\x01"), "where a short string belongs"),
        (dict_of(TEXT + b"c_codecs\nencode\nh\x00h\x00\x86Ra" * 100), "converts the same text"),
        (b"\x80\x04}" + b"0" * 50_000 + b".", "it uses the operation b'0'"),
        (b"\x80\x04}" + b"]" * 50_000 + b".", "it has more than 20,000 operations"),
        (dict_of(b"\x96\xff\xff\xff\xff\x1f\x00\x00\x00"), None),  # 137 GB
        (b"", None),
    ],
)
def test_hostile_pickles_are_refused_or_harmless_at_once(content, message, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 20_000)
    start = time.process_time()
    if message is None:
        try:
            loaded = pickles.load_dict(content)
        except (ValueError, EOFError, pickle.UnpicklingError):
            loaded = {}
        assert all(isinstance(value, bytes | np.ndarray) for value in loaded.values())
    else:
        with pytest.raises(Exception, match=re.escape(message)):  # of any type
            pickles.load_dict(content)
    assert time.process_time() - start < 5
