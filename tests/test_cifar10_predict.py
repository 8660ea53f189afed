"""Predictions match NumPy's model; exports load without this project."""

import json
import os
import re

import numpy as np
import numpy_model
import pytest
from absl import app, flags
from conftest import (
    AVERAGED,
    RAW,
    draw_patches,
    make_records,
    messages,
    pixels,
    run_script,
    save_checkpoint,
    standardized_centers,
)
from PIL import Image

import cifar10_input
import cifar10_predict
from support.base import files
from support.base.errors import UserError
from support.data import dataset
from support.data.settings import TrainingSettings

FLAGS = cifar10_predict.FLAGS


@pytest.fixture
def records(tmp_path):
    """Records, and flags that name a checkpoint and a `--data_dir` that does not exist."""
    FLAGS.checkpoint_dir = str(tmp_path / "train")
    FLAGS.data_dir = str(tmp_path / "data")
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    records = make_records(30)
    draw_patches(records)
    return records


@pytest.fixture
def images(tmp_path, records):
    """A folder with the images of the same records in the same order, as PNG files."""
    folder = tmp_path / "images[1] ?*猫"
    folder.mkdir()
    for number, image in enumerate(pixels(records)):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return folder


def run_main(*paths):
    cifar10_predict.main(["cifar10_predict.py", *map(str, paths)])


def printed_objects(capsys, *paths):
    """Returns the JSON objects that the script prints for images."""
    FLAGS.json = True
    run_main(*paths)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def expected_probabilities(records, seed=AVERAGED, crop_size=24):
    """Returns the probabilities according to NumPy's model: [n, 10]."""
    variables = numpy_model.random_variables(seed)
    logits = numpy_model.inference(standardized_centers(records, crop_size), variables)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("batch_size", "averages", "seed"), [(7, True, AVERAGED), (128, False, RAW)]
)
def test_the_three_most_likely_classes_match_numpy(
    records, images, capsys, batch_size, averages, seed
):
    FLAGS.batch_size = batch_size
    FLAGS.use_moving_averages = averages
    objects = printed_objects(capsys, images)
    assert [o["picture"] for o in objects] == [f"{images}/{n:02}.png" for n in range(30)]
    for found, expected in zip(objects, expected_probabilities(records, seed), strict=True):
        best = np.argsort(-expected)[:3]
        predictions = found["predictions"]
        assert [p["class"] for p in predictions] == [dataset.CLASS_NAMES[i] for i in best]
        assert [p["probability"] for p in predictions] == pytest.approx(expected[best], rel=1e-3)
        assert found["checkpoint"] == f"{FLAGS.checkpoint_dir}/model.ckpt-7"
        assert found["step"] == 7
    rankings = {tuple(p["class"] for p in found["predictions"]) for found in objects}
    assert len(rankings) > 3


@pytest.mark.parametrize(("top", "count"), [(1, 1), (0, 10), (99, 10)])
def test_as_many_classes_are_printed_as_top_says(records, images, capsys, top, count):
    FLAGS.top = top
    expected = expected_probabilities(records[:1])[0]
    best = np.argsort(-expected)[:count]
    run_main(images / "00.png")
    classes = ", ".join(f"{dataset.CLASS_NAMES[i]} {expected[i]:.3f}" for i in best)
    assert capsys.readouterr() == (f"{images / '00.png'}: {classes}\n", "")
    (found,) = printed_objects(capsys, images / "00.png")
    assert [p["class"] for p in found["predictions"]] == [dataset.CLASS_NAMES[i] for i in best]


def test_unreadable_images_are_reported_and_the_others_are_classified(images, capsys):
    (images / "05.png").write_text("not an image")
    for name in ("04.txt", "README"):
        (images / name).write_text("not an image")
    (images / "00.png").unlink()
    FLAGS.batch_size, FLAGS.json = 4, True
    with pytest.raises(UserError, match="2 of 30 images could not be read"):
        run_main(images / "00.png", images)
    output = capsys.readouterr()
    first, second, last = output.err.splitlines()
    assert first == f"{images / '00.png'}: it cannot be read (No such file or directory)"
    assert second.startswith(f"{images / '05.png'}: it is not a PNG")
    assert last == "Skipped files that are not readable PNG, JPEG, GIF, BMP or WebP images: 2"
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert lines[0] == {"picture": str(images / "00.png"), "error": first}
    assert lines[5] == {"picture": str(images / "05.png"), "error": second}
    assert lines[6]["picture"] == str(images / "06.png")


@pytest.mark.parametrize("count", [2, 14])
def test_the_classes_are_those_of_the_checkpoint_even_if_the_dataset_is_damaged(
    images, tmp_path, capsys, count
):
    names = [f"recorded {n}" for n in range(10, 10 + count)]
    save_checkpoint(FLAGS.checkpoint_dir, 8, TrainingSettings(tuple(names), 25))
    FLAGS.data_dir = str(tmp_path)
    (tmp_path / "test_batch.bin").touch()
    (tmp_path / "batches.meta.txt").write_text("cat\ncat\n")
    FLAGS.top = 0
    (found,) = printed_objects(capsys, images / "00.png")
    assert sorted(p["class"] for p in found["predictions"]) == names


def test_if_a_checkpoint_does_not_record_its_classes_those_of_the_dataset_are_used(images, capsys):
    folder = FLAGS.data_dir + "/cifar-10-batches-bin"
    os.makedirs(folder)
    dataset.write_class_names(folder, [f"own{n}" for n in range(10)])
    (found,) = printed_objects(capsys, images / "00.png")
    assert all(p["class"].startswith("own") for p in found["predictions"])


def test_an_edit_of_the_central_crops_changes_the_prediction(records, images, capsys, monkeypatch):
    before = printed_objects(capsys, images)
    crops = cifar10_input.central_crops
    monkeypatch.setattr(cifar10_input, "central_crops", lambda images: -crops(images))
    assert printed_objects(capsys, images) != before


def test_a_checkpoint_of_another_crop_size_needs_the_same_flag(records, images, capsys):
    # With 22, the layers have the same sizes as with 24.
    settings = TrainingSettings(dataset.CLASS_NAMES, 25, crop_size=22)
    save_checkpoint(FLAGS.checkpoint_dir, 8, settings)
    message = "--crop_size=22, not with --crop_size=24; use --crop_size=22"
    with pytest.raises(UserError, match=message):
        run_main(images / "00.png")
    FLAGS.crop_size = 22
    (found,) = printed_objects(capsys, images / "00.png")
    (expected,) = expected_probabilities(records[:1], crop_size=22)
    assert found["predictions"][0]["probability"] == pytest.approx(expected.max(), abs=1e-3)


def test_without_images_or_a_checkpoint_the_error_says_what_to_do(images):
    with pytest.raises(app.UsageError, match="specify images or folders of images"):
        run_main()
    FLAGS.checkpoint_dir += "/none"
    with pytest.raises(UserError, match="there is no checkpoint in .*none; train first"):
        run_main(images)


def test_a_checkpoint_that_is_not_finite_predicts_nothing(images, monkeypatch):
    variables = numpy_model.random_variables(AVERAGED)
    variables["local4/weights"][3, 5] = np.nan
    monkeypatch.setattr(numpy_model, "random_variables", lambda *_: variables)
    save_checkpoint(FLAGS.checkpoint_dir, 8)
    with pytest.raises(UserError, match="ckpt-8 has non-finite values in local4/weights"):
        run_main(images)
    variables["local4/weights"][3, 5] = 3e38  # finite, but the activations overflow
    variables["local4/biases"][:] = 3e38
    save_checkpoint(FLAGS.checkpoint_dir, 9)
    with pytest.raises(UserError, match="ckpt-9 produces non-finite probabilities"):
        run_main(images)


def test_predict_takes_arrays_and_lists_of_images_only(records):
    FLAGS.fast_ops = False  # TensorFlow's own layers refuse empty batches
    images = pixels(records)[:3]
    with cifar10_predict.open_model() as model:
        expected = cifar10_predict.predict(model, images)
        assert len(expected) == 3
        assert cifar10_predict.predict(model, list(images)) == expected
        assert cifar10_predict.predict(model, images[:0]) == []
        assert cifar10_predict.predict(model, []) == []
        for wrong in (images / 255, images / 127.5 - 1, images.astype(np.int64), images[0]):
            with pytest.raises(UserError, match="^images must be uint8"):
                cifar10_predict.predict(model, wrong)


LOAD = """
import json, sys, numpy, tensorflow
model = tensorflow.saved_model.load(sys.argv[1])
images = tensorflow.constant(numpy.load(sys.argv[2]))
answer = model.signatures["serving_default"](images=images)
answer = {name: value.numpy() for name, value in answer.items()}
print(json.dumps({
    "probabilities": answer["probabilities"].tolist(),
    "classes": answer["classes"].tolist(),
    "class_names": [[name.decode() for name in row] for row in answer["class_names"]],
    "inputs": str(model.signatures["serving_default"].structured_input_signature[1]),
}))
for wrong in (images / 255, tensorflow.zeros([1, 64, 64, 3], tensorflow.uint8)):
    try:
        model.signatures["serving_default"](images=wrong)
    except tensorflow.errors.InvalidArgumentError:
        continue
    sys.exit(f"no error for {wrong.dtype} {wrong.shape}")
"""


def load_and_call(export_dir, images, tmp_path):
    """Returns what an export gives for images, in a process that imports TensorFlow only."""
    np.save(tmp_path / "images.npy", images)
    process = run_script("-c", LOAD, export_dir, tmp_path / "images.npy", cwd=tmp_path)
    assert "oneDNN supports" not in process.stderr
    return json.loads(process.stdout)


def test_an_export_gives_the_probabilities_of_numpy(records, tmp_path, capsys):
    FLAGS.export_dir = str(tmp_path / "new" / "a?[b *käse猫" / "1")
    run_main()
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"Exported {FLAGS.checkpoint_dir}/model.ckpt-7 (step 7) to {FLAGS.export_dir}\n"
    )
    answer = load_and_call(FLAGS.export_dir, pixels(records), tmp_path)
    expected = expected_probabilities(records)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5, rtol=0)
    assert answer["classes"] == expected.argmax(axis=1).tolist()
    assert answer["class_names"] == [list(dataset.CLASS_NAMES)] * len(records)
    assert "shape=(None, 32, 32, 3), dtype=tf.uint8, name='images'" in answer["inputs"]
    assert os.listdir(os.path.dirname(FLAGS.export_dir)) == ["1"]


@pytest.mark.parametrize("name", ["run[1]/1", "a\\b"])
def test_an_export_dir_from_which_tensorflow_could_not_load_is_refused(name):
    with pytest.raises(flags.IllegalFlagValueError, match="--export_dir=.*cannot load a model"):
        FLAGS.export_dir = name


def test_only_one_of_two_simultaneous_exports_succeeds(records, tmp_path, monkeypatch):
    FLAGS.export_dir = str(tmp_path / "export")
    lock = files.lock

    def wait_for_the_lock(*arguments, **options):
        monkeypatch.setattr(files, "lock", lock)
        run_main()  # what the other process does meanwhile
        return lock(*arguments, **options)

    monkeypatch.setattr(files, "lock", wait_for_the_lock)
    with pytest.raises(UserError, match="--export_dir=.*export already exists; choose a new"):
        run_main()
    assert sorted(os.listdir(FLAGS.export_dir)) == ["saved_model.pb", "variables"]


def test_the_script_prints_predictions_and_exits_with_1_if_an_image_is_unreadable(images):
    arguments = ("cifar10_predict.py", f"--checkpoint_dir={FLAGS.checkpoint_dir}", images)
    process = run_script(*arguments)
    assert messages(process.stderr) == []
    lines = process.stdout.splitlines()
    assert len(lines) == 30
    pattern = r".+/\d\d\.png: \w+ [01]\.\d{3}, \w+ [01]\.\d{3}, \w+ [01]\.\d{3}"
    assert all(re.fullmatch(pattern, line) for line in lines)
    (images / "strange\udcff.png").write_text("not an image")
    Image.new("RGB", (9, 9)).save(images / "two\nlines.png")
    process = run_script(*arguments, check=False)
    assert process.returncode == 1
    assert process.stdout.splitlines()[:-1] == lines
    assert process.stdout.splitlines()[-1].startswith(f"{images}/two\\nlines.png: ")
    unreadable, last = messages(process.stderr)
    assert "strange\\udcff.png: it is not a PNG" in unreadable
    assert last == "cifar10_predict.py: error: 1 of 32 images could not be read"
