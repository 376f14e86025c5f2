"""README, cards and pages say what is so: links lead somewhere, commands parse, names exist."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import phenoseq
from phenoseq.cli import _parser, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "model_cards").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
BY_NAME = {"ids": lambda path: path.name}


def fenced(text: str, *languages: str) -> list[str]:
    """Blocks of code in some languages."""
    blocks = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in blocks if language in languages]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of the commands on a page, or in the comments of a config."""
    text = page.read_text()
    if page.suffix == ".md":
        text = "\n".join(fenced(text, "sh", "bash"))
    else:
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.partition(" > ")[0].replace("UM", "0.5"), comments=True)
        for line in lines
        if re.match(r"(phenoseq|python|make) ", line)
    ]


def anchors(path: Path) -> set[str]:
    """Names that a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def labels() -> set[str]:
    return {
        label
        for path in PAGES
        for label in re.findall(r"^\(([\w-]+)\)=$", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_links_lead_somewhere(page):
    text = prose(page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            here = re.match(r"https://github\.com/phenoseq/phenoseq/blob/main/(.+)", target)
            assert here is None or (ROOT / here[1]).exists(), target
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([\w/]+)>?`", text):
        assert (ROOT / "docs" / f"{target}.md").is_file(), target
    for target in re.findall(r"\{ref\}`(?:[^`<]*<)?([\w-]+)>?`", text):
        assert target in labels(), target


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], **BY_NAME)
def test_files_of_this_repository_exist(page):
    inside = r"(?<![/\w])(?:examples|tests|model_cards|docs)/[\w./-]*\w"
    for path in re.findall(inside, page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_reached():
    index = (ROOT / "docs" / "index.md").read_text()
    toctree = fenced(index, "{toctree}")[0].split()
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert set(toctree) - {":hidden:"} == names
    assert all(f"{{doc}}`{name}`" in index for name in names)


def parses(words: list[str]) -> bool:
    """Whether the command takes these words, or is asked for help."""
    try:
        _parser().parse_args(words)
    except SystemExit as stop:
        return stop.code == 0
    return True


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], **BY_NAME)
def test_commands_parse(page, capsys):
    """Each by the parser of the command itself, which knows its options and choices."""
    for words in commands(page):
        if words[:2] == ["phenoseq", "train"]:
            config = words[words.index("--config") + 1] if "--config" in words else "--help"
            assert config in ("--help", "CONFIG.yaml") or (ROOT / config).is_file(), words
        elif words[0] == "phenoseq":
            assert parses(words[1:]), (words, capsys.readouterr().err)
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}\b.*:", (ROOT / "Makefile").read_text(), re.M), words


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_python_names_what_there_is(page):
    for block in fenced(page.read_text(), "python", "{code-cell}"):
        for node in ast.walk(ast.parse(re.sub(r"^:.*\n", "", block, flags=re.MULTILINE))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phenoseq"):
                module = import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), node.module
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "phenoseq":
                options = inspect.signature(getattr(phenoseq, node.func.attr)).parameters
                assert {k.arg for k in node.keywords} <= set(options), node.func.attr


def test_the_reference_has_every_public_name():
    """What ``phenoseq`` exports, and what pages and examples import; Sphinx sees to the rest."""
    api = (ROOT / "docs" / "api.md").read_text()
    whole = set(re.findall(r"automodule:: (\S+)", api))
    api += (ROOT / "docs" / "screening.md").read_text()
    missing = []
    for name in phenoseq.__all__:
        thing = getattr(phenoseq, name)
        home = getattr(thing, "__module__", "")
        if not name.startswith("__") and home not in whole:
            missing += [name] if f":: phenoseq.{name}\n" not in api else []
    for page in PAGES:
        for block in fenced(page.read_text(), "python", "{code-cell}"):
            for module, names in re.findall(r"^from (phenoseq\.\S+) import (.+)$", block, re.M):
                for name in re.split(r", *", names):
                    listed = module in whole or f"{module}.{name}" in api
                    missing += [] if listed or name.isupper() else [f"{module}.{name}"]
    assert not missing


def each_command(parser, words=()):
    """All commands and actions of commands."""
    yield list(words)
    for action in parser._actions:
        for name, child in (action.choices or {}).items() if action.nargs == "A..." else ():
            yield from each_command(child, (*words, name))


HELPS = [words for words in each_command(_parser()) if words != ["train"]]


@pytest.mark.parametrize("words", HELPS, ids=lambda words: " ".join(words) or "phenoseq")
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {' '.join(['phenoseq', *words])}")
    assert len(told.splitlines()) > 4
    assert "%(" not in told


def test_help_of_train(capsys):
    """LightningCLI's own: every option of the networks, the data and the trainer."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert all(f"--{part}" in told for part in ("config", "model", "data", "ema", "export"))


def test_the_citation_is_valid():
    """What version 1.2.0 of the Citation File Format requires."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all({"type", "title", "authors"} <= set(work) for work in citation["references"])
    assert citation["license"] in (ROOT / "pyproject.toml").read_text()


SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "tests/benchmarks").glob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, **BY_NAME)
def test_scripts_import_what_there_is(script):
    """Nothing runs the benchmarks but ``make bench``."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "phenoseq":
            for name in node.names:
                assert hasattr(import_module(node.module), name.name), f"{node.module}.{name.name}"
