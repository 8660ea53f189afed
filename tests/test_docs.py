"""README.md and docs/: links, anchors, excerpts, and the names in backquotes."""

import ast
import pathlib
import re

import pytest
from absl import flags
from conftest import ROOT

import cifar10_convert  # noqa: F401
import cifar10_eval  # noqa: F401
import cifar10_multi_gpu_train  # noqa: F401
import cifar10_predict  # noqa: F401

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path for folder in ("", "support", "support/cluster") for path in (ROOT / folder).glob("*.py")
]
# Flags of programs that are not part of this project.
OTHER_FLAGS = {"logdir", "logdir_spec", "help", "helpfull"}

on_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read_prose(page):
    """Returns the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Returns the anchors that GitHub makes for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", read_prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_broken_links(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        if re.match("[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@on_each_page
def test_relative_links_and_anchors_lead_somewhere(page):
    assert find_broken_links(page) == []


def test_broken_links_and_anchors_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A *b*\n[1](missing.md) [2](#a-b) [3](page.md#c) [4](https://a/b)\n")
    assert find_broken_links(page) == ["missing.md", "page.md#c"]


def find_unknown_flags(text):
    names = re.findall(r"(?<![\w-])--(\w[\w-]*)", text)
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    own_flags = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", benchmarks)
    known = {*flags.FLAGS, *own_flags, *OTHER_FLAGS}
    return sorted({name for name in names if name not in known and name[:2] != "no"})


@on_each_page
def test_every_flag_exists(page):
    assert find_unknown_flags(page.read_text()) == []


def test_unknown_flags_are_found():
    assert find_unknown_flags("`--batch_size=8 --bach_size` --norandom_flip") == ["bach_size"]


def find_wrong_excerpts(page):
    """Returns the excerpts that are not in the file that the comment before them names."""
    pattern = r"^<!-- excerpt: (\S+) -->\n```python\n(.*?)^```$"
    excerpts = re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in excerpts if text not in (ROOT / name).read_text()]


@on_each_page
def test_excerpts_are_in_the_source(page):
    assert find_wrong_excerpts(page) == []


def test_wrong_excerpts_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- excerpt: cifar10.py -->\n```python\ndef inferrence(images):\n```\n")
    assert find_wrong_excerpts(page) == ["def inferrence(images):\n"]


def defined_names():
    """Returns the names that the sources define, and those of their modules."""
    names = set()
    for source in SOURCES:
        names.add(source.stem)
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def find_unknown_names(text):
    """Returns the functions, constants and files in backquotes that do not exist."""
    names = defined_names()
    unknown = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"(support/|tests/|docs/|benchmarks/|examples/)?[\w/]+\.(py|md)", quoted):
            if not (ROOT / quoted).exists() and not list(ROOT.glob(f"*/{quoted}")):
                unknown.append(quoted)
        elif re.fullmatch(r"(cifar10\w*|support|summaries|session)\.[\w.]+", quoted) and (
            not set(quoted.split(".")) <= names | {"support"}
        ):
            unknown.append(quoted)
    return unknown


@on_each_page
def test_files_and_qualified_names_in_backquotes_exist(page):
    assert find_unknown_names(read_prose(page)) == []


def test_unknown_files_and_names_are_found():
    text = "`cifar10.py` `cifar11.py` `cifar10.inference` `cifar10.inferrence` `support/nothing.py`"
    assert find_unknown_names(text) == ["cifar11.py", "cifar10.inferrence", "support/nothing.py"]


def test_every_page_is_checked():
    assert pathlib.Path(ROOT / "README.md") in PAGES
    assert ROOT / "docs" / "tutorial.md" in PAGES
