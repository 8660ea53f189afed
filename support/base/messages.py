"""Messages on stderr, in which text from outside is escaped and secrets are masked.

File names, file contents and responses of servers may contain control characters. If a terminal
received them, they could move the cursor or forge a message.
"""

import functools
import os
import re
import sys
import unicodedata
import urllib.parse

MAX_LENGTH = 2000  # characters of a message; only text from outside makes a message longer
# A URL and its secrets. All text before the last @ is the user: passwords may contain / and #.
_URL = re.compile(
    r"(?!\s*file:)(?P<scheme>[^/]*:/+)(?P<user>.*(?=@)|)(?P<host>@?[^?#]*[?#]?)(?P<query>.*)",
    re.DOTALL,
)


def printable(text):
    """Returns a string or a path as one line of printable characters; escapes all others."""
    text = os.fspath(text)
    return "".join(c if _is_harmless(c) else repr(c)[1:-1] for c in text)


def _is_harmless(character):
    # Spaces of all widths, and the marks in Persian words and in combined emoji.
    return (
        character.isprintable()
        or unicodedata.category(character) == "Zs"
        or character in "\u200c\u200d"
    )


def shorten(message):
    """Returns a message without its middle if it is longer than MAX_LENGTH."""
    half = MAX_LENGTH // 2
    return message if len(message) <= MAX_LENGTH else f"{message[:half]} ... {message[-half:]}"


def report(message):
    """Prints a message on stderr, as one printable line."""
    print(shorten(printable(mask_secrets(message))), file=sys.stderr, flush=True)


report_once = functools.cache(report)  # prints the same message only once


def mask_secrets(text, url=""):
    """Returns a text in which the user names, passwords and queries of URLs are masked.

    In the text, a URL ends at the first whitespace. The secrets of `url` are masked wherever they
    occur, because messages may quote a part of it.
    """
    if match := _URL.fullmatch(url):
        for part in re.split("[:&?#=]", f"{match['user']}&{match['query']}"):
            for secret in (part, urllib.parse.unquote(part)):
                if len(secret) > 3:  # a shorter one would match parts of words
                    text = text.replace(secret, "***")
        text = re.sub(r"[^\s'\"]+@", "***@", text)
    return re.sub(r"(?<=\w)(?<!file):/+\S+", lambda match: mask_url(match[0]), text)


def mask_url(url):
    """Returns a URL with its secrets masked. Returns `file:` URLs and other texts unchanged."""
    match = _URL.fullmatch(url)
    if match is None:
        return url
    if re.search("[?#]", match["user"]):  # this may be a part of the query
        return f"{match['scheme']}***"
    user, query = (match[name] and "***" for name in ("user", "query"))
    return f"{match['scheme']}{user}{match['host']}{query}"
