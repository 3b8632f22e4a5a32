"""The documentation: its Python runs, its commands and options are those of the program, and its links lead somewhere.

Every block marked python is executed, all blocks of a file in order and in one namespace, unless the line
`<!-- not run -->` stands before it.
"""

from __future__ import annotations

import gc
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import typer

from steer import architectures, embedded, method
from steer.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLI = ROOT / "docs" / "cli.md"

BLOCK = re.compile(r"^(?P<skip><!-- not run -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The number of the line before each block of that language, and the code; without those that are not to run."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["language"] == language and not match["skip"]:
            yield text.count("\n", 0, match.start("code")), match["code"]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [page for page in PAGES if any(blocks(page, "python"))]
SLOW = {"methods.md"}


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=name(page), marks=[pytest.mark.full] * (page.name in SLOW)) for page in RUNNABLE]
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "smollm2-135m" in page.read_text(encoding="utf-8") and not embedded.installed("smollm2-135m"):
        pytest.skip("needs the model: steer models pull smollm2-135m")
    monkeypatch.chdir(tmp_path)
    # What a page registers stays its own.
    registers = patch.dict(architectures.ARCHITECTURES), patch.dict(method.METHODS)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        with torch.random.fork_rng(), registers[0], registers[1]:
            for line, code in blocks(page, "python"):
                # Empty lines in front, so that a traceback names the line of the page; nothing of this file's own
                # `from __future__` in it.
                exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
    finally:
        if "lm" in namespace:
            namespace["lm"].close()
        namespace.clear()
        gc.collect()


def commands(command: Any = None, path: str = "steer") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    command = typer.main.get_command(app) if command is None else command
    below = getattr(command, "commands", {})
    if not below or command.invoke_without_command:
        yield path, command
    for child, inner in below.items():
        yield from commands(inner, f"{path} {child}")


def options_of(command: Any) -> set[str]:
    found = {o for p in command.params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}
    return found - {"--help"}


COMMANDS = {path: options_of(command) for path, command in commands() if path != "steer"}


def sections() -> dict[str, set[str]]:
    """The commands that docs/cli.md has a section on, and the options in the first column of its table."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^## ", CLI.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if called := re.match(r"`(steer[^`]*)`", title):
            path = " ".join(word for word in called[1].split() if not re.search(r"[A-Z]", word))
            cells = re.findall(r"^\|([^|]*)\|", body, re.MULTILINE)
            found[path] = {option for cell in cells for option in re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", cell)}
    return found


def test_cli_page_has_every_command_and_option_and_no_others() -> None:
    assert sections() == COMMANDS


def test_arguments_in_the_titles_are_those_of_the_commands() -> None:
    titles = re.findall(r"^## `(steer[^`]*)`", CLI.read_text(encoding="utf-8"), re.MULTILINE)
    for path, command in commands():
        if path == "steer":
            continue
        wanted = [p.name for p in command.params if p.param_type_name == "argument"]
        (title,) = [t for t in titles if re.sub(r" \[?[A-Z].*", "", t) == path]
        assert len(title.removeprefix(path).split()) == len(wanted), title


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_call_commands_that_exist(page: Path) -> None:
    for _, code in blocks(page, "console"):
        for line in re.findall(r"^\$ (steer .*)$", code, re.MULTILINE):
            words = shlex.split(line, comments=True)
            path = max((p for p in COMMANDS if f"{' '.join(words)} ".startswith(f"{p} ")), key=len, default=None)
            assert path is not None, line
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= COMMANDS[path] | {"--debug"}, line


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"
