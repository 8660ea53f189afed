"""Predictions against NumPy's model and against evaluation; exports, loaded as others load them."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import numpy_model
import pytest
from absl import app, flags
from conftest import (
    AVERAGED,
    RAW,
    ROOT,
    draw_patches,
    make_records,
    pixels,
    run_script,
    running_queues,
    save_checkpoint,
    standardized_centers,
    write_data_set,
)
from PIL import Image

import cifar10
import cifar10_data
import cifar10_predict
import cifar10_restore
from cifar10_runtime import UserError, tf
from cifar10_settings import Settings

FLAGS = cifar10_predict.FLAGS


@pytest.fixture
def records(tmp_path):
    """Records that differ; the flags name a checkpoint, and a folder `data` that is not there."""
    FLAGS.checkpoint_dir = str(tmp_path / "train")
    FLAGS.data_dir = str(tmp_path / "data")
    save_checkpoint(FLAGS.checkpoint_dir, 7)
    records = make_records(30)
    draw_patches(records, np.random.default_rng(8))
    return records


@pytest.fixture
def pictures(tmp_path, records):
    """The same records as a folder of PNGs, named in order."""
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(pixels(records)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number:02}.png")
    return tmp_path / "pictures"


def probabilities_by_numpy(records, seed=AVERAGED, crop_size=24):
    variables = numpy_model.random_variables(seed)
    logits = numpy_model.inference(standardized_centers(records, crop_size), variables)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def predicted(capsys, *paths):
    """Returns the JSON objects that the script prints."""
    FLAGS.json = True
    cifar10_predict.main([str(path) for path in paths])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("batch_size", [1, 7, 128])
@pytest.mark.parametrize(("averages", "seed"), [(True, AVERAGED), (False, RAW)])
def test_predictions_are_numpys_three_likeliest(
    records, pictures, capsys, batch_size, averages, seed
):
    FLAGS.batch_size = batch_size
    FLAGS.use_moving_averages = averages
    lines = predicted(capsys, pictures)
    assert [line["picture"] for line in lines] == [f"{pictures}/{n:02}.png" for n in range(30)]
    for line, expected in zip(lines, probabilities_by_numpy(records, seed), strict=True):
        best = np.argsort(-expected)[:3]
        found = line["predictions"]
        assert [p["class"] for p in found] == [cifar10_data.CLASS_NAMES[i] for i in best]
        assert [p["probability"] for p in found] == pytest.approx(expected[best], rel=1e-3)
        assert line["checkpoint"] == f"{FLAGS.checkpoint_dir}/model.ckpt-7"
        assert line["step"] == 7
    orders = {tuple(p["class"] for p in line["predictions"]) for line in lines}
    assert len(orders) > 3


def test_a_line_tells_the_picture_and_three_classes_with_probabilities(records, pictures, capsys):
    cifar10_predict.main([str(pictures / "03.png")])
    output = capsys.readouterr()
    expected = probabilities_by_numpy(records)[3]
    shares = ", ".join(
        f"{cifar10_data.CLASS_NAMES[i]} {expected[i]:.3f}" for i in np.argsort(-expected)[:3]
    )
    assert output.out == f"{pictures / '03.png'}: {shares}\n"
    assert output.err == ""


def test_an_unreadable_picture_is_named_and_the_others_go_on(pictures, capsys):
    (pictures / "05.png").write_text("no picture")
    (pictures / "00.png").unlink()
    FLAGS.batch_size = 4
    with pytest.raises(UserError, match="2 of 30 could not be read"):
        cifar10_predict.main([str(pictures / "00.png"), str(pictures)])
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 28
    assert "05.png" not in output.out
    first, second = output.err.splitlines()
    assert first == f"{pictures / '00.png'}: there is no such file"
    assert second.startswith(f"{pictures / '05.png'}: it is not a PNG")


def test_an_unreadable_picture_is_an_object_with_its_error_for_machines(pictures, capsys):
    (pictures / "01.png").write_text("no picture")
    FLAGS.json = True
    with pytest.raises(UserError, match="1 of 2 could not be read"):
        cifar10_predict.main([str(pictures / "01.png"), str(pictures / "02.png")])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first.keys() == {"picture", "error"}
    assert "it is not a PNG" in first["error"]
    assert second["picture"] == str(pictures / "02.png")


@pytest.mark.parametrize("count", [2, 10, 14])
def test_classes_are_those_that_the_checkpoint_was_trained_on(pictures, capsys, count):
    names = tuple(f"noted {n}" for n in range(count))
    save_checkpoint(FLAGS.checkpoint_dir, 8, Settings(names, 25))
    (line,) = predicted(capsys, pictures / "00.png")
    found = [p["class"] for p in line["predictions"]]
    assert len(found) == min(count, 3)
    assert set(found) <= set(names)
    with cifar10_predict.open_model() as model:
        assert model.class_names == names
        assert model.probabilities.shape[1] == count


def test_where_a_checkpoint_does_not_tell_its_classes_they_are_the_data_sets(pictures, capsys):
    folder = FLAGS.data_dir + "/cifar-10-batches-bin"
    os.makedirs(folder)
    cifar10_data.write_class_names(folder, [f"own{n}" for n in range(10)])
    (line,) = predicted(capsys, pictures / "00.png")
    assert all(p["class"].startswith("own") for p in line["predictions"])


def test_a_checkpoint_that_a_trainer_removes_does_not_hide_the_classes_of_the_next(
    pictures, capsys, monkeypatch
):
    names = tuple(f"noted {n}" for n in range(10))
    for step in (8, 9):
        save_checkpoint(FLAGS.checkpoint_dir, step, Settings(names, 25))
    gone, newest = (f"{FLAGS.checkpoint_dir}/model.ckpt-{step}" for step in (8, 9))
    for name in os.listdir(FLAGS.checkpoint_dir):
        if name.startswith("model.ckpt-8"):
            os.remove(os.path.join(FLAGS.checkpoint_dir, name))
    found = iter([gone])
    monkeypatch.setattr(
        cifar10_restore, "find_latest_checkpoint", lambda folder: next(found, newest)
    )
    (line,) = predicted(capsys, pictures / "00.png")
    assert all(p["class"].startswith("noted") for p in line["predictions"])


def test_predicting_needs_no_data_set(pictures, capsys, tmp_path):
    save_checkpoint(FLAGS.checkpoint_dir, 8, Settings(tuple("abcdefghij"), 25))
    (tmp_path / "file").write_text("")
    FLAGS.data_dir = str(tmp_path / "file")
    (line,) = predicted(capsys, pictures / "00.png")
    assert {p["class"] for p in line["predictions"]} < set("abcdefghij")


def test_a_checkpoint_of_another_crop_is_refused_and_taken_where_the_flag_agrees(
    records, pictures, capsys
):
    settings = Settings(
        cifar10_data.CLASS_NAMES, 25, crop_size=22
    )  # its layers have the same sizes
    save_checkpoint(FLAGS.checkpoint_dir, 8, settings)
    with pytest.raises(
        UserError, match="--crop_size=22, not with --crop_size=24; give --crop_size=22"
    ):
        cifar10_predict.main([str(pictures / "00.png")])
    FLAGS.crop_size = 22
    (line,) = predicted(capsys, pictures / "00.png")
    (expected,) = probabilities_by_numpy(records[:1], crop_size=22)
    assert line["predictions"][0]["probability"] == pytest.approx(expected.max(), abs=1e-3)


def test_without_pictures_or_a_checkpoint_the_way_on_is_told(pictures):
    with pytest.raises(app.UsageError, match="name pictures"):
        cifar10_predict.main([])
    FLAGS.checkpoint_dir += "/none"
    with pytest.raises(UserError, match="there is no checkpoint in .*none; train first"):
        cifar10_predict.main([str(pictures)])


def test_a_checkpoint_that_a_trainer_deletes_meanwhile_is_given_up_for_the_newest(
    pictures, capsys, monkeypatch
):
    import cifar10_restore

    restore = cifar10_restore.restore

    def restore_after_the_trainer_moved_on(session, saver, checkpoint):
        if checkpoint.endswith("-7"):
            save_checkpoint(FLAGS.checkpoint_dir, 9)
            for name in os.listdir(FLAGS.checkpoint_dir):
                if name.startswith("model.ckpt-7."):
                    os.remove(os.path.join(FLAGS.checkpoint_dir, name))
        return restore(session, saver, checkpoint)

    monkeypatch.setattr(cifar10_restore, "restore", restore_after_the_trainer_moved_on)
    (line,) = predicted(capsys, pictures / "00.png")
    assert line["step"] == 9


def test_a_checkpoint_that_is_not_finite_predicts_nothing(pictures, monkeypatch):
    variables = numpy_model.random_variables(AVERAGED)
    variables["local4/weights"][3, 5] = np.nan
    monkeypatch.setattr(numpy_model, "random_variables", lambda *_: variables)
    save_checkpoint(FLAGS.checkpoint_dir, 8)
    with pytest.raises(UserError, match="ckpt-8 has values that are not finite, in local4/weights"):
        cifar10_predict.main([str(pictures)])
    variables["local4/weights"][3, 5] = 3e38  # finite, but what comes of it is not
    variables["local4/biases"][:] = 3e38
    save_checkpoint(FLAGS.checkpoint_dir, 9)
    with pytest.raises(UserError, match="ckpt-9 gives probabilities that are not finite"):
        cifar10_predict.main([str(pictures)])


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
"""


def load(export_dir, images, tmp_path):
    """Returns what an export gives for images, in a process that has TensorFlow alone."""
    np.save(tmp_path / "images.npy", images)
    process = subprocess.run(
        [sys.executable, "-c", LOAD, export_dir, tmp_path / "images.npy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert "oneDNN supports" not in process.stderr
    return json.loads(process.stdout)


def probabilities_of_evaluation(records, tmp_path):
    """Returns what evaluation's own graph gives for records that it reads."""
    folder = tmp_path / "data" / cifar10_data.EXTRACTED_FOLDER
    write_data_set(folder)
    records.tofile(folder / "test_batch.bin")
    FLAGS.batch_size = len(records)
    with tf.Graph().as_default():
        images, _ = cifar10.inputs(eval_data=True)
        probabilities = tf.nn.softmax(cifar10.inference(images))
        averages = tf.train.ExponentialMovingAverage(cifar10.MOVING_AVERAGE_DECAY)
        saver = tf.train.Saver(averages.variables_to_restore())
        with running_queues() as session:
            saver.restore(session, f"{FLAGS.checkpoint_dir}/model.ckpt-7")
            return session.run(probabilities)


def test_an_export_gives_the_evaluations_probabilities(records, tmp_path, capsys):
    FLAGS.export_dir = str(tmp_path / "new" / "export" / "1")
    cifar10_predict.main([])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"{FLAGS.export_dir} holds the model of {FLAGS.checkpoint_dir}/model.ckpt-7, step 7\n"
    )
    answer = load(FLAGS.export_dir, pixels(records), tmp_path)
    expected = probabilities_of_evaluation(records, tmp_path)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5, rtol=0)
    assert answer["classes"] == expected.argmax(axis=1).tolist()
    assert answer["class_names"] == [list(cifar10_data.CLASS_NAMES)] * len(records)
    assert "shape=(None, 32, 32, 3), dtype=tf.uint8, name='images'" in answer["inputs"]
    assert os.listdir(tmp_path / "new" / "export") == ["1"]


def test_predictions_are_the_evaluations_to_5_digits(records, pictures, tmp_path, capsys):
    lines = predicted(capsys, pictures)
    expected = probabilities_of_evaluation(records, tmp_path)
    found = [[p["probability"] for p in line["predictions"]] for line in lines]
    np.testing.assert_allclose(found, -np.sort(-expected, axis=1)[:, :3], atol=1e-5, rtol=0)


def test_an_export_never_overwrites(records, tmp_path):
    umask = os.umask(0o022)
    os.umask(umask)
    export_dir = tmp_path / "export"
    FLAGS.export_dir = f"{export_dir}/"
    export_dir.mkdir()  # empty, so nothing is lost
    (tmp_path / "export.part").mkdir()  # another's
    (tmp_path / "export.part" / "saved_model.pb").write_text("mine")
    cifar10_predict.main([])
    before = {path: path.read_bytes() for path in export_dir.rglob("*") if path.is_file()}
    assert len(before) == 3
    assert (tmp_path / "export.part" / "saved_model.pb").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".export")]
    assert export_dir.stat().st_mode & 0o777 == 0o777 & ~umask
    save_checkpoint(FLAGS.checkpoint_dir, 8)
    with pytest.raises(UserError, match="--export_dir=.*export/ is there already; name a new"):
        cifar10_predict.main([])
    assert before == {path: path.read_bytes() for path in export_dir.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    FLAGS.export_dir = str(tmp_path / "file")
    with pytest.raises(UserError, match="is there already"):
        cifar10_predict.main([])
    assert (tmp_path / "file").read_text() == "mine"
    FLAGS.export_dir = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot write --export_dir"):
        cifar10_predict.main([])


def test_an_export_that_appears_meanwhile_is_not_overwritten(records, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10_predict, "check_new_folder", lambda flag, folder: None)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "saved_model.pb").write_text("another's")
    FLAGS.export_dir = str(tmp_path / "export")
    with pytest.raises(UserError, match="cannot write --export_dir"):
        cifar10_predict.main([])
    assert (tmp_path / "export" / "saved_model.pb").read_text() == "another's"


@pytest.mark.slow
def test_exports_at_the_same_time_do_not_mix(records, tmp_path):
    arguments = [
        sys.executable,
        "cifar10_predict.py",
        f"--checkpoint_dir={FLAGS.checkpoint_dir}",
        f"--export_dir={tmp_path / 'export'}",
    ]
    processes = [
        subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1]
    (refused,) = [e for e, p in zip(errors, processes, strict=True) if p.returncode == 1]
    assert re.fullmatch("cifar10_predict.py: error: .*export.*\n", refused)
    assert len(load(str(tmp_path / "export"), pixels(records[:2]), tmp_path)["classes"]) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".export")]


def test_an_export_dir_must_be_named():
    with pytest.raises(flags.IllegalFlagValueError):
        FLAGS.export_dir = ""


def test_the_script_predicts_with_quiet_output_and_a_code(records, pictures):
    arguments = ("cifar10_predict.py", f"--checkpoint_dir={FLAGS.checkpoint_dir}", pictures)
    process = run_script(*arguments)
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert len(lines) == 30
    pattern = r"\S+/\d\d\.png: \w+ [01]\.\d{3}, \w+ [01]\.\d{3}, \w+ [01]\.\d{3}"
    assert all(re.fullmatch(pattern, line) for line in lines)
    (pictures / "strange\udcff.png").write_text("no picture")
    Image.new("RGB", (9, 9)).save(pictures / "two\nlines.png")
    process = run_script(*arguments, check=False)
    assert process.returncode == 1
    assert process.stdout.splitlines()[:-1] == lines
    assert process.stdout.splitlines()[-1].startswith(f"{pictures}/two\\nlines.png: ")
    named, last = process.stderr.splitlines()
    assert "strange\\udcff.png: it is not a PNG" in named
    assert last == "cifar10_predict.py: error: 1 of 32 could not be read"
    process = run_script("cifar10_predict.py", check=False)
    assert process.returncode == 1
    assert "name pictures, folders of pictures, or --export_dir" in process.stderr
