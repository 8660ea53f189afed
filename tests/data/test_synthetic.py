"""Tests of the synthetic dataset."""

import os
import time

import numpy as np
from conftest import write_dataset

from support.data import dataset, records, synthetic

FILES = [*records.TRAIN_FILES, *records.TEST_FILES]


def read_records(data_dir, name):
    path = data_dir / dataset.SYNTHETIC_FOLDER / name
    return np.fromfile(path, np.uint8).reshape(-1, records.RECORD_BYTES)


def test_the_dataset_is_generated_once_within_five_seconds_alongside_another_one(tmp_path):
    write_dataset(tmp_path / dataset.EXTRACTED_FOLDER)
    start = time.monotonic()
    folder = synthetic.maybe_generate(tmp_path)
    assert time.monotonic() - start < 5
    dataset.check_dataset(folder)
    assert sorted(os.listdir(tmp_path)) == [dataset.EXTRACTED_FOLDER, dataset.SYNTHETIC_FOLDER]
    assert records.count_records(tmp_path / dataset.EXTRACTED_FOLDER, eval_data=True) == 11
    before = os.stat(f"{folder}/test_batch.bin")
    synthetic.maybe_generate(tmp_path)
    assert os.stat(f"{folder}/test_batch.bin").st_mtime_ns == before.st_mtime_ns


def test_all_classes_are_equally_frequent_and_all_images_differ(synthetic_data_dir):
    records = np.concatenate([read_records(synthetic_data_dir, name) for name in FILES])
    counts = np.bincount(records[:, 0])
    assert counts.tolist() == [len(records) // 10] * 10
    assert len(np.unique(records[:, 1:], axis=0)) == len(records)


def test_the_bytes_are_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "RECORDS_PER_FILE", 50)
    for name in ("a", "b"):
        synthetic.maybe_generate(tmp_path / name)
    for name in FILES:
        np.testing.assert_array_equal(*(read_records(tmp_path / folder, name) for folder in "ab"))
