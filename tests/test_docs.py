"""The docs are true: the examples run, the API page is current, links lead somewhere, commands and options exist."""

import importlib
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from common.config import _kinds
from common.report.api import render
from tests.processes import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
EXAMPLES = re.findall(
    r"^## (.*?)\n\n(?:[^#`\n].*\n\n)?```python\n(.*?)```", TEXTS["docs/library.md"], re.M | re.S
)
COMMANDS = [
    (page, line.split("  #")[0].strip())
    for page, text in TEXTS.items()
    for block in re.findall(r"^```sh\n(.*?)```", text, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
SCRIPTS = re.compile(
    r"(?:accelerate launch|torchrun|python)\b.*?\s((?:image|video|cifar|benchmarks)/\w+\.py)(.*)"
)


def test_every_example_is_found():
    assert len(EXAMPLES) == TEXTS["docs/library.md"].count("```python")


@pytest.mark.parametrize("title, code", EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_examples_of_the_library_run(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(code, title, "exec"), {})
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()


def test_the_api_page_is_current():
    assert TEXTS["docs/api.md"] == render(), "run: python -m common.report.api docs/api.md"


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXTS[page])
    missing = [
        t for t in targets if not t.startswith("http") and not (ROOT / page).parent.joinpath(t).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page, command", COMMANDS, ids=[command[:60] for _, command in COMMANDS])
def test_commands_name_scripts_and_options_that_exist(page, command):
    found = SCRIPTS.search(command)
    if found is None:
        module = re.search(r"python -m ((?:common|kernels)[\w.]*)", command)
        paths = [ROOT / module[1].replace(".", "/")] if module else []
        assert all(p.is_dir() or p.with_suffix(".py").is_file() for p in paths)
        return
    script, words = found.groups()
    assert (ROOT / script).is_file()
    if not script.endswith(("/train.py", "/eval.py")):
        return
    keys = set(_kinds(config_of(script)))
    options = re.findall(r"--([\w.]+)", words)
    assert [o for o in options if o not in keys | {"config"} and not o.startswith("model.args.")] == []
    recipes = [word for word in re.findall(r"--config (\S+)", words) if word.islower() and "/" in word]
    assert all(Path(ROOT / recipe).is_file() for recipe in recipes)


def config_of(script):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return getattr(module, "EvalConfig", None) or module.Config
