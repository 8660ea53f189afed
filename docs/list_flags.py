"""Writes docs/flags.md, a table of all flags.

    python docs/list_flags.py

The table is made from the definitions of the flags.
"""

import importlib
import pathlib
import sys

from absl import flags

PAGE = pathlib.Path(__file__).parent / "flags.md"
SCRIPTS = ("train", "multi_gpu_train", "eval", "predict", "convert")
MODULES = ("cifar10", "cifar10_input")  # all scripts but cifar10_convert.py import them
INTRODUCTION = """# All flags

This table has all flags in alphabetical order. The third column lists the scripts that have the
flag: `train` stands for `cifar10_train.py`, and so on. `cifar10.py` and `cifar10_input.py` define
the flags of all scripts but `cifar10_convert.py`. If a default comes from a constant in these two
files, editing the constant changes the default. To print the flags of one script with the values in
effect, pass `--help`.

The page is written by `python docs/list_flags.py`; a test compares it with the flags.

| flag | default | scripts | meaning |
| --- | --- | --- | --- |
"""


def main():
    """Writes the page."""
    sys.path.insert(0, str(PAGE.parent.parent))
    PAGE.write_text(format_page())


def format_page():
    """Returns the text of the page."""
    found = {}  # (flag, where it is) by the name of the flag
    for where in (*SCRIPTS, *MODULES):
        name = where if where in MODULES else f"cifar10_{where}"
        module = importlib.import_module(name)
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            found.setdefault(flag.name, (flag, []))[1].append(where)
    return INTRODUCTION + "".join(format_row(*found[name]) for name in sorted(found))


def format_row(flag, where):
    """Returns the row of a flag; `where` lists the scripts and modules that have it."""
    default = str(flag.default).lower() if flag.boolean else flag.default
    cells = (
        f"`--{flag.name}`",
        "none" if flag.default is None else f"`{default}`",
        "all but convert" if {*MODULES} & {*where} else ", ".join(where),
        " ".join(flag.help.split()).replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
