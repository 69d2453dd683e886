"""Which test holds each statement of the documentation to its value; the list of them is doc_statements.yaml.

A sentence, or part of one up to a semicolon, that holds a number or something of the code is a statement. An entry
covers the sentences that its excerpts (`says`) touch, word for word; in the heading of a table it covers the table. It
names the tests of the value, the command that prints what was `measured`, or `why_not`.
"""

import ast
import functools
import re
from collections import Counter

import pages
import pytest
import yaml
from pages import CHECKOUT

CHINESE, LIST = "README.zh-CN.md", CHECKOUT / "tests/doc_statements.yaml"
STATED = [page for page in pages.PAGES if "zh-CN" not in page and page != "CHANGELOG.md"]
# A number, or anything of the code.
HOLDS = re.compile(r"\d|`")
OWN = {"mine.yaml", "my.yaml", "config.yaml"}  # made by a reader or by a run
KINDS = {"test", "measured", "why_not"}


@functools.cache
def listed() -> dict[str, list[dict]]:
    return yaml.safe_load(LIST.read_text(encoding="utf-8"))


@functools.cache
def entries(page: str) -> list[dict]:
    """The entries of a page, each value as a list."""
    of_page = listed()[page]
    return [{key: [value] if isinstance(value, str) else value for key, value in entry.items()} for entry in of_page]


def plain(text: str) -> str:
    """Without the blanks of its layout, and without the addresses of links, which are looked up elsewhere."""
    return re.sub(r"\]\([^)\s]+\)", "]", re.sub(r"\s+", " ", text)).strip()


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a passage begin and end, without the number of a list's item."""
    starts = [0, *(match.end() for match in re.finditer(r"[.;] (?=[A-Z`*\[(\"])", text))]
    spans = list(zip(starts, [*starts[1:], len(text)], strict=True))
    return spans[1:] if re.match(r"\d+\. ", text) else spans


@functools.cache
def walked(page: str) -> tuple[list[str], set[str]]:
    """The statements of a page that no entry covers, and the excerpts that stand in it."""
    bare, used, table, before = [], set(), False, ""
    says = [plain(text) for entry in entries(page) for text in entry["says"]]
    for part in pages.passages(page):
        text = plain(part.text)
        here = [excerpt for excerpt in says if excerpt in text]
        table = part.language == "row" and (table if before == "row" else bool(here))
        before = part.language
        spans = [(text.index(excerpt), text.index(excerpt) + len(excerpt)) for excerpt in here]
        for start, end in [] if table else sentences(text):
            if HOLDS.search(text, start, end) and not any(first < end and start < last for first, last in spans):
                bare.append(f"{page}, line {part.line}: {text[start:end]}")
        used.update(here)
    return bare, used


@functools.cache
def names_in(name: str) -> set[str]:
    """The names of a file's tests."""
    (path,) = (CHECKOUT / "tests").rglob(name)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("page", STATED)
def test_every_entry_stands_in_its_page(page):
    assert not [text for entry in entries(page) for text in entry["says"] if plain(text) not in walked(page)[1]]


@pytest.mark.parametrize("page", STATED)
def test_every_statement_has_a_test_of_its_value(page):
    bare = walked(page)[0]
    assert not bare, "\n".join([f"{len(bare)} without an entry in {LIST.name}:", *bare])


@pytest.mark.parametrize("page", STATED)
def test_every_test_and_every_command_of_an_entry_is_there(page):
    for entry in entries(page):
        assert {"says"} < entry.keys() <= KINDS | {"says"}, entry
        for name, _, test in (reference.partition("::") for reference in entry.get("test", [])):
            assert test in names_in(name), f"{name} has no {test}: {entry}"
        for command in entry.get("measured", []):
            assert all((CHECKOUT / word).is_file() for word in re.findall(r"(?:scripts|tests)/\S+", command)), entry
            assert re.match(r"(python|bash) (scripts|tests)/|lever |torchrun ", command), entry


def test_the_chinese_readme_has_the_numbers_commands_and_options_of_the_english_one():
    english, chinese = (pages.text_of(page) for page in ("README.md", CHINESE))
    tables = [re.findall(r"\d\.\d{3}(?:\*\*)? \[[^\]]+\]", text) for text in (english, chinese)]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 22

    def steps(page: str) -> set[str]:
        found = (part for part in pages.steps(page) if part.language == "bash")
        return {part.text for part in found if "--rl-data" not in part.text}  # the page of own data has that one

    assert steps("README.md") == steps(CHINESE)
    for pattern in (r"`(lever [a-z-]+)", r"--[a-z][a-z0-9-]+", r"\b\d{3} (?:interrupted|terminated|被中断|被终止)"):
        said = [
            Counter(word.split()[0] if word[0].isdigit() else word for word in re.findall(pattern, text))
            for text in (english, chinese)
        ]
        assert said[0].keys() - {"--resume"} <= said[1].keys() | {"--png"}, pattern


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_file_that_a_page_names_is_there(page):
    """Sources and configs; what a reader or a run makes is in OWN."""
    folders = (CHECKOUT / name for name in ("lever_lm", "scripts", "tests", "configs"))
    here = [str(path) for folder in folders for path in folder.rglob("*.*")]
    for part in pages.inline(page):
        for name in re.findall(r"(?<![\w/<>.*-])([\w./-]+\.(?:py|sh|yaml|c))(?![\w])", part.text):
            assert name in OWN or any(known.endswith(f"/{name}") for known in here), part
