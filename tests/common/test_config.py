"""Configuration: recipes, overrides, and one line for every mistake."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

import image.train
from common.config import Positional, flatten, parse, to_dict
from common.errors import ConfigError
from tests.processes import ROOT


@dataclass
class Optim:
    """How weights move."""

    name: Literal["sgd", "nag", "adamw"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Learning rate for the whole batch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """β₁ and β₂."""
    clip: float | None = None
    """Largest norm."""
    milestones: list[int] = field(default_factory=list)
    """Epochs."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr = {self.lr}: expected a positive number")


@dataclass
class Model:
    """Which network."""

    name: str = "resnet50_bat"
    """Name."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments."""


@dataclass
class Config:
    """A configuration."""

    optim: Optim = field(default_factory=Optim)
    model: Model = field(default_factory=Model)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optim: {lr: 0.5, betas: [0.8, 0.9]}\nmodel: {name: small, args: {layers: [1, 2]}}\n")
    return path


def test_recipe_then_overrides(recipe):
    config, _ = parse(Config, [f"--config={recipe}", "--optim.lr", "0.05", "--optim.milestones=[3,4]"])
    assert config == Config(
        Optim(lr=0.05, betas=(0.8, 0.9), milestones=[3, 4]), Model("small", {"layers": [1, 2]})
    )


def test_default_recipe_unless_another_is_named(recipe, tmp_path):
    assert parse(Config, [], default_recipe=recipe)[0].model.name == "small"
    other = tmp_path / "other.yaml"
    other.write_text("optim: {lr: 2}\n")
    assert parse(Config, ["--config", str(other)], default_recipe=recipe)[0] == Config(Optim(lr=2.0))


def test_naming_another_model_drops_the_default_recipes_arguments(recipe):
    config, _ = parse(Config, ["--model.name=other", "--model.args.depth=3"], default_recipe=recipe)
    assert config.model.name == "other"
    assert "layers" not in config.model.args


def test_positional(recipe):
    config, value = parse(
        Config, ["runs/x", "--optim.lr=1"], default_recipe=recipe, positional=Positional("run", "A run.")
    )
    assert (value, config.optim.lr, config.model.name) == ("runs/x", 1.0, "small")


def test_what_is_resolved_can_be_read_again(recipe, tmp_path):
    import yaml

    config, _ = parse(Config, [f"--config={recipe}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert parse(Config, [f"--config={path}"])[0] == config
    assert flatten(to_dict(config))["model.args.layers"] == [1, 2]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--optim.lrr=3"], "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        (["--optim.l=3"], "optim.l: unknown key"),
        (["--optm.lr", "3"], "optm.lr: unknown key; did you mean 'optim.lr'?"),
        (["--optim.lr=fast"], "optim.lr: 'fast' is not valid; expected float"),
        (["--optim.lr=-1"], "optim.lr = -1.0: expected a positive number"),
        (
            ["--optim.name=adam"],
            "optim.name: 'adam' is not valid; expected one of sgd, nag, adamw; did you mean 'adamw'?",
        ),
        (["--optim.clip=big"], "optim.clip: 'big' is not valid; expected one of float, null"),
        (["--optim.milestones=[3,x]"], "optim.milestones: 'x' is not valid; expected int"),
        (["--config=none.yaml"], "none.yaml"),
        (["--lr", "3"], "lr: unknown key; did you mean 'optim.lr'?"),
        (["--max-lr", "3"], "max-lr: unknown key; "),
        (["--name=x"], "name: unknown key; did you mean 'optim.name' or 'model.name'?"),
        (["stray"], "unexpected argument 'stray'; options begin with --"),
        (["--optim.lr"], "optim.lr: expected one argument"),
    ],
)
def test_mistakes_on_the_command_line(arguments, expected):
    with pytest.raises(ConfigError) as error:
        parse(Config, arguments)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("optim:\n  lrr: 3\n", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        ("optimm:\n  lr: 3\n", "optimm.lr: unknown key; did you mean 'optim.lr'?"),
        ("optim:\n  lr: fast\n", "optim.lr: 'fast' is not valid; expected float"),
        ("optim:\n  lr: -1\n", "optim.lr = -1.0"),
        ("optim:\n  lr: [3\n", "line 2"),
        ("just words", "just words"),
        ("", "expected settings, such as 'train: {epochs: 3}', found nothing"),
        ("- 1", "found [1]"),
        ("optim: 3\n", "optim: 3 is not valid; expected settings, such as optim.name"),
        ("optim:\n", "found {'optim': None}"),
        ("!!python/object/apply:os.system ['true']", "python/object"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        parse(Config, [f"--config={path}"])
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_names_the_recipe_that_has_it(recipe, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("optim: {lr: fast}\n")
    with pytest.raises(ConfigError, match=rf"^{other}: optim.lr: 'fast' is not valid"):
        parse(Config, ["--config", str(recipe), "--config", str(other)])
    with pytest.raises(ConfigError, match=r"^optim.lr: 'slow' is not valid"):
        parse(Config, ["--config", str(recipe), "--optim.lr=slow"])


def test_bytes_that_are_no_text_are_no_recipe(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\x80\xff")
    with pytest.raises(ConfigError, match="is not a recipe in YAML: 'utf-8' codec"):
        parse(Config, [f"--config={path}"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet50_bat", "did you mean 'image/recipes/resnet50_bat.yaml'?"),
        ("image/recipes/resnet50-bat.yml", "did you mean 'image/recipes/resnet50_bat.yaml'?"),
        ("zzz", "recipes are in 'image/recipes'"),
        ("image", "is not an existing file"),
    ],
)
def test_a_recipe_that_is_not_there(name, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        parse(image.train.Config, ["--config", name])
    assert str(error.value).startswith(f"config: {name!r} is not an existing file; ")
    assert expected in str(error.value)


@pytest.mark.parametrize("many", [False, True])
def test_what_is_positional_is_missing(many):
    with pytest.raises(ConfigError, match=r"^no run: expected a run's folder\.$"):
        parse(Config, [], positional=Positional("run", "A run's folder.", many))


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        parse(Config, ["--help"])
    assert done.value.code == 0
    words = capsys.readouterr().out
    for text in ("Learning rate for the whole batch.", "How weights move", "--model.args", "default: 0.1"):
        assert text in words


@pytest.mark.parametrize(
    "words", [["--fast"], ["--fast", "--optim.lr=1"], ["--fast", "true"], ["--fast=true"]]
)
def test_a_switch_alone_is_on(words):
    @dataclass
    class Switched:
        fast: bool = False
        optim: Optim = field(default_factory=Optim)

    assert parse(Switched, words)[0].fast
    assert not parse(Switched, ["--fast", "false"])[0].fast
