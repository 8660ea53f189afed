"""README.md and docs/: links, anchors, excerpts, names in backquotes, commands and their output."""

import ast
import csv
import functools
import pathlib
import re
import subprocess
import time

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


def anchors(page):
    """Returns the anchors that GitHub makes for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", pages.read_prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_broken_links(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", pages.read_prose(page.read_text())):
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
    own_flags = re.findall(r"(?:flags|options)\.DEFINE_\w+\(\s*\"(\w+)\"", benchmarks)
    known = {*flags.FLAGS, *own_flags, *OTHER_FLAGS}
    return sorted({name for name in names if not {name, name.removeprefix("no")} & known})


@on_each_page
def test_every_flag_exists(page):
    assert find_unknown_flags(page.read_text()) == []


def test_unknown_flags_are_found():
    text = "`--batch_size=8 --bach_size` --norandom_flip --nobatch"
    assert find_unknown_flags(text) == ["bach_size", "nobatch"]


def find_wrong_excerpts(page):
    """Returns the excerpts that are not in the file that the comment before them names."""
    excerpts = [
        (block.comment.removeprefix("excerpt: "), block.text)
        for block in pages.read_blocks(page.read_text())
        if block.language == "python" and block.comment
    ]
    return [text for name, text in excerpts if text not in (ROOT / name).read_text()]


@on_each_page
def test_excerpts_are_in_the_source(page):
    assert find_wrong_excerpts(page) == []


def test_wrong_excerpts_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- excerpt: cifar10.py -->\n```python\ndef inferrence(images):\n```\n")
    assert find_wrong_excerpts(page) == ["def inferrence(images):\n"]


@functools.cache
def defined_names():
    """Returns the names that each module of the sources defines, at any level, by module."""
    names = {}
    for source in SOURCES:
        names[source.stem] = module = set()
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                module.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                module.add(node.id)
    return names


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
    """Returns the functions, constants and files in backquotes that do not exist."""
    names, words = defined_names(), used_words() | OTHER_NAMES
    unknown = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        module, _, rest = quoted.removesuffix("()").partition(".")
        if re.fullmatch(rf"(\.?\w+/)*[\w.-]+\.{SUFFIXES}|{FOLDERS}/[\w/]*", quoted):
            places = (ROOT / quoted, *ROOT.glob(f"*/{quoted}"), *ROOT.glob(f"support/*/{quoted}"))
            known = any(place.exists() for place in places)
            if quoted.endswith(OUTPUTS):
                known = known or set(re.findall(r"\w+", quoted)) <= words
        elif module in names and re.fullmatch(r"[\w.]+", rest):
            first, *others = rest.split(".")
            known = first in names[module] and set(others) <= names[module] | words
        elif re.fullmatch(r"[A-Za-z_]\w*[^\W_](\(\))?", quoted):
            known = module in words
        else:
            continue
        if not known:
            unknown.append(quoted)
    return unknown


@on_each_page
def test_files_and_qualified_names_in_backquotes_exist(page):
    assert find_unknown_names(pages.read_prose(page.read_text())) == []


def test_unknown_files_and_names_are_found():
    known = "`cifar10.py` `cifar10.inference` `support/` `tower_loss()` `batch_size` `.ci/run`"
    unknown = ["cifar11.py", "cifar10.inferrence", "support/nothing.py", "cifar10_eval.inference"]
    unknown += ["tower_los()", "decayed_learning_rat", "checkpoints.nothing", "docs/nothing/"]
    text = " ".join(f"`{name}`" for name in unknown)
    assert find_unknown_names(known) == []
    assert find_unknown_names(text) == unknown


def find_missing_tests(text):
    """Returns the tests that a page names, as in `test_a.py`: `b_…`, `c`, but that do not exist."""
    missing = []
    file = r"`[\w/]+\.py`"
    test = r"`[\w…]+`"
    for files, names in re.findall(rf"({file}(?:, {file})*): ({test}(?:, {test})*)", text):
        sources = [ROOT / "tests" / path for path in re.findall(r"`(.+?)`", files)]
        source = "".join(path.read_text() for path in sources)
        for name in re.findall(r"`(.+?)`", names):
            pattern = rf"def test_{name.replace('…', '[a-z0-9_]*')}\("
            if not re.search(pattern, source):
                missing.append(name)
    return missing


@on_each_page
def test_the_tests_that_a_page_names_exist(page):
    assert find_missing_tests(page.read_text()) == []


def test_missing_tests_are_found():
    text = "`test_docs.py`, `pages.py`: `missing_tests_are_…`, `miss_are_found`, `…_exist` |"
    assert find_missing_tests(text) == ["miss_are_found"]


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_checked():
    assert pathlib.Path(ROOT / "README.md") in pages.PAGES
    assert ROOT / "docs" / "tutorial.md" in pages.PAGES


# --- The commands of the pages and their output.


@on_each_page
def test_every_block_of_commands_says_whether_it_is_run(page):
    pages.read_examples(page.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@on_each_page
def test_the_commands_print_what_the_page_shows(page, tmp_path):
    differences = pages.run_examples(pages.read_examples(page.read_text()), tmp_path)
    assert not differences, "\n".join(differences)


def find_shared_folders(texts):
    """Returns the folders that the commands of more than one page write to."""
    pages_of_folder = {}
    for name, text in texts.items():
        commands = "".join(example.commands for example in pages.read_examples(text))
        for folder in re.findall(r"--(?:output|train_dir|export_dir)=(\S+)", commands):
            pages_of_folder.setdefault(folder, set()).add(name)
    return sorted(folder for folder, names in pages_of_folder.items() if len(names) > 1)


def test_no_two_pages_write_to_the_same_folder():
    texts = {page.name: page.read_text() for page in pages.PAGES if page.suffixes == [".md"]}
    assert len(texts) > 10
    assert find_shared_folders(texts) == []


def test_folders_that_two_pages_write_to_are_found():
    text = "<!-- run -->\n```shell\npython cifar10_train.py --train_dir=/tmp/a\n```\n"
    assert find_shared_folders({"1": text, "2": text, "3": text.replace("/a", "/b")}) == ["/tmp/a"]


PAGE = """
<!-- run with: --b=2 -->
```shell
python cifar10_a.py
echo /tmp/a
```

<!-- output -->
```text
a
```

<!-- not run: takes a day -->
```shell
sleep 86400
```

```text
b
```
"""


def test_commands_and_their_output_are_read():
    (example,) = pages.read_examples(PAGE)
    assert example.commands == "python cifar10_a.py --b=2\necho /tmp/a\n"
    assert example.output == "a\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- not run: takes a day -->\n", ""),
        ("<!-- not run: takes a day -->", "<!-- run it -->"),
        ("<!-- not run: takes a day -->", "<!-- not run: -->"),
        ("<!-- output -->", "<!-- outputs -->"),
        ("<!-- output -->\n", "<!-- output -->\n\n"),
        ("```text\nb", "```bash\nb"),
        ("```text\nb\n```", "  ```text\n  b\n  ```"),
        ("```text\nb", "<!-- output -->\n```text\nb"),
    ],
)
def test_a_block_without_a_valid_comment_is_refused(old, new):
    with pytest.raises(ValueError, match="^not "):
        pages.read_examples(PAGE.replace(old, new))


def test_commands_run_in_a_copy_of_the_project_with_a_folder_for_tmp(tmp_path):
    text = "cp requirements.txt /tmp/copy.txt\nls /tmp/copy.txt\n"
    assert pages.run_examples([pages.Example(text, "/tmp/copy.txt\n")], tmp_path) == []
    assert (tmp_path / "copy.txt").read_text() == (ROOT / "requirements.txt").read_text()
    assert f'"{tmp_path}/cifar10_data"' in (tmp_path / "project" / "cifar10.py").read_text()


def is_running(pid):
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip() not in ("", "Z")  # a zombie is no longer running


def test_no_process_that_a_block_has_started_is_left(tmp_path):
    commands = "sleep 60 > /dev/null & echo $!"
    code, printed = pages.run_commands(commands, tmp_path, None)
    assert code == 0
    deadline = time.monotonic() + 10
    while is_running(int(printed)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_commands_that_fail_or_print_something_else_are_found(tmp_path):
    examples = [
        pages.Example("false\ntrue\n", None),
        pages.Example("echo right\n", "right\n"),
        pages.Example("echo wrong >&2\n", "right\n"),
    ]
    failed, differs = pages.run_examples(examples, tmp_path)
    assert failed == "exit code 1 of\nfalse\ntrue\n"
    assert differs == "echo wrong >&2\nprinted\nwrong\nbut the page shows\nright\n"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb", "a\nb", True),
        ("a", "a\nb", False),
        ("a\nb", "a", False),
        ("a\n...", "a\nb\nc", True),
        ("...\nc", "a\nb\nc", True),
        ("a\n...\nc", "a\nc", True),
        ("a\n...\nd", "a\nb\nc", False),
        ("step 10", "step 20", False),
        ("2026-11-25 08:56:05.740046: step 0", "2027-01-01 00:00:00.000001: step 0", True),
        ("2026-11-25 08:56:05.740046: step 0", "step 0", False),
        ("(86.6 examples/sec; 1.479 sec/batch)", "(2400.1 examples/sec; 0.053 sec/batch)", True),
        ("(0.9 examples/sec; 0.1 sec/batch)", "(0.1 examples/sec; 0.9 sec/batch)", True),
        ("(86.6 examples/sec)", "(86.6 sec/batch)", False),
        ("precision @ 1 = 0.935", "precision @ 1 = 0.735", True),
        ("precision @ 1 = 0.935", "precision @ 1 = 0.535", False),
        ("precision @ 1 = 0.935", "recall @ 1 = 0.935", False),
        ("loss = 4.67", "loss = 4.9", True),
        ("loss = 4.67", "loss = 6.67", False),
        ("a.png: cat 0.6, dog 0.3, fox 0.1", "a.png: cat 0.5, fox 0.3, dog 0.2", True),
        ("a.png: cat 0.6, dog 0.3, fox 0.1", "a.png: dog 0.9, cat 0.1, fox 0.0", False),
        ("a.png: cat 0.6, dog 0.3, fox 0.1", "a.png: cat 0.6, dog 0.3, cow 0.1", False),
        ("a.png: cat 0.6, dog 0.4, fox 0.0", "a.png: dog 0.6, cat 0.4, fox 0.0", True),
        ("a.png: cat 0.8, dog 0.2, fox 0.0", "a.png: dog 0.5, cat 0.5, fox 0.0", False),
    ],
)
def test_words_are_compared_exactly_and_decimal_numbers_loosely(shown, printed, same):
    assert pages.is_output(shown.splitlines(), printed.splitlines()) == same


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
KINDS = list(outline(""))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chinese_tutorial_is_in_step(kind):
    translated = (ROOT / "docs" / "tutorial.zh.md").read_text()
    assert outline(translated)[kind] == outline(TUTORIAL)[kind]


def test_numbers_with_words_are_the_same_in_both_languages():
    assert outline("24 x 24, 18.5 million")["numbers"] == outline("24 x 24: 1850 万")["numbers"]


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("levels of headings", "\n### ", "\n#### "),
        ("code blocks", "sess.run(train_op)\n", "session.run(train_op)\n"),
        ("code blocks", "python cifar10_train.py\n", "python3 cifar10_train.py\n"),
        ("pictures", "(pictures/loss.png)", "(pictures/lost.png)"),
        ("links", "](tensorboard.md)", "](exercises.md)"),
        ("quoted names", "`read", "`write"),
        ("exercises", "\n> **", "\n**"),
        ("rows of tables", "\n| `norm2` |", "\n`norm2` |"),
        ("rows of tables", "| 3 x 4 |", "| 3 x 5 |"),
        ("numbers", "3,073", "3,072"),
    ],
)
def test_a_page_that_is_out_of_step_is_found(kind, old, new):
    page = "\n".join(
        [
            *("# A", "### B [c](tensorboard.md) `read` ![d](pictures/loss.png) 3,073", "> **E**"),
            *("| `norm2` | 3 x 4 |", "<!-- run -->", "```shell", "python cifar10_train.py", "```"),
            *("```python", "sess.run(train_op)", "```", ""),
        ]
    )
    changed = page.replace(old, new)
    assert [name for name in KINDS if outline(changed)[name] != outline(page)[name]] == [kind]


# --- The tables of docs/results.md and the points of its picture.


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
    assert [(curve[int(steps.replace(",", ""))], steps) for steps, _ in table] == [
        (precision, steps) for steps, precision in table
    ]
    assert [steps for steps, _ in table] == ["10,000", "40,000"]
    assert f"reaches {100 * float(curve[40000]):.1f}% after 40,000 steps" in TUTORIAL
    spread = re.search(r"\S+ ± \S+", readme)[0]
    assert spread in (ROOT / "docs" / "results.md").read_text()
