"""Weights of every kind: read as data only, translated, and every difference named in one line."""

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import image.models  # noqa: F401  (registers the models)
from common.engine import checkpoint
from common.weights import (
    WeightsError,
    load_published,
    load_weights,
    published_layout,
    read_state_dict,
    translated_models,
)
from common.weights.__main__ import convert, listing
from tests.parity.fill import fill_state_dict
from tests.parity.golden import manifest

SMALL = "mobilenetv3_small_base"  # its published names differ from ours


class Net(nn.Module):
    def __init__(self, architecture="", outputs=2):
        super().__init__()
        self.fc = nn.Linear(3, outputs)
        self.bn = nn.BatchNorm1d(outputs)
        self.pretrained_cfg = {"architecture": architecture}


class Payload:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        key: torch.rand_like(t) if t.is_floating_point() else t + 7 for key, t in Net().state_dict().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refusal(path):
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


WRAPPED = {
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "module prefix": lambda state: {f"module.{key}": t for key, t in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    "model": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]},
    },
    "all of it": lambda state: {"state_dict": {f"module.{key}": t for key, t in state.items()}, "arch": "x"},
    "a command line": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, data="x")},
    "NumPy's numbers": lambda state: {"state_dict": state, "top1": np.float64(70.1), "n": np.int64(3)},
    "other keys": lambda state: state | {1: "one", "lr": 0.1},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_and_formats_of_pytorch(tmp_path, state, wrap, zipped):
    path = tmp_path / "weights.pth.tar"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path), state)
    model = Net()
    assert not load_published(model, path)
    assert same(model.state_dict(), state)


def test_safetensors(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    assert same(read_state_dict(tmp_path / "weights.safetensors"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_in_one_line_and_not_run(tmp_path, state, zipped):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"state_dict": state, "x": Payload(trace)}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "refused, holds more than plain data (" in message
    assert "mkdir); nothing of it was run" in message
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload does work"


def test_a_bare_pickle_and_a_pickled_model_are_refused(tmp_path):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(tmp_path / "trace"), protocol=2))
    assert "refused, holds more than plain data" in refusal(tmp_path / "bare.pth")
    (tmp_path / "newer.pth").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    refusal(tmp_path / "newer.pth")
    assert not (tmp_path / "trace").exists()
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    assert "(torch.nn.modules.linear.Linear)" in refusal(tmp_path / "model.pth")


def tar_of_old_pytorch():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
    return data.getvalue()


def saved(value, **kwargs):
    data = io.BytesIO()
    torch.save(value, data, **kwargs)
    return data.getvalue()


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"]
)
def test_what_programs_wrap_weights_in(tmp_path, state, wrapper):
    arguments = argparse.Namespace(output_dir=Path("runs"), lr=0.1)
    torch.save({"epoch": 3, wrapper: state, "args": arguments}, tmp_path / "weights.pth")
    assert read_state_dict(tmp_path / "weights.pth").keys() == state.keys()


def test_batches_that_old_programs_did_not_count(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "weights.pth")
    assert not load_published(model, tmp_path / "weights.pth")


NUMBERS = {"a": torch.arange(3000.0)}
UNREADABLE = {
    "MXNet": (
        struct.pack("<QQ", 0x112, 0) + bytes(100),
        "MXNet's .params format is not supported; load it with",
    ),
    "tar": (tar_of_old_pytorch(), "a tar archive, the format of PyTorch before 0.1.10, is not supported"),
    "cut": (saved(NUMBERS)[:5000], "damaged, cut short, or not a checkpoint"),
    "cut, before 1.6": (saved(NUMBERS, _use_new_zipfile_serialization=False)[:5000], "damaged, cut short"),
    "text": (b"hello world\n" * 20, "damaged, cut short, or not a checkpoint"),
    "web page": (b"<!DOCTYPE html><html>not found</html>", "damaged, cut short, or not a checkpoint"),
    "noise": (np.random.default_rng(0).bytes(999), "damaged, cut short, or not a checkpoint"),
    "empty": (b"", "damaged, cut short, or not a checkpoint"),
    "list": (saved([1, 2]), "holds a list, expected a state dict"),
    "tensor": (saved(torch.ones(2)), "holds a Tensor, expected a state dict"),
    "no tensors": (saved({"epoch": 1}), "no tensors found; expected a state dict"),
}


@pytest.mark.parametrize("content, expected", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_says_why(tmp_path, recwarn, content, expected):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert expected in refusal(path)
    assert not recwarn.list, "nothing besides the one line"


@pytest.mark.parametrize("cut", [3, -10])
def test_cut_safetensors(tmp_path, state, cut):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:cut])
    assert "damaged, cut short, or not a checkpoint (SafetensorError" in refusal(path)


def test_a_file_that_is_not_there(tmp_path):
    assert "does not exist or is not a file" in refusal(tmp_path / "none.pth")
    assert "does not exist or is not a file" in refusal(tmp_path)


def test_every_difference_is_named(state):
    del state["fc.bias"]
    state["bn.weight"] = torch.ones(5)
    state["head.extra"] = torch.ones(1)
    model = Net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_published(model, state)
    assert str(error.value) == (
        "state dict does not fit Net: 1 missing: fc.bias; 1 unexpected: head.extra; "
        "1 misshapen: bn.weight (5,) for (2,)"
    )
    assert same(model.state_dict(), before), "nothing was loaded"

    report = load_published(model, state, strict=False)
    assert (report.missing, report.unexpected) == (["fc.bias"], ["head.extra"])
    assert report.misshapen == ["bn.weight (5,) for (2,)"]
    after = model.state_dict()
    assert torch.equal(after["fc.weight"], state["fc.weight"]), "what fits was loaded"
    for key in ("fc.bias", "bn.weight"):
        assert torch.equal(after[key], before[key])


def test_published_names_are_translated_for_their_architecture(state):
    @published_layout("a test's net")
    def layout(published):
        return {key.replace("classifier.", "fc."): t for key, t in published.items()}

    with pytest.raises(ValueError, match="registered twice"):
        published_layout("a test's net")(layout)
    published = {f"module.{key}".replace("fc.", "classifier."): t for key, t in state.items()}
    model = Net("a test's net")
    load_published(model, {"state_dict": published})
    assert same(model.state_dict(), state)
    with pytest.raises(WeightsError, match="does not fit another net"):
        load_published(Net("another net"), published)


@pytest.mark.parametrize("averaged", [False, True])
def test_folders_of_runs_and_checkpoints(tmp_path, state, averaged):
    old = {key: torch.zeros_like(t) for key, t in state.items()}
    content = (
        {"model.safetensors": old, "ema.safetensors": state} if averaged else {"model.safetensors": state}
    )
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"model.safetensors": old})
    newest = checkpoint.save(tmp_path / "run" / "checkpoints", 2, content)
    for path in (tmp_path / "run", newest):
        model = Net()
        line = load_weights(model, path)
        assert same(model.state_dict(), state)
        assert line == f"weights from {newest / list(content)[-1]}: every key loaded"
    with pytest.raises(WeightsError, match="neither a run's folder nor one of its checkpoints"):
        load_weights(Net(), tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(WeightsError, match=f"the run '{tmp_path}' has no whole checkpoint yet"):
        load_weights(Net(), tmp_path)
    line = load_weights(Net(outputs=5), newest, strict=False)
    assert "misshapen: fc.weight (2, 3) for (5, 3), fc.bias (2,) for (5,)" in line


@pytest.fixture(scope="module")
def published():
    return {f"module.{key}": t for key, t in fill_state_dict(manifest(SMALL)["state_dict"]).items()}


def test_a_converted_checkpoint_has_our_names_and_says_what_it_is(tmp_path, published):
    assert SMALL in translated_models()
    torch.save({"state_dict": published}, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    line = convert(tmp_path / "in.pth", tmp_path / "out.safetensors", SMALL)
    assert line == f"written: {tmp_path / 'out.safetensors'}, {len(published)} tensors of {SMALL}"
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "model": SMALL, "source": "in.pth"}
    direct, again = timm.create_model(SMALL), timm.create_model(SMALL)
    load_published(direct, tmp_path / "in.pth")
    assert load_weights(again, tmp_path / "out.safetensors").endswith("every key loaded")
    assert same(direct.state_dict(), again.state_dict())


def test_a_converted_file_is_not_translated_again(tmp_path, state):
    @published_layout("swapped")
    def layout(published):
        return published | {"bn.weight": published["bn.bias"], "bn.bias": published["bn.weight"]}

    model = Net("swapped")
    load_published(model, state)
    assert torch.equal(model.bn.weight, state["bn.bias"])
    save_file(model.state_dict(), tmp_path / "out.safetensors", {"model": "swapped", "source": "x"})
    again = Net("swapped")
    load_published(again, tmp_path / "out.safetensors")
    assert same(again.state_dict(), model.state_dict())


def test_conversion_of_another_number_of_classes(tmp_path, published):
    few = published | {
        "module.classifier.1.weight": torch.ones(3, 1280),
        "module.classifier.1.bias": torch.ones(3),
    }
    torch.save(few, tmp_path / "in.pth")
    with pytest.raises(WeightsError, match=r"classifier.weight \(3, 1280\) for \(1000, 1280\)"):
        convert(tmp_path / "in.pth", tmp_path / "out.safetensors", SMALL)
    assert list(tmp_path.iterdir()) == [tmp_path / "in.pth"]
    convert(tmp_path / "in.pth", tmp_path / "out.safetensors", SMALL, num_classes=3)


@pytest.mark.parametrize(
    "target, model, message",
    [
        ("out.safetensors", "san10_pairwize", "no such model; did you mean 'san10_pairwise'"),
        ("out.pth", SMALL, "expected a name that ends in .safetensors"),
        ("none/out.safetensors", SMALL, "in a folder that exists"),
    ],
)
def test_mistakes_in_a_conversion(tmp_path, target, model, message):
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in.pth", tmp_path / target, model)


def test_the_list_names_models_and_what_their_weights_are():
    lines = dict(line.split(maxsplit=1) for line in listing())
    assert lines["san10_pairwise"] == "published names are ours"
    assert lines[SMALL] == "published names are translated"
    assert lines["resnet50_fbn"] == "MXNet's published names are translated, its .params files not read"
    assert lines["resnet18"] == "published names are translated"


def test_the_command_line(tmp_path, published):
    """In a process of its own: there the module runs as __main__ and still must know the models' layouts."""
    torch.save(published, tmp_path / "in.pth")
    arguments = ["convert", tmp_path / "in.pth", tmp_path / "out.safetensors", "--model", SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "common.weights", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("written: ")
    assert "classifier.weight" in read_state_dict(tmp_path / "out.safetensors")
    (tmp_path / "in.pth").write_bytes(json.dumps({"no": "weights"}).encode())
    done = subprocess.run(
        [sys.executable, "-m", "common.weights", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
