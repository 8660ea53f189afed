"""Messages on stderr. Text that comes from outside cannot move the cursor or look like a message.

Such text is a file's name, the content of a file or the answer of a server, for example. It may
contain control characters, which a terminal would obey.
"""

import os
import re
import sys

MAX_LENGTH = 2000  # characters of a message; only text from outside can be longer


def printable(text):
    """Returns a string or a path as one line of printable characters; escapes all others."""
    text = os.fspath(text)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shorten(message):
    """Returns a message without its middle if it is longer than MAX_LENGTH."""
    half = MAX_LENGTH // 2
    return message if len(message) <= MAX_LENGTH else f"{message[:half]} ... {message[-half:]}"


def report(message):
    """Prints a message on stderr, as one printable line."""
    print(shorten(printable(message)), file=sys.stderr, flush=True)


def mask_secrets(text):
    """Returns a text in which the user names, passwords and queries of URLs are masked."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "***@", text)
    return re.sub(r"(?<=\w)(://[^?#\s]*\?)[^#\s]+", r"\1***", text)
