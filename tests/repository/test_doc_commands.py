"""Commands in markdown files exist, with their options, targets and files."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import pytest
import typer
from markdown_pages import ROOT, blocks, code_words, pages

from evatok_hf.cli.commands import app

FOLDERS = ("training", "benchmarks", "tools")
ENDS = {";", "&&", "||", "|", "}", "done", ">"}


def lines(page: str) -> list[str]:
    """The lines of shell blocks, those that go on joined, and code within text that looks like a command."""
    shell = [block.text.replace("\\\n", " ").splitlines() for block in blocks(page, "bash")]
    words = [text for text in code_words(page) if re.match(r"evatok |make [a-z-]+$", text) or ".py --" in text]
    return [line for block in shell for line in block] + words


def find_script(word: str) -> str | None:
    """The script that a word names, in whatever folder of the repository."""
    if not re.fullmatch(r"[\w/]+\.py", word):
        return None
    places = [word, *(f"{folder}/{word}" for folder in FOLDERS)]
    found = [place for place in places if "/" in place and (ROOT / place).is_file()]
    assert found, f"there is no script {word}"
    return found[0]


@cache
def options_of_command(name: str) -> frozenset[str]:
    group = typer.main.get_command(app)
    assert name in group.commands, f"evatok has no command {name}"
    command = group.commands[name]
    params = command.get_params(typer.Context(command, info_name=name))
    return frozenset(option for param in params for option in (*param.opts, *param.secondary_opts)) | {"--debug"}


@pytest.fixture(scope="module")
def options_of_script():
    """Of a script, by its --help, in this process, so that torch is imported once."""

    @cache
    def options(script: str) -> frozenset[str]:
        with pytest.MonkeyPatch.context() as patch:
            printed: list[str] = []
            patch.setattr(sys, "argv", [script, "--help"])
            patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
            patch.setattr(sys, "stdout", type("Out", (), {"write": printed.append, "flush": lambda self: None})())
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        assert ended.value.code in (0, None), script
        return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", "".join(printed)))

    return options


def given(words: list[str]) -> list[str]:
    """The options up to the end of a command."""
    end = next((i for i, word in enumerate(words) if word in ENDS or word.endswith(";")), len(words))
    return [word.partition("=")[0] for word in words[:end] if re.match(r"--?[a-zA-Z]", word)]


@pytest.mark.parametrize("page", [page for page in pages() if lines(page)])
def test_commands_and_their_options(page, options_of_script):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in lines(page):
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            if word == "make":
                assert words[index + 1] in targets, f"{page}: the Makefile has no {words[index + 1]}"
            elif word == "evatok" and len(words) > index + 1 and words[index + 1].islower():
                known = options_of_command(words[index + 1])
            elif script := find_script(word):
                known = options_of_script(script)
            else:
                if re.fullmatch(rf"({'|'.join(FOLDERS)}|model_cards)/[\w/.-]+\.\w+", word):
                    assert (ROOT / word).is_file(), f"{page}: there is no {word}"
                continue
            if word != "make":
                unknown = set(given(words[index + 1 :])) - known
                assert not unknown, f"{page}: {word} has no {', '.join(sorted(unknown))} ({line})"


def test_shell_blocks_parse():
    for page in pages():
        for block in blocks(page, "bash"):
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}, line {block.line}: {done.stderr}"
