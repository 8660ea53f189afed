"""The errors that end a script with one line instead of a traceback."""

import re


class UserError(Exception):
    """The user can fix this. The message is one line that says what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # quoted text may span several lines


class DataError(UserError):
    """The dataset cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, not finite, or belongs to another model."""


class Interrupted(KeyboardInterrupt):
    """A signal that `support.base.signals` handles has stopped the script.

    Attributes:
      signal_number: int.
      message: string; what was saved and how to resume.
    """

    def __init__(self, signal_number, message="nothing was lost; run the same command again"):
        super().__init__(message)
        self.signal_number = signal_number
        self.message = message


def first_line(error):
    """Returns the line of an exception's text that gives the reason.

    TensorFlow's errors have dozens of lines; the reason follows the line that names the node.
    """
    match = re.search(r"^Node: .*\n(.+)", str(error), re.MULTILINE)
    return match[1] if match else (str(error).splitlines() or [repr(error)])[0]
