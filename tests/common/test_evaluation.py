"""What comes before an evaluation: the checkpoint, its run's settings, and one line for what is wrong."""

import pytest

import cifar.eval
import image.train
import image.visualize
from common.config import Positional
from common.errors import ConfigError
from common.evaluation import parse_checkpoint, parse_with_run
from common.recipes import recipes_of

WORDS = Positional("run", "A run's folder, then images.", many=True)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-000000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-000000001" / "model.safetensors").touch()
    (folder / "config.yaml").write_text("out: runs/before\ndata: {synthetic: 5}\naugment: {size: 40}\n")
    return folder


@pytest.mark.parametrize(
    "place", ["", "checkpoints/step-000000001", "checkpoints/step-000000001/model.safetensors"]
)
def test_a_checkpoint_brings_its_runs_settings_and_folder(run, place):
    config, checkpoint, found = parse_checkpoint(image.train.Config, [str(run / place)], None)
    assert (config.augment.size, checkpoint) == (40, str(run / place))
    assert config.out == str(found) == str(run)


def test_out_leads_elsewhere(run):
    config, _, found = parse_checkpoint(image.train.Config, [str(run), "--out", "elsewhere"], None)
    assert (config.out, found) == ("elsewhere", run)


@pytest.mark.parametrize("argv", [[], ["--data.workers", "0", "RUN"]])
def test_the_checkpoint_comes_first(argv):
    with pytest.raises(
        ConfigError, match="^expected first a run's folder, one checkpoint's folder, or a file of"
    ):
        parse_checkpoint(image.train.Config, argv, None)
    with pytest.raises(ConfigError, match="^expected first a run's folder, then images; options behind it$"):
        parse_with_run(image.visualize.VisualizeConfig, argv, None, WORDS)


def test_files_behind_the_checkpoint_leave_the_settings_alone(run):
    config, words, _ = parse_with_run(image.visualize.VisualizeConfig, [str(run), "a.jpg"], None, WORDS)
    assert words == [str(run), "a.jpg"]
    assert config.checkpoint.keep == 2


def test_a_run_of_another_task(run):
    with pytest.raises(
        ConfigError, match=r"config.yaml: data.synthetic: unknown key; .* by another task's train.py\?$"
    ):
        parse_checkpoint(cifar.eval.EvalConfig, [str(run)], None)


def test_a_bad_option_is_not_blamed_on_the_run(run):
    with pytest.raises(ConfigError, match=r"^data.synthetic: 'many' is not valid"):
        parse_checkpoint(image.train.Config, [str(run), "--data.synthetic=many"], None)


def test_a_file_of_weights_does_not_say_whose_they_are(tmp_path):
    file = tmp_path / "weights.pth"
    file.touch()
    with pytest.raises(
        ConfigError, match="weights.pth' is a file without a run: name its network by --model.name"
    ):
        parse_checkpoint(image.train.Config, [str(file), "--data.path=x"], None)
    config, _, run = parse_checkpoint(image.train.Config, [str(file), "--model.name=resnet18_bat"], None)
    assert (config.model.name, run) == ("resnet18_bat", None)


def test_a_networks_own_recipe_says_how_its_images_are_made(tmp_path):
    file = tmp_path / "weights.pth"
    file.touch()
    named = [str(file), "--model.name=mixer_s16_224"]
    config, _, _ = parse_checkpoint(image.train.Config, named, None)
    assert config.augment.mean == config.augment.std == (0.5, 0.5, 0.5)
    config, _, _ = parse_checkpoint(image.train.Config, [*named, "--augment.mean=[0.4,0.4,0.4]"], None)
    assert (config.augment.mean, config.augment.std) == ((0.4, 0.4, 0.4), (0.5, 0.5, 0.5))
    config, words, _ = parse_with_run(
        image.visualize.VisualizeConfig, [str(file), "a.jpg", "--model.name=mixer_s16_224"], None, WORDS
    )
    assert (words, config.augment.std) == ([str(file), "a.jpg"], (0.5, 0.5, 0.5))
    other = ["--config", str(recipes_of(image.train.Config) / "san10_pairwise.yaml")]
    config, _, _ = parse_checkpoint(image.train.Config, [*named, *other], None)
    assert config.augment.std != (0.5, 0.5, 0.5)


def test_no_such_checkpoint():
    with pytest.raises(ConfigError, match="'nowhere' does not exist; expected a run's folder"):
        parse_checkpoint(image.train.Config, ["nowhere"], None)
