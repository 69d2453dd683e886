"""The documentation as data: pages, their blocks, the commands in them, their links, and what the sources can say."""

import ast
import re
import shlex
from dataclasses import dataclass
from functools import lru_cache

from helpers import CHECKOUT

PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))
LANGUAGES = {"bash", "python", "yaml", "json", "text", "message"}
# What an inline command begins with. Of `lever` alone, or of a file's name, nothing is to be run.
STARTS = (
    "lever ",
    "bash scripts/",
    "python scripts/",
    "python tests/",
    "python -m ",
    "torchrun ",
    "pip install ",
    "hf download ",
)
STARTS += ("export ", "docker run ", "vllm serve ", "git ", "ruff ", "ps ", "ls ", "cp ", "source ", "tensorboard ")
_FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Part:
    """A fenced block, or a command: where it stands and what it says. language of an inline command: inline."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.text}"


@lru_cache
def text_of(page: str) -> str:
    """A page as it is."""
    return (CHECKOUT / page).read_text(encoding="utf-8")


@lru_cache
def blocks(page: str) -> tuple[Part, ...]:
    """The fenced blocks of a page."""
    text = text_of(page)
    return tuple(Part(page, _line(text, m.start(3)), m[2], m[3]) for m in _FENCE.finditer(text))


@lru_cache
def prose(page: str) -> str:
    """A page with its fenced blocks blanked out, line for line."""
    return _FENCE.sub(lambda m: "\n" * m[0].count("\n"), text_of(page))


@lru_cache
def inline(page: str) -> tuple[Part, ...]:
    """The inline code of a page; a table's \\| is |."""
    text = prose(page)
    return tuple(Part(page, _line(text, m.start()), "inline", m[1].replace("\\|", "|")) for m in _INLINE.finditer(text))


def steps(page: str) -> list[Part]:
    """What a reader would do, in the order of the page: commands, one each, and blocks of python, yaml and json."""
    found = [part for part in inline(page) if part.text.startswith(STARTS)]
    for block in blocks(page):
        if block.language == "bash":
            found += commands(block)
        elif block.language in ("python", "yaml", "json"):
            found.append(block)
    return sorted(found, key=lambda part: part.line)


def commands(block: Part) -> list[Part]:
    """The commands of a bash block: continued lines joined, `&&` taken apart, comments dropped."""
    found, line, joined = [], block.line, ""
    for i, text in enumerate(block.text.splitlines()):
        line = line if joined else block.line + i
        joined += text
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        for command in joined.split(" && "):
            words = shlex.split(command, comments=True)
            if words:
                found.append(Part(block.page, line, "bash", shlex.join(words) if "#" in command else command.strip()))
        joined = ""
    return found


def links(page: str) -> list[str]:
    """Where a page points to."""
    return _LINK.findall(prose(page))


@lru_cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()) for heading in headings)
    return frozenset(word.replace(" ", "-") for word in words)


@lru_cache
def sayings() -> str:
    """Every text in the sources as the parser joins it, one a line; § where a value is filled in."""
    found = []
    for path in (CHECKOUT / "lever_lm").rglob("*.py"):
        if "assets" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "§" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


@lru_cache
def passages(page: str) -> tuple[Part, ...]:
    """The paragraphs, list items and table rows of a page, each on one line; language: `row` of a table's, else ``."""
    found, lines, start = [], [], 1

    def end() -> None:
        text = " ".join(line.strip() for line in lines)
        if text and not re.match(r"#|\|[ :|-]+$", text):
            found.append(Part(page, start, "row" if text.startswith("|") else "", text))
        lines.clear()

    for number, line in enumerate([*prose(page).splitlines(), ""], 1):
        if not line.strip() or re.match(r"\s*([-*] |\d+\. |\||#)", line):
            end()
        if not lines:
            start = number
        lines.append(line)
    end()
    return tuple(found)
