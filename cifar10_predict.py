"""Tells what is on pictures: for each the three likeliest classes, with their probabilities.

    python cifar10_predict.py cat.png dog.jpg photos/
    python cifar10_predict.py --json photos/
    python cifar10_predict.py --export_dir=/tmp/cifar10_model/1

Any size and shape; PNG, JPEG, GIF, BMP and WebP. The newest checkpoint's moving averages predict,
and each picture goes the way of the test images. A picture that cannot be read is named on stderr;
the others go on, and the exit code is 1. --export_dir writes the model as a SavedModel.
"""

import contextlib
import json
import os
import sys
import tempfile
from typing import NamedTuple

import numpy as np
from absl import app, flags

import cifar10
import cifar10_data
import cifar10_input
import cifar10_pictures
from cifar10_restore import CheckpointError, read_newest_settings, restore_newest
from cifar10_runtime import UserError, check_new_folder, find_reason, run, session_config, tf
from cifar10_settings import find_settings

FLAGS = flags.FLAGS

flags.DEFINE_boolean("json", False, "Print a JSON object in a line for each picture.")
flags.DEFINE_string(
    "export_dir",
    None,
    "Folder to write the model to, as a SavedModel; it must not hold anything yet.",
)
flags.register_validator("export_dir", lambda value: value != "", "it must name a folder")

TOP = 3  # classes that are told of a picture


class _Model(NamedTuple):
    """A restored model.

    Attributes:
      session: `tf.Session`.
      pictures: placeholder, uint8 [n, 32, 32, 3].
      probabilities: float32 [n, classes].
      class_names: tuple of strings.
      checkpoint: string; the path of the checkpoint.
      step: int; its global step.
    """

    session: tf.Session
    pictures: tf.Tensor
    probabilities: tf.Tensor
    class_names: tuple
    checkpoint: str
    step: int


@contextlib.contextmanager
def open_model():
    """Gives the `_Model` that the flags name, as a context manager.

    Raises:
      UserError: there is no checkpoint, or it cannot be used.
    """
    trained = read_newest_settings()
    settings = find_settings(trained and trained.class_names)  # there need be no data set
    shape = [None, cifar10_data.HEIGHT, cifar10_data.WIDTH, cifar10_data.DEPTH]
    with tf.Graph().as_default(), tf.Session(config=session_config(FLAGS.use_fp16)) as session:
        pictures = tf.placeholder(tf.uint8, shape, name="images")
        images = cifar10_input.standardized_crops(pictures, settings.crop_size)
        logits = cifar10.inference(images, len(settings.class_names))
        probabilities = tf.nn.softmax(logits, name="probabilities")
        checkpoint, step = restore_newest(session, settings)
        yield _Model(session, pictures, probabilities, settings.class_names, checkpoint, step)


def read_in_batches(paths, size):
    """Reads pictures, `size` at a time.

    Args:
      paths: iterable of paths.
      size: int.

    Returns:
      Iterator of batches: lists of (path, uint8 [32, 32, 3] or the `PictureError` of reading it).
    """
    batch = []
    for path in paths:
        try:
            batch.append((path, cifar10_pictures.read_picture(path)))
        except cifar10_pictures.PictureError as error:
            batch.append((path, error))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def predict(model, batch):
    """Predicts the classes of pictures.

    Args:
      model: a `_Model`.
      batch: uint8 [n, 32, 32, 3].

    Returns:
      For each picture its TOP classes, the likeliest first, as (name, probability).

    Raises:
      CheckpointError: the model gives probabilities that are not finite.
    """
    probabilities = model.session.run(model.probabilities, {model.pictures: batch})
    if not np.isfinite(probabilities).all():
        raise CheckpointError(f"{model.checkpoint} gives probabilities that are not finite")
    return [
        [(model.class_names[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:TOP]]
        for row in probabilities
    ]


def predict_files(model, paths, batch_size, as_json):
    """Prints what is on pictures, a line each, in their order.

    Args:
      model: a `_Model`.
      paths: iterable of paths of pictures.
      batch_size: int; how many are read and predicted at a time.
      as_json: bool; print JSON objects.

    Raises:
      UserError: some could not be read; the others are printed.
    """
    count = unreadable = 0
    for batch in read_in_batches(paths, batch_size):
        pictures = [result for _, result in batch if isinstance(result, np.ndarray)]
        predictions = iter(predict(model, np.stack(pictures)) if pictures else [])
        for path, result in batch:
            count += 1
            if isinstance(result, cifar10_pictures.PictureError):
                unreadable += 1
                print(result, file=sys.stderr, flush=True)
                found = {"error": str(result)}
            else:
                found = {"predictions": next(predictions)}
            if as_json:
                _print_json(model, path, **found)
            elif "predictions" in found:
                shares = ", ".join(f"{name} {share:.3f}" for name, share in found["predictions"])
                print(f"{cifar10_pictures.make_printable(path)}: {shares}", flush=True)
    if unreadable:
        raise UserError(f"{unreadable} of {count} could not be read")


def _print_json(model, path, predictions=None, error=None):
    line = {"picture": path}
    if error is not None:
        line["error"] = error
    else:
        line["predictions"] = [{"class": name, "probability": p} for name, p in predictions]
        line |= {"checkpoint": model.checkpoint, "step": model.step}
    print(json.dumps(line), flush=True)


def export(model, export_dir):
    """Writes a model as a SavedModel with the signature `serving_default`.

    It takes `images`, uint8 [n, 32, 32, 3], and gives `probabilities`, float32 [n, classes];
    `classes`, int64 [n], the number of each image's likeliest class; and `class_names`, string
    [n, classes], the names that the probabilities belong to, once for each image, as servers want
    an answer a row.

    Args:
      model: a `_Model`.
      export_dir: path; it may be there already if it is empty.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    check_new_folder("--export_dir", export_dir)
    names = tf.constant([model.class_names])
    signature = tf.saved_model.predict_signature_def(
        {"images": model.pictures},
        {
            "probabilities": model.probabilities,
            "classes": tf.argmax(model.probabilities, axis=1),
            "class_names": tf.tile(names, [tf.shape(model.pictures)[0], 1]),
        },
    )
    parent, name = os.path.split(os.path.abspath(export_dir))
    try:
        os.makedirs(parent, exist_ok=True)
        # It gets its name when it is whole. A folder of that name that is not empty stays.
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent) as folder:
            staging = os.path.join(folder, name)
            os.mkdir(staging)
            builder = tf.saved_model.Builder(staging)
            builder.add_meta_graph_and_variables(
                model.session,
                [tf.saved_model.SERVING],
                {tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: signature},
                clear_devices=True,
                strip_default_attrs=True,
            )
            builder.save()
            os.rename(staging, export_dir)
    # ValueError is the Saver's name for a folder that is gone.
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise UserError(f"cannot write --export_dir={export_dir}: {find_reason(error)}") from error


def main(paths):
    if not paths and FLAGS.export_dir is None:
        raise app.UsageError("name pictures, folders of pictures, or --export_dir")
    if FLAGS.export_dir is not None:
        check_new_folder("--export_dir", FLAGS.export_dir)  # before anything is done in vain
    with open_model() as model:
        if FLAGS.export_dir is not None:
            export(model, FLAGS.export_dir)
            print(
                f"{FLAGS.export_dir} holds the model of {model.checkpoint}, step {model.step}",
                file=sys.stderr,
            )
        pictures = cifar10_pictures.find_pictures(paths)
        predict_files(model, pictures, FLAGS.batch_size, FLAGS.json)


if __name__ == "__main__":
    run(main, takes_arguments=True)
