"""README.md and docs/: links, anchors, excerpts, names in backquotes, commands and their output."""

import csv
import functools
import pathlib
import re
import runpy

import pages
import pytest
from absl import flags
from conftest import ROOT

import cifar10_convert  # noqa: F401
import cifar10_eval  # noqa: F401
import cifar10_multi_gpu_train  # noqa: F401
import cifar10_predict  # noqa: F401
import cifar10_train  # noqa: F401

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")]
# Flags of programs that are not part of this project.
OTHER_FLAGS = {"logdir", "logdir_spec", "help", "helpfull", "version", "signal"}

on_each_page = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)


def anchors(text):
    """Returns the anchors that GitHub makes for the headings of a page, in order."""
    headings = re.findall(r"^#+ (.+)$", pages.read_prose(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@on_each_page
def test_relative_links_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", pages.read_prose(page.read_text())):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not re.match("[a-z]+:", target):
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


@on_each_page
def test_every_flag_exists(page):
    names = re.findall(r"(?<![\w-])--(\w[\w-]*)", page.read_text())
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    own_flags = re.findall(r"(?:flags|options)\.DEFINE_\w+\(\s*\"(\w+)\"", benchmarks)
    known = {*flags.FLAGS, *own_flags, *OTHER_FLAGS}
    assert {name for name in names if not {name, name.removeprefix("no")} & known} == set()


@on_each_page
def test_excerpts_are_in_the_source_and_blocks_of_commands_say_whether_they_are_run(page):
    for block in pages.read_blocks(page.read_text()):
        if block.comment.startswith("excerpt: "):
            assert block.text in (ROOT / block.comment.removeprefix("excerpt: ")).read_text()
    pages.read_examples(page.read_text())


@functools.cache
def used_words():
    """Returns all words of the files of the project, except those of the pages and this file."""
    paths = [*SOURCES, *ROOT.glob("*.t*ml"), *ROOT.glob("requirements*.txt"), ROOT / ".ci" / "run"]
    for folder in ("benchmarks", "docs", "examples", "tests"):
        paths += (ROOT / folder).rglob("*.py")
    texts = [path.read_text() for path in paths if path != pathlib.Path(__file__)]
    words = set(re.findall(r"\w+", "".join(texts)))
    return words | {word.removeprefix("test_") for word in words}


SUFFIXES = r"(py|md|sh|txt|csv|json|jsonl|yml|svg|toml|png)"
FOLDERS = r"(support|tests|docs|benchmarks|examples|\.ci|\.github)"
OUTPUTS = (".json", ".jsonl", ".txt", ".png")  # of files that the scripts read or write, too
# In the instructions of docs/developing.md, or in the tutorial's own text.
OTHER_NAMES = {"image_summary", "x_train", "y_train", "x_test", "y_test", "npz", "conv3"}
OTHER_NAMES |= {"conv_weight_decay", "CONV_WEIGHT_DECAY"}


def find_unknown_names(text):
    """Returns the files in backquotes that do not exist, and the names with unknown words."""
    unknown = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        known = set(re.findall(r"\w+", quoted)) <= used_words() | OTHER_NAMES
        if re.fullmatch(rf"(\.?\w+/)*[\w.-]+\.{SUFFIXES}|{FOLDERS}/[\w/]*", quoted):
            places = (ROOT / quoted, *ROOT.glob(f"*/{quoted}"), *ROOT.glob(f"support/*/{quoted}"))
            exists = any(place.exists() for place in places)
            known = exists or (known and quoted.endswith(OUTPUTS))
        elif not re.fullmatch(r"(?!tf\.)[A-Za-z_][\w.]*[^\W_](\(\))?", quoted):
            continue
        if not known:
            unknown.append(quoted)
    return unknown


@on_each_page
def test_files_and_names_in_backquotes_exist(page):
    assert find_unknown_names(pages.read_prose(page.read_text())) == []


@on_each_page
def test_the_tests_that_a_page_names_exist(page):
    """Of the form `test_a.py`: `b_…`, `c`."""
    file = r"`[\w/]+\.py`"
    test = r"`[\w…]+`"
    lists = re.findall(rf"({file}(?:, {file})*): ({test}(?:, {test})*)", page.read_text())
    for files, names in lists:
        sources = [ROOT / "tests" / path for path in re.findall(r"`(.+?)`", files)]
        source = "".join(path.read_text() for path in sources)
        for name in re.findall(r"`(.+?)`", names):
            assert re.search(rf"def test_{name.replace('…', '[a-z0-9_]*')}\(", source), name


# --- The commands of the pages and their output.


@pytest.mark.slow
@pytest.mark.timeout(1200)
@on_each_page
def test_the_commands_print_what_the_page_shows(page, tmp_path):
    differences = pages.run_examples(pages.read_examples(page.read_text()), tmp_path)
    assert not differences, "\n".join(differences)


def test_no_two_pages_write_to_the_same_folder():
    page_of_folder = {}
    for page in pages.PAGES:
        if page.suffixes == [".md"]:  # a translation has the same commands
            commands = "".join(each.commands for each in pages.read_examples(page.read_text()))
            for folder in re.findall(r"--(?:output|train_dir|export_dir)=(\S+)", commands):
                assert page_of_folder.setdefault(folder, page) == page, folder
    assert page_of_folder


# --- The Chinese tutorial is in step with the English one.


def outline(text):
    """Returns what a page and its translation have in common: all but the prose, by kind.

    Names and numbers are compared section by section, because their order may differ.
    """
    prose = pages.read_prose(text.replace("\N{MULTIPLICATION SIGN}", "x"))
    for unit, factor in ((" million", 1_000_000), (" 万", 10_000)):
        prose = re.sub(
            rf"([\d.]+){unit}", lambda match, by=factor: f"{float(match[1]) * by:,.0f}", prose
        )
    for place, anchor in enumerate(anchors(text)):  # headings, and so anchors, are translated
        prose = prose.replace(f"](#{anchor})", f"](#{place})")
    sections = re.split(r"^#+ ", prose, flags=re.MULTILINE)
    rows = re.findall(r"^\|.*$", prose, re.MULTILINE)
    return {
        "levels of headings": re.findall(r"^(#+) ", prose, re.MULTILINE),
        "code blocks": pages.read_blocks(text),
        "pictures": re.findall(r"!\[[^\]]*\]\((\S+?)\)", prose),
        "links": [sorted(re.findall(r"(?<!!)\[[^\]]*\]\((\S+?)\)", part)) for part in sections],
        "quoted names": [sorted(set(re.findall(r"`([^`\n]+)`", part))) for part in sections],
        "exercises": len(re.findall(r"^> \*\*", prose, re.MULTILINE)),
        "rows of tables": [(row.count("|"), re.findall(r"\d+", row)) for row in rows],
        "numbers": [sorted(set(re.findall(r"\d+(?:[.,]\d+)+|\d{2,}", part))) for part in sections],
    }


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def test_the_chinese_tutorial_is_in_step():
    translated = (ROOT / "docs" / "tutorial.zh.md").read_text()
    assert outline(translated) == outline(TUTORIAL)


# --- The table of flags, and the tables of docs/results.md and the points of its picture.


def test_the_table_of_flags_has_all_flags_with_their_defaults_and_meanings():
    written = (ROOT / "docs" / "flags.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "list_flags.py"))["format_page"]() == written


def read_curve(run):
    """Returns the precision after each step of a run in docs/results.csv."""
    with open(ROOT / "docs" / "results.csv", newline="") as file:
        return {
            int(row["step"]): row["precision"] for row in csv.DictReader(file) if row["run"] == run
        }


def read_table(heading):
    """Returns the first table after a heading of docs/results.md: a list of rows of cells."""
    text = (ROOT / "docs" / "results.md").read_text()
    rows = re.search(r"^\|.*?(?=\n\n)", text[text.index(heading) :], re.DOTALL | re.MULTILINE)[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()[2:]]


@pytest.mark.parametrize(
    ("run", "heading"),
    [("tutorial", "## The tutorial's recipe"), ("short recipe", "## A short recipe")],
)
def test_the_tables_of_the_results_agree_with_the_points_of_the_picture(run, heading):
    curve = read_curve(run)
    table = [(int(row[0].replace(",", "")), row[3]) for row in read_table(heading)]
    assert table
    assert [(step, curve[step]) for step, _ in table] == table


def test_the_precisions_in_the_readme_and_the_tutorial_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| `cifar10_train.py` \|.*\| ([\d,]+) \|.*\| (\S+) \|$", readme, re.M)
    curve = read_curve("tutorial")
    assert table == [("10,000", curve[10000]), ("40,000", curve[40000])]
    assert f"reaches {100 * float(curve[40000]):.1f}% after 40,000 steps" in TUTORIAL
    spread = re.search(r"\S+ ± \S+", readme)[0]
    assert spread in (ROOT / "docs" / "results.md").read_text()
