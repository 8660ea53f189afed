"""The pages README.md and docs/*.md: their code blocks, and how outputs are compared.

A comment on the line before a block of shell commands says whether the commands can be tested:

    <!-- run -->                  the block is run
    <!-- run with: FLAGS -->      the same, with FLAGS appended to each line `python cifar10_…`
    <!-- not run: REASON -->      the block is not run

`<!-- output -->` before a text block says that it shows the output of the block of commands before.
Text blocks without that comment are not compared. `<!-- excerpt: FILE -->` before a block of Python
says that it is in that file.
"""

import contextlib
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

from conftest import ROOT, messages, script_environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+"
SPEED = r"\d+\.\d+ (?:examples/sec|sec/batch)"
DECIMAL = r"\d+\.\d+"
PROGRESS = re.compile(r".*\(.*/s, [\d:]+ left\)")  # printed only if something takes ten seconds
COMMENTS = {
    "shell": r"run|run with: .+|not run: .+",
    "text": r"|output",
    "python": r"|excerpt: \S+",
    "mermaid": r"",
}


class Block(NamedTuple):
    """A code block: the comment before it, its language and its text."""

    comment: str
    language: str
    text: str


class Example(NamedTuple):
    """Commands to run and the output that the page shows, or None if it shows none."""

    commands: str
    output: str | None


def read_blocks(text):
    """Returns the code blocks of a page in order.

    Raises:
      ValueError: if a block has another language, or a comment that its language does not allow.
    """
    blocks = [Block(comment or "", *rest) for comment, *rest in BLOCK.findall(text)]
    for block in blocks:
        if not re.fullmatch(COMMENTS.get(block.language, "(?!)"), block.comment):
            raise ValueError(
                f"not allowed: <!-- {block.comment} -->, {block.language}\n{block.text}"
            )
    leftover = re.search(r"^ *```.*|^<!--.*", read_prose(text), re.MULTILINE)
    if leftover:
        raise ValueError(f"not part of a code block: {leftover[0]}")
    return blocks


def read_prose(text):
    """Returns the text of a page without its code blocks."""
    return BLOCK.sub("", text)


def read_examples(text):
    """Returns the examples of a page that can be run, in order.

    Raises:
      ValueError: if an output does not belong to commands that are run, or as in `read_blocks`.
    """
    examples = []
    can_have_output = False
    for block in read_blocks(text):
        if block.language == "shell":
            run, _, flags = block.comment.partition(" with: ")
            can_have_output = run == "run"
            if can_have_output:
                flags = f" {flags}" if flags else ""
                commands = re.sub(r"^python cifar10_.*", rf"\g<0>{flags}", block.text, flags=re.M)
                examples.append(Example(commands, None))
        elif block.comment == "output":
            if not can_have_output:
                raise ValueError(f"not the output of commands that are run:\n{block.text}")
            examples[-1] = examples[-1]._replace(output=block.text)
            can_have_output = False
    return examples


def run_examples(examples, folder):
    """Runs examples in a copy of the project; returns descriptions of all differences.

    Args:
      examples: list of `Example`.
      folder: path of an empty folder. It gets the copy, and stands for /tmp in the commands and in
        the scripts of the copy.
    """
    project = folder / "project"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests")
    shutil.copytree(ROOT, project, ignore=ignored)
    for script in [*project.glob("*.py"), *project.glob("examples/*.sh")]:
        script.write_text(script.read_text().replace("/tmp/", f"{folder}/"))
    environment = script_environment()
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    environment["PIP_QUIET"] = "2"  # no warnings and no notices, which depend on the machine
    differences = []
    for example in examples:
        code, printed = run_commands(
            example.commands.replace("/tmp/", f"{folder}/"), project, environment
        )
        printed = printed.replace(f"{folder}/", "/tmp/")
        if code:
            differences.append(f"exit code {code} of\n{example.commands}{printed}")
        elif example.output is not None:
            lines = [line for line in messages(printed) if not PROGRESS.fullmatch(line)]
            if not is_output(example.output.splitlines(), lines):
                differences.append(
                    f"{example.commands}printed\n{printed}but the page shows\n{example.output}"
                )
    shutil.rmtree(project / ".venv", ignore_errors=True)  # 2 GB
    return differences


def run_commands(commands, folder, environment, timeout=900):
    """Runs commands with bash; returns the exit code, and stdout and stderr together.

    No process that the commands have started is left when this returns.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            ["bash", "-e", "-c", commands],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the usual case: nothing is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return process.returncode, output.read()


def is_output(shown, printed):
    """Tells whether `printed` is what a page shows; `...` stands for any number of lines.

    Args:
      shown: list of lines of the page.
      printed: list of lines.
    """
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(is_output(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and is_line(shown[0], printed[0]) and is_output(shown[1:], printed[1:])


def is_line(shown, printed):
    """Tells whether two lines have the same words and whole numbers, and similar decimal numbers.

    Numbers up to 1 may differ by 0.3, and larger ones by a quarter; speeds and times may be any.
    The order of the classes of a prediction, `cat 0.6, dog 0.3`, does not matter, but a class that
    is shown with a probability of 0.8 or more must come first.
    """
    prediction = rf"\w+ {DECIMAL}(?:, \w+ {DECIMAL})+"
    sure = re.search(rf"(\w+) (?:1\.0+|0\.[89]\d*), \w+ {DECIMAL}", shown)
    if sure and not re.search(rf"(?<!, ){sure[1]} {DECIMAL}, ", printed):
        return False

    def split(line):
        line = re.sub(prediction, lambda match: ", ".join(sorted(match[0].split(", "))), line)
        line = re.sub(SPEED, lambda match: f"# {match[0].split()[1]}", re.sub(TIME, "#", line))
        return re.sub(DECIMAL, "#", line), [float(number) for number in re.findall(DECIMAL, line)]

    (words, numbers), (printed_words, printed_numbers) = split(shown), split(printed)
    return words == printed_words and all(
        math.isclose(*pair, rel_tol=0.25, abs_tol=0.3 if max(pair) <= 1 else 0)
        for pair in zip(numbers, printed_numbers, strict=True)
    )
