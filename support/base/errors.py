"""The errors that end a script with one line instead of a traceback."""

import contextlib
import re

from support.base.messages import mask_secrets, printable, shorten


class UserError(Exception):
    """The user can fix this. The message is one line that says what is wrong and what to do."""

    def __init__(self, message):
        line = re.sub(r"\s*\n\s*", " ", message.strip())  # quoted text may span several lines
        super().__init__(shorten(printable(mask_secrets(line))))


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
    return match[1] if match else str(error).partition("\n")[0] or repr(error)


@contextlib.contextmanager
def foreign_file(path, error_class=DataError, cure=""):
    """Turns any error in the context into an error of one line: "PATH cannot be read (reason)".

    Damaged and hostile files cause errors of any type, whichever library reads them. Put only the
    call of the library into the context: a mistake in our own code should have its traceback.
    `path` may also be a description. `error_class` is a subclass of `UserError`. `cure`, such as
    "; move it away", is appended to the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise error_class(f"{path} cannot be read ({first_line(error)}){cure}") from error
