"""Tests of record files: their layout, and changes to them while they are read."""

import os

import pytest
from conftest import write_dataset

from support.base.errors import DataError
from support.data import records

FILES = [*records.TRAIN_FILES, *records.TEST_FILES]


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path)
    return tmp_path


def test_a_change_to_a_file_in_use_is_detected(folder):
    detector = records.ChangeDetector(folder, eval_data=False)
    detector.check()
    (folder / "test_batch.bin").unlink()  # not one of the training files
    detector.check()
    content = bytearray((folder / FILES[2]).read_bytes())
    content[-1] ^= 1  # a single bit of the last pixel
    (folder / FILES[2]).write_bytes(content)
    set_other_time(folder / FILES[2])
    with pytest.raises(DataError, match="data_batch_3.bin was modified after the script started"):
        detector.check()
    os.truncate(folder / FILES[1], (folder / FILES[1]).stat().st_size - 3073)
    with pytest.raises(DataError, match="data_batch_2.bin was modified after the script started"):
        detector.check()
    (folder / FILES[1]).unlink()
    with pytest.raises(DataError, match="data_batch_2.bin can no longer be read .No such file"):
        detector.check()


def set_other_time(path):
    """Changes the time of modification, regardless of the resolution of the clock."""
    os.utime(path, (0, 0))


def test_a_file_that_was_touched_or_copied_without_a_change_of_its_content_is_accepted(
    folder, monkeypatch
):
    detector = records.ChangeDetector(folder, eval_data=False)
    set_other_time(folder / FILES[2])
    content = (folder / FILES[1]).read_bytes()
    (folder / FILES[1]).unlink()
    (folder / FILES[1]).write_bytes(content)
    set_other_time(folder / FILES[1])
    detector.check()

    def fail(path):
        raise AssertionError(f"{path} was read again, although it has not changed since")

    monkeypatch.setattr("builtins.open", fail)
    detector.check()
    monkeypatch.undo()
    # The new time does not hide a later change.
    (folder / FILES[2]).write_bytes(bytes((folder / FILES[2]).stat().st_size))
    with pytest.raises(DataError, match="data_batch_3.bin was modified after the script started"):
        detector.check()
