"""What a checkpoint was trained for: written with it, and compared with what is asked of it.

TensorFlow saves a graph's collections in the `.meta` file of each checkpoint. One of them holds
these settings, so that they go wherever the checkpoint goes, and its variables stay the tutorial's.
"""

import functools
import json
from typing import NamedTuple

from absl import flags
from google.protobuf.message import DecodeError

import cifar10
import cifar10_data
import cifar10_input
from cifar10_runtime import UserError, tf

FLAGS = flags.FLAGS

COLLECTION = "cifar10_settings"  # of one string, a JSON object


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
    tf.add_to_collection(COLLECTION, format_settings(settings))


def read_settings(checkpoint):
    """Returns the `Settings` written with a checkpoint; None where its `.meta` file is gone.

    Raises:
      UserError: that file cannot be read, or they make no sense.
    """
    path = f"{checkpoint}.meta"
    try:
        with tf.gfile.GFile(path, "rb") as file:
            meta_graph = tf.MetaGraphDef.FromString(file.read())
        if not meta_graph.HasField("graph_def"):
            raise ValueError("it holds no graph")  # an empty file does not, and can be parsed
        if COLLECTION not in meta_graph.collection_def:
            return Settings()
        (text,) = meta_graph.collection_def[COLLECTION].bytes_list.value
        return parse_settings(text)
    except tf.errors.NotFoundError:
        if tf.train.checkpoint_exists(checkpoint):  # else a trainer has removed all of it
            _warn_of_missing(path)
        return None
    except (tf.errors.OpError, DecodeError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); without it, what the checkpoint was trained for is "
            "not checked: to do without, move it away"
        ) from error


@functools.cache  # once is enough
def _warn_of_missing(path):
    tf.logging.warning(
        "%s is missing: what this checkpoint was trained for is not known, and not checked.", path
    )


def format_settings(settings):
    """Returns `Settings` as a string, for `parse_settings`."""
    return json.dumps(settings._asdict())


def parse_settings(text):
    """Returns the `Settings` in a string. Raises ValueError or TypeError where there are none."""
    settings = Settings(**json.loads(text))
    for (name, value), kind in zip(
        settings._asdict().items(), (list, int, int, str, bool), strict=True
    ):
        if type(value) is not kind:
            raise ValueError(f"{name} is {value!r}")
    names = settings.class_names
    if not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names is {names!r}")
    return settings._replace(class_names=tuple(names))


def find_misfit(trained, wanted):
    """Compares what a checkpoint was trained for with what is asked of it.

    Args:
      trained: `Settings`, or None where they are not known.
      wanted: `Settings`.

    Returns:
      (string, string): what does not fit, as the one and as the other has it; None where all fits.
    """
    if trained is None:
        return None
    if trained.class_names not in (None, wanted.class_names):
        return tuple(
            cifar10_data.describe_classes(names)
            for names in (trained.class_names, wanted.class_names)
        )
    for name in ("top_layers", "crop_size"):
        values = getattr(trained, name), getattr(wanted, name)
        if values[0] != values[1]:
            return tuple(f"--{name}={value}" for value in values)
    return None


def explain_misfit(checkpoint, trained, wanted, flag):
    """Returns why a checkpoint cannot be used, in a sentence; empty where it can.

    Args:
      checkpoint: path.
      trained: see `find_misfit`.
      wanted: see `find_misfit`.
      flag: string; names the folder that the checkpoint is in.
    """
    misfit = find_misfit(trained, wanted)
    if misfit is None:
        return ""
    has, asked = misfit
    cure = f"give {has}" if has.startswith("--") else "name the data set that belongs to it"
    return (
        f"{checkpoint} has been trained with {has}, not with {asked}; {cure}, or another folder "
        f"with {flag}"
    )


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
