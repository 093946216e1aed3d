"""A run's weights as one file."""

import pytest
import timm
import torch
import yaml
from safetensors import safe_open

from common.engine import checkpoint
from common.engine.consolidate import consolidate
from common.errors import UserError
from common.weights import load_weights

NAME = "test_resnet"


def network(seed):
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=7)


@pytest.fixture
def folder(tmp_path):
    """A run with two checkpoints, the second with averaged weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"name": NAME}}))
    for step in (5, 10):
        content = {"model.safetensors": network(step).state_dict(), "state.json": {}}
        if step == 10:
            content["ema.safetensors"] = network(0).state_dict()
        checkpoint.save(folder / "checkpoints", step, content)
    return folder


def same(model, seed):
    wanted = network(seed).state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("plain, seed", [(False, 0), (True, 10)])
def test_timm_and_this_project_load_it(folder, tmp_path, plain, seed):
    out = tmp_path / "weights.safetensors"
    line = consolidate(folder, out, plain)
    assert line.startswith(
        f"written: {out}, {'weights' if plain else 'averaged weights (EMA)'} of {NAME} at step 10"
    )
    assert same(timm.create_model(NAME, num_classes=7, checkpoint_path=str(out)), seed)
    model = network(1)
    assert "every key loaded" in load_weights(model, out)
    assert same(model, seed)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": NAME, "run": "run", "step": "10"}


def test_one_checkpoint_of_the_run(folder, tmp_path):
    consolidate(folder / "checkpoints" / "step-000000005", tmp_path / "w.safetensors")
    assert same(timm.create_model(NAME, num_classes=7, checkpoint_path=str(tmp_path / "w.safetensors")), 5)


def test_the_newest_undamaged_checkpoint_counts(folder, tmp_path, capsys):
    newest = folder / "checkpoints" / "step-000000010"
    (newest / "model.safetensors").write_bytes(b"x")
    assert "at step 5" in consolidate(folder, tmp_path / "w.safetensors")
    assert f"{newest} is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="step-000000010 is damaged"):
        consolidate(newest, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="step-000000010 is damaged"):  # though the averaged weights are not
        load_weights(network(1), newest)
    (folder / "checkpoints" / "step-000000005" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no undamaged checkpoint in"):
        consolidate(folder, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("text", ["model: [1, {", "", "17", "\x00"])
def test_settings_that_are_garbled_are_one_line(folder, tmp_path, text):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        consolidate(folder, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "source, out, expected",
    [
        ("nowhere", "w.safetensors", "expected a run's folder"),
        ("run", "w.pth", "ends in .safetensors"),
        ("run", "no/w.safetensors", "in a folder that exists"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, source, out, expected):
    with pytest.raises(UserError, match=expected):
        consolidate(tmp_path / source, tmp_path / out)
