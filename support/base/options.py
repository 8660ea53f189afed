"""The flags of all scripts, in one table, and the constants that some of them use as defaults.

Many flags default to a constant in `cifar10_input.py` or `cifar10.py`. Until you set such a flag,
reading it returns the current value of the constant. So you can edit a constant in the file or in
a notebook. Once you set the flag, its value takes precedence over the constant.

    options.register_constants(globals())   # below the constants of a module
    options.define("input", "model")        # the flags of two groups of the table

Importing this module marks the flags as parsed, so that they can be read wherever no command line
is parsed, as in a notebook. It does not import TensorFlow.
"""

import contextlib
import os
import re
import sys

from absl import flags

from support.base.errors import UserError

FLAGS = flags.FLAGS
FLAGS.mark_as_parsed()
flags.disclaim_key_flags()  # the flags that this module defines belong to the module that calls it

MAX_FOLDERS = 200  # in a path; Python creates missing ones by recursion
_names = set()  # of the flags that this module was asked to define


# --- Constants.


class Constant(str):
    """The name of a constant, as the default of a flag."""


# By the name of each registered module: its namespace, and the constants in it that are unchanged
# copies of those of earlier modules.
_registered = {}


def register_constants(namespace):
    """Makes the constants of a module available as defaults of flags.

    Two modules may define the same constant: `cifar10.py` copies some from `cifar10_input.py`. You
    can edit either copy. If you edit both, the one in the module registered later takes effect.

    Args:
      namespace: dict; the module's `globals()`. A module that is loaded again replaces itself.
    """
    name = namespace["__name__"]
    _registered.setdefault(name, (namespace, {}))
    names = list(_registered)
    earlier = [_registered[other][0] for other in names[: names.index(name)]]
    copies = {
        constant: value
        for constant, value in namespace.items()
        if isinstance(value, int | float | str) and any(e.get(constant) == value for e in earlier)
    }
    _registered[name] = namespace, copies


def constant(name):
    """Returns the value of a constant, as it is edited now. Raises KeyError if there is none."""
    for namespace, copies in reversed(_registered.values()):
        if name in namespace and (name, namespace[name]) not in copies.items():
            return namespace[name]
    raise KeyError(name)


# --- Flags.


class Flag(flags.Flag):
    """A flag that follows a constant, if its default is one, until it is given a value.

    Its parser checks each value other than None, wherever it comes from: the command line, an
    assignment, the default or the constant.

    Args:
      default: value; a `Constant` to follow; or None.

    The other arguments are those of `flags.Flag`.

    Attributes:
      defined_default: the default as it was passed, whatever `FLAGS.set_default` says.
    """

    _constant = None

    def __init__(self, parser, name, default, help_string, **arguments):
        self.defined_default = default
        follows = isinstance(default, Constant)
        serializer = None if arguments.get("boolean") else flags.ArgumentSerializer()
        value = None if follows else default
        super().__init__(parser, serializer, name, value, help_string, **arguments)
        if follows:  # without a check: `verify` reports a constant that is edited in the file
            self._constant = default
            self.default = constant(default)
            self.default_as_str = repr(str(self.default))  # for --helpfull

    @property
    def value(self):
        """The given value or, if none was given, that of the constant or the default."""
        if not self._follows_constant():
            return self._value
        try:
            return self._check(constant(self._constant))
        except (TypeError, ValueError):
            return constant(self._constant)  # `verify` reports it

    @value.setter
    def value(self, value):
        try:
            self._value = self._check(value)
        except (TypeError, ValueError) as error:
            if self._constant is None or value != constant(self._constant):
                message = f"flag --{self.name}={value}: {error}"
                raise flags.IllegalFlagValueError(message) from None
            self._value = value  # absl restores a flag that follows a bad constant
        if self._constant is not None:  # absl does this after its validators have read the flag
            self.using_default_value = value == constant(self._constant)

    def verify(self, _):
        """Returns True, or raises ValidationError if the constant is invalid; an absl validator."""
        try:
            if self._follows_constant():
                self._check(constant(self._constant))
        except (TypeError, ValueError) as error:
            problem = f"{error}; the value comes from the constant {self._constant}"
            raise flags.ValidationError(problem) from None
        return True

    def _set_default(self, value):
        using_default_value = self.using_default_value
        super()._set_default(value)  # may raise
        # `FLAGS.set_default` replaces the constant, but not a given value.
        self._constant, self.using_default_value = None, using_default_value

    def _follows_constant(self):
        return self.using_default_value and self._constant is not None

    def _check(self, value):
        """Returns a value as `value` will return it; raises TypeError or ValueError."""
        if value is not None:
            return self.parser.parse(value.item() if hasattr(value, "item") else value)  # of NumPy
        if self.default is not None:
            raise ValueError("it needs a value")
        return None


def _define(flag):
    """Defines a flag for the module that calls this one, unless the flag already exists."""
    # It exists if another script in the process or the user's own script has defined it, or if the
    # module is loaded a second time (reloaded, or run as a script and then imported).
    _names.add(flag.name)
    if flag.name in FLAGS:
        existing = FLAGS[flag.name]
        if isinstance(existing, Flag) and existing.defined_default != flag.defined_default:
            FLAGS.set_default(flag.name, flag.default)  # it was edited before the reload
            existing.defined_default = flag.defined_default
        flags.declare_key_flag(flag.name)
        return
    flags.DEFINE_flag(flag)
    flags.register_validator(flag.name, flag.verify)


# --- Paths.


def local_path(path):
    """Returns a local path as a string; expands `~` and `~user` at its beginning.

    Args:
      path: string, bytes or `os.PathLike`.

    Raises:
      ValueError: it is empty or a URL, there is no such user, or it has more than MAX_FOLDERS
        folders.
    """
    path = os.fsdecode(path)
    expanded = os.path.expanduser(path)
    if not path:
        raise ValueError("it must name a file or a folder")
    if path.count("/") > MAX_FOLDERS:
        raise ValueError(f"a path may name at most {MAX_FOLDERS} folders")
    # At least two letters, because C:/ is a drive of Windows. pathlib removes the second slash.
    if scheme := re.match("[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE):
        problem = f"{scheme[0]}/ is not supported"
    elif expanded.startswith("~"):
        problem = f"there is no home folder for {path.partition('/')[0]}"
    else:
        return expanded
    raise ValueError(f"{problem}; write ./{path} if it is a local path")


def tensorflow_path(path):
    """Returns a `local_path` that names the same file for TensorFlow, which uses UTF-8, and Python.

    Raises ValueError for all other paths.
    """
    path = local_path(path)
    with contextlib.suppress(UnicodeEncodeError):
        if os.fsencode(path) == path.encode():
            return path
    raise ValueError("TensorFlow needs a path in UTF-8, and a locale that uses UTF-8")


def checkpoint_path(path):
    r"""Returns a `tensorflow_path` in which TensorFlow may look for checkpoints and delete them.

    Raises ValueError if the path has one of the characters `*?[\` or is no `tensorflow_path`.
    """
    path = tensorflow_path(path)
    if found := re.search(r"[*?[\\]", path):
        raise ValueError(
            f"TensorFlow would treat {found[0]} in this path as part of a pattern; rename the "
            "folder; its checkpoints move with it"
        )
    return path


def _saved_model_path(path):
    path = tensorflow_path(path)
    if re.search(r"\[[^/]*\]|\\", path):
        raise ValueError("TensorFlow cannot load a model from a path with brackets or a backslash")
    return path


def _url_or_path(path):
    is_url = re.match("(https?|ftp|file):/", path, re.IGNORECASE)
    return path if is_url else tensorflow_path(path)


# --- The definition of a flag.

# These functions have absl's names, and define one flag for the module that calls them. `default`
# may be a `Constant`.
# ruff: noqa: N802


def DEFINE_boolean(name, default, help_string):
    """Defines a flag that is true or false."""
    _define(Flag(flags.BooleanParser(), name, default, help_string, boolean=True))


def DEFINE_integer(name, default, help_string, lower_bound=None, upper_bound=2**31 - 1):
    """Defines a flag for an integer within bounds."""
    parser = flags.IntegerParser(lower_bound, upper_bound)
    _define(Flag(parser, name, default, help_string))


def DEFINE_float(name, default, help_string, interval):
    """Defines a flag for a float in an interval, such as "(0, 1]", which excludes 0."""
    _define(Flag(_FloatParser(interval), name, default, help_string))


def DEFINE_enum(name, default, enum_values, help_string):
    """Defines a flag for one of several strings."""
    help_string = f"<{'|'.join(enum_values)}>: {help_string}"
    _define(Flag(flags.EnumParser(enum_values), name, default, help_string))


def DEFINE_path(name, default, help_string, normalize=tensorflow_path):
    """Defines a flag for a path; `normalize` is one of the functions above."""
    _define(Flag(_PathParser(normalize), name, default, help_string))


def DEFINE_alias(name, original_name):
    """Defines another name for a flag."""
    if name not in FLAGS:
        flags.DEFINE_alias(name, original_name)
    flags.declare_key_flag(name)


class _FloatParser(flags.FloatParser):
    def __init__(self, interval):
        super().__init__(*map(float, interval[1:-1].split(", ")))
        ends = {"(": self.lower_bound, ")": self.upper_bound}
        self._excluded = [end for mark, end in ends.items() if mark in interval]
        self._interval = interval

    def parse(self, argument):
        value = self.convert(argument)
        # A NaN is in no interval.
        if value in self._excluded or not self.lower_bound <= value <= self.upper_bound:
            raise ValueError(f"it must be in the interval {self._interval}")
        return value


class _PathParser(flags.ArgumentParser):
    def __init__(self, normalize):
        self.parse = normalize


# --- The table.

_SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"

# The groups of flags: for each flag, the function that defines it and its arguments. The bound 1e9
# ensures that float32 and int64 can hold the results.
# fmt: off
_GROUPS = {
    "input": [
        (DEFINE_boolean, "fast_ops", True,
         "Use faster equivalents of TensorFlow's operations on the CPU. With false, the graph "
         "consists of the operations that the tutorial names. Checkpoints work with both."),
        (DEFINE_integer, "crop_size", Constant("IMAGE_SIZE"),
         "Side in pixels (8 to 32) of the square crop of each 32 x 32 image that the model "
         "sees. Training crops at random positions, evaluation at the center."),
        (DEFINE_boolean, "random_flip", True,
         "Flip half of the training images horizontally, chosen at random. Turn this off if "
         "mirroring changes what an image means, for example with digits."),
        (DEFINE_float, "max_brightness_delta", Constant("MAX_BRIGHTNESS_DELTA"),
         "Maximum brightness change, added to or subtracted from every pixel (0 to 255) of a "
         "training image. Standardization cancels this change.", "[0, 255]"),
        (DEFINE_float, "min_contrast_factor", Constant("MIN_CONTRAST_FACTOR"),
         "Minimum factor for the contrast of a training image.", "[0, 1000]"),
        (DEFINE_float, "max_contrast_factor", Constant("MAX_CONTRAST_FACTOR"),
         "Maximum factor for the contrast of a training image, greater than 0. With 0, every "
         "image would be gray.", "(0, 1000]"),
        (DEFINE_float, "min_fraction_of_examples_in_queue",
         Constant("MIN_FRACTION_OF_EXAMPLES_IN_QUEUE"),
         "Fraction of an epoch (all training images) that stays in the shuffling queue. A "
         "larger queue shuffles better; a smaller one starts sooner.", "[0, 1]"),
        (DEFINE_integer, "num_preprocess_threads", Constant("NUM_PREPROCESS_THREADS"),
         "Number of threads that read and distort training images.", 1, 1024),
    ],
    "model": [
        (DEFINE_boolean, "synthetic_data", False,
         "Use a generated dataset (ten kinds of colored shapes) instead of CIFAR-10. Needs no "
         "network."),
        (DEFINE_path, "data_url", Constant("DATA_URL"),
         "Where to get cifar-10-binary.tar.gz if data_dir has no dataset: an http(s)://, ftp:// "
         "or file:// URL, or a path. The SHA-256 must match that of the original archive.",
         _url_or_path),
        (DEFINE_enum, "top_layers", "full", ["full", "local"],
         "Type of the layers local3 and local4: fully connected, or locally connected with "
         "separate filters for each position."),
        (DEFINE_float, "initial_learning_rate", Constant("INITIAL_LEARNING_RATE"),
         "Learning rate before the first decay, greater than 0.", "(0, 1e9]"),
        (DEFINE_float, "num_epochs_per_decay", Constant("NUM_EPOCHS_PER_DECAY"),
         "Number of epochs between decays of the learning rate, greater than 0.", "(0, 1e9]"),
        (DEFINE_float, "learning_rate_decay_factor", Constant("LEARNING_RATE_DECAY_FACTOR"),
         "Factor by which each decay multiplies the learning rate, greater than 0. 1 turns "
         "decay off.", "(0, 1]"),
        (DEFINE_float, "moving_average_decay", Constant("MOVING_AVERAGE_DECAY"),
         "Decay of the moving averages of the variables per update, from 0 to less than 1.",
         "[0, 1)"),
        (DEFINE_float, "weight_decay", Constant("WEIGHT_DECAY"),
         "Weight of the L2 loss of local3 and local4 (with --top_layers=local, of "
         "softmax_linear as well). The L2 loss is half the sum of the squared weights. 0 turns "
         "weight decay off.", "[0, 1e9]"),
    ],
    "run": [
        (DEFINE_path, "train_dir", "/tmp/cifar10_train",
         "Folder for checkpoints and summaries. A run that is already there is resumed, never "
         "deleted.", checkpoint_path),
        (DEFINE_integer, "max_steps", 1000000,
         "Total number of steps, including those of earlier runs in train_dir.", 1),
        (DEFINE_integer, "log_frequency", 10,
         "Steps between lines of progress.", 1),
        (DEFINE_integer, "save_checkpoint_secs", 600,
         "Seconds between checkpoints.", 1),
        (DEFINE_integer, "save_checkpoint_steps", None,
         "Steps between checkpoints, instead of save_checkpoint_secs.", 1),
        (DEFINE_integer, "max_checkpoints_to_keep", 5,
         "Number of checkpoints to keep. Older checkpoints of the same run are deleted.", 1),
        (DEFINE_integer, "save_summaries_steps", 100,
         "Steps between scalars for TensorBoard. 0 turns off all summaries.", 0),
        (DEFINE_integer, "save_histograms_steps", 1000,
         "Steps between histograms and images for TensorBoard, which take much more space than "
         "scalars. 0 turns them off.", 0),
        (DEFINE_integer, "seed", None,
         "Seed for the initial variables and all random operations. By default, each run draws "
         "a new seed. On a CPU with num_preprocess_threads=1, the seed determines every loss.",
         0),
        (DEFINE_boolean, "log_device_placement", False,
         "Print the device of every operation: hundreds of lines."),
    ],
    "cluster": [
        (DEFINE_integer, "cluster_timeout_secs", 600,
         "Seconds to wait for a task that is missing.", 1),
        (DEFINE_boolean, "shard_data", False,
         "Have each worker read its own part of the records. By default, each worker reads all "
         "records, in its own random order."),
    ],
    "checkpoint": [
        (DEFINE_path, "checkpoint_dir", "/tmp/cifar10_train",
         "Folder with the checkpoints, or one checkpoint, such as "
         "/tmp/cifar10_train/model.ckpt-1000.", checkpoint_path),
        (DEFINE_boolean, "use_moving_averages", True,
         "Use the moving averages of the variables. With false, use the variables themselves."),
    ],
    "prediction": [
        (DEFINE_integer, "top", 3,
         "Number of most likely classes to print for each image. 0 prints all classes.", 0),
        (DEFINE_boolean, "json", False,
         "Print one JSON object per image, each on its own line."),
        (DEFINE_path, "export_dir", None,
         "Folder to write the model to, as a SavedModel. It must be new or empty.",
         _saved_model_path),
    ],
    "conversion": [
        (DEFINE_path, "images", None,
         "Folder that contains your images as train/CLASS/* and test/CLASS/*, or as CLASS/* if "
         "you give --test_fraction. Images can be PNG, JPEG, GIF, BMP or WebP files of up "
         "to 250 megapixels.", local_path),
        (DEFINE_alias, "pictures", "images"),
        (DEFINE_path, "svhn", None,
         f"Folder with train_32x32.mat and test_32x32.mat, the cropped digits from {_SVHN_URL}.",
         local_path),
        (DEFINE_path, "cifar10_python", None,
         "The Python version of CIFAR-10: the folder cifar-10-batches-py or the archive "
         "cifar-10-python.tar.gz.", local_path),
        (DEFINE_path, "cifar100", None,
         "The binary or the Python version of CIFAR-100: its folder or its archive.", local_path),
        (DEFINE_enum, "cifar100_labels", "fine", ["fine", "coarse"],
         "The labels of CIFAR-100 to use: 100 fine classes or 20 coarse ones."),
        (DEFINE_path, "output", None,
         "Folder to create for the dataset; pass it to the other scripts as --data_dir. It may "
         "exist if it is empty.", local_path),
        (DEFINE_float, "test_fraction", None,
         "Fraction of each class to use as test images, for images that are not divided into "
         "train and test.", "(0, 1)"),
        (DEFINE_integer, "shuffle_seed", 0,
         "Seed that determines the order of the records, and which images --test_fraction "
         "selects. The same images and seed produce the same files. The order of CIFAR-10 and "
         "CIFAR-100 is kept.", 0, None),
    ],
}
# fmt: on


def define(*groups):
    """Defines the flags of groups in the table for the calling module, unless they exist."""
    for group in groups:
        for function, *arguments in _GROUPS[group]:
            function(*arguments)
    if "input" in groups:
        flags.register_multi_flags_validator(
            ["min_contrast_factor", "max_contrast_factor"],
            lambda values: values["min_contrast_factor"] <= values["max_contrast_factor"],
            "the minimum contrast factor must not exceed the maximum",
        )


# --- The flags of the running script.


def sections():
    """Returns the flags of the running script, for its help: a list of (heading, list of flags).

    The script's own flags come first, then the flags of the project's other modules, then the
    flags for clusters.
    """
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    last = [name for _, name, *_ in _GROUPS["cluster"]]
    found = [("Flags", [flag for flag in own if flag.name not in last])]
    # A module is registered after the modules that it imports.
    for module, module_flags in reversed(FLAGS.flags_by_module_dict().items()):
        if module in sys.modules and _is_ours(module):
            found.append((f"Flags of {module}", [flag for flag in module_flags if flag not in own]))
    for_clusters = [flag for flag in own if flag.name in last]
    return [*found, ("Flags for several machines (TF_CONFIG)", for_clusters)]


def values():
    """Validates all flags again, and returns the values of the project's flags: dict by name.

    Raises:
      UserError: the value of an edited constant is invalid for its flag.
    """
    names = [flag.name for _, part in sections() for flag in part]
    names += [name for name in FLAGS if name in _names and name not in names]
    validators = {validator for name in names for validator in FLAGS[name].validators}
    for validator in sorted(validators, key=lambda each: each.insertion_index):
        try:
            validator.verify(FLAGS)
        except flags.ValidationError as error:
            given = validator.print_flags_with_values(FLAGS)
            raise UserError(f"{given}: {error}") from error
    return {name: FLAGS[name].value for name in names}


def _is_ours(module):
    """Returns whether a module is in the project's folder or in the running script's."""
    path = getattr(sys.modules[module], "__file__", None) or ""
    project = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script_folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    return os.path.dirname(os.path.abspath(path)) in (project, script_folder)
