"""What a checkpoint was trained for: written with it, and compared with what is asked of it.

TensorFlow saves a graph's collections in the `.meta` file of each checkpoint. One of them holds
these settings, so that they go wherever the checkpoint goes, and its variables stay the tutorial's.
"""

import json
from typing import NamedTuple

from absl import flags
from google.protobuf.message import DecodeError

import cifar10
import cifar10_input
from cifar10_runtime import UserError, tf

FLAGS = flags.FLAGS

COLLECTION = "cifar10_settings"  # of one string, a JSON object
LISTED_NAMES = 12  # classes that a message tells the names of, at most


class Settings(NamedTuple):
    """What was trained, and on what.

    The defaults are for a checkpoint that does not tell, as the original tutorial's.

    Attributes:
      class_names: tuple of strings; None where that is not known.
      examples_per_epoch: int; None where that is not known.
      crop_size: int; pixels.
      top_layers: string; a value of the flag.
      random_flip: bool.
    """

    class_names: tuple | None = None
    examples_per_epoch: int | None = None
    crop_size: int = cifar10_input.IMAGE_SIZE
    top_layers: str = "full"
    random_flip: bool = True


def find_settings(class_names=None):
    """Returns the `Settings` that the flags make, and the data set where no names are given."""
    return Settings(
        class_names=class_names or cifar10.find_class_names(),
        examples_per_epoch=cifar10.count_examples_per_epoch(),
        crop_size=FLAGS.crop_size,
        top_layers=FLAGS.top_layers,
        random_flip=FLAGS.random_flip,
    )


def note_settings(settings):
    """Has `Settings` written with the checkpoints of the default graph."""
    tf.add_to_collection(COLLECTION, json.dumps(settings._asdict()))


def read_settings(checkpoint):
    """Returns the `Settings` written with a checkpoint; None where its `.meta` file is gone.

    Raises:
      UserError: that file cannot be read, or they make no sense.
    """
    path = f"{checkpoint}.meta"
    try:
        with tf.gfile.GFile(path, "rb") as file:
            collections = tf.MetaGraphDef.FromString(file.read()).collection_def
        if COLLECTION not in collections:
            return Settings()
        (text,) = collections[COLLECTION].bytes_list.value
        return _check(Settings(**json.loads(text)))
    except tf.errors.NotFoundError:
        return None
    except (tf.errors.OpError, DecodeError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); without it, what the checkpoint was trained for is "
            "not checked: to do without, move it away"
        ) from error


def _check(settings):
    names, size = settings.class_names, settings.crop_size
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise ValueError("class_names are not a list of names")
    if not isinstance(size, int):
        raise ValueError("crop_size is not a number")
    return settings._replace(class_names=tuple(names))


def _describe(names):
    listed = [*names[:LISTED_NAMES], "..."] if len(names) > LISTED_NAMES else names
    return f"{len(names)} classes ({', '.join(listed)})"


def find_misfit(trained, wanted):
    """Compares what a checkpoint was trained for with what is asked of it.

    Args:
      trained: `Settings`, or None where they are not known.
      wanted: `Settings`.

    Returns:
      string; what does not fit, with both values and what to do about it; empty where all fits.
    """
    trained = trained or wanted
    if trained.class_names not in (None, wanted.class_names):
        return (
            f"has been trained on {_describe(trained.class_names)}, but the data set has "
            f"{_describe(wanted.class_names)}; name the data set that belongs to it, or a folder "
            "of another run"
        )
    for name in ("top_layers", "crop_size"):
        has, asked = getattr(trained, name), getattr(wanted, name)
        if has != asked:
            return (
                f"has been trained with --{name}={has}, not {asked}; give --{name}={has}, or name "
                "a folder of another run"
            )
    return ""


def find_changes(trained, wanted):
    """Returns what training may go on with although it was otherwise before: a list of strings.

    Arguments as for `find_misfit`.
    """
    changes = []
    if trained is not None:
        if trained.examples_per_epoch not in (None, wanted.examples_per_epoch):
            changes.append(
                f"an epoch has {wanted.examples_per_epoch} images now, and had "
                f"{trained.examples_per_epoch}"
            )
        if trained.random_flip != wanted.random_flip:
            changes.append(
                f"--random_flip is {str(wanted.random_flip).lower()} now, and was "
                f"{str(trained.random_flip).lower()}"
            )
    return changes
