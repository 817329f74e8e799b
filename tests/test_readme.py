"""What the documentation shows works: snippets run, commands parse, names and links exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

import squeeze
import tests.pico
from squeeze import api, recipe, registry
from squeeze.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FIRST_SCREEN_LINES = 40


def blocks(path, language):
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands():
    """Every ``squeeze ...`` command line in the shell blocks of the documentation."""
    for path in PAGES:
        for line in "".join(blocks(path, "sh")).splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words and Path(words[0]).name == "squeeze":
                    yield path.name, words[1:]


def test_python_snippets_run_in_order(tmp_path, monkeypatch):
    """As printed, with a smaller model in the place of the default one and fewer samples."""
    pico = tests.pico.save(tmp_path / "pico")
    run = api.run
    calls = []

    def small_run(name, model=pico, output=None, **settings):
        calls.append(name)
        return run(name, model, output, overrides=tests.pico.SETTINGS, **settings)

    monkeypatch.setattr(api, "run", small_run)
    monkeypatch.chdir(tmp_path)
    names = {}
    for path in PAGES:
        for code in blocks(path, "python"):
            exec(compile(code, path.name, "exec"), names)
    assert calls == ["quickstart"]
    assert names["result"].report.effective_bits["weights"] < 16
    assert names["model"].squeeze_statistics()["density"]
    assert names["tokenizer"].encode("text")


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda value: str(value)[:60])
def test_commands_parse(page, words):
    """Parsed by click, without running."""
    words = words[: words.index(">")] if ">" in words else words
    name, *arguments = words
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"{page} shows an unknown command {name}"
    command.make_context(name, list(arguments))


def test_the_readme_shows_commands():
    assert {words[0] for _, words in commands()} >= {"run", "plan", "eval", "export", "compare"}


def test_recipes_in_the_documentation_are_valid():
    texts = [text for path in PAGES for text in blocks(path, "yaml")]
    assert texts
    for text in texts:
        made = recipe.load(yaml.safe_load(text))
        assert recipe.load(made.to_dict()).to_dict() == made.to_dict()


def test_methods_in_the_readme_exist():
    listed = README.read_text(encoding="utf-8").partition("<!-- methods:")[2]
    names = re.findall(r"\[(\w+)\]\(https://", listed.partition("<!-- end of methods")[0])
    assert names
    assert set(names) <= {name for kind in registry.KINDS for name in registry.names(kind)}


def test_the_first_screen_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.index("<!-- end of methods -->") < FIRST_SCREEN_LINES


def test_the_readme_names_every_command():
    table = README.read_text(encoding="utf-8").partition("## Command line")[2]
    for name in main.list_commands(click.Context(main)):
        assert f"squeeze {name} " in table or f"`{name}`" in table or f"squeeze {name}`" in table


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_names_in_the_python_snippets_are_public():
    text = "".join(block for path in PAGES for block in blocks(path, "python"))
    used = set(re.findall(r"squeeze\.(\w+)\(", text))
    assert used <= set(squeeze.__all__)
