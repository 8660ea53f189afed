"""What a model was trained on: the settings that accompany each checkpoint."""

import json
from typing import NamedTuple

from support.data import dataset


class TrainingSettings(NamedTuple):
    """What a model was trained on, and what restoring it depends on.

    The defaults describe a checkpoint without settings, as the original tutorial wrote it. None
    means unknown.
    """

    class_names: tuple | None = None
    examples_per_epoch: int | None = None
    crop_size: int = 24  # pixels
    top_layers: str = "full"  # a value of the flag
    random_flip: bool = True
    examples_per_step: int | None = None  # images that all towers or workers consumed in one step
    # `images_seen - step * examples_per_step`: not 0 after a change of the batch size or of the
    # number of towers or workers.
    examples_offset: int = 0

    def images_seen(self, step):
        """Returns the number of images that the run has seen at a step; None if unknown."""
        if self.examples_per_step is None:
            return None
        images = step * self.examples_per_step + self.examples_offset
        # A negative number could make the learning rate infinite; see `parse_settings` for 2**53.
        return images if 0 <= images <= 2**53 else None


def format_settings(settings):
    """Returns `TrainingSettings` as a string for `parse_settings`."""
    return json.dumps(settings._asdict())


def parse_settings(text):
    """Returns the `TrainingSettings` in a string. Raises an exception of any type if invalid."""
    settings = TrainingSettings(**json.loads(text))
    # With these limits, an int64 can count the images of 2**31 steps.
    count, offset = range(1, 2**31 + 1), range(-(2**53), 2**53 + 1)
    kinds = list, count, count, str, bool, count, offset
    for (name, value), kind in zip(settings._asdict().items(), kinds, strict=True):
        is_unknown = name == "examples_per_step" and value is None
        is_number = type(value) is int and isinstance(kind, range)
        is_valid = value in kind if is_number else type(value) is kind
        if not is_valid and not is_unknown:
            raise ValueError(f"{name} is {value!r}")
    names = settings.class_names
    if not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names is {names!r}")
    return settings._replace(class_names=tuple(map(dataset.normalize_name, names)))


def find_mismatch(trained, wanted):
    """Finds the first setting that prevents a checkpoint from being used.

    Returns:
      (string, string): the setting in `trained` and in `wanted`, both `TrainingSettings`. None if
      they match, or if `trained` is None because it is unknown.
    """
    if trained is None:
        return None
    if trained.class_names not in (None, wanted.class_names):
        return tuple(map(dataset.describe_classes, (trained.class_names, wanted.class_names)))
    for name in ("top_layers", "crop_size"):
        values = getattr(trained, name), getattr(wanted, name)
        if values[0] != values[1]:
            return tuple(f"--{name}={value}" for value in values)
    return None


def find_changes(trained, wanted):
    """Returns descriptions of changed settings with which training can resume: list of strings."""
    changes = []
    if trained is None:
        return changes
    now, before = wanted.examples_per_epoch, trained.examples_per_epoch
    if before not in (None, now):
        changes.append(f"an epoch now has {now} images instead of {before}")
    if trained.random_flip != wanted.random_flip:
        now, before = (str(value).lower() for value in (wanted.random_flip, trained.random_flip))
        changes.append(f"--random_flip is now {now} instead of {before}")
    return changes
