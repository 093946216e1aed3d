"""Export a network: `python -m common.export SOURCE OUT.safetensors|OUT.onnx|OUT.pt2`.

    python -m common.export RUN digits.onnx                                  a run's newest checkpoint
    python -m common.export FILE bat.onnx --model resnet50_bat               published weights
    python -m common.export RUN digits.onnx --check                          and compares its logits with torch's
    python -m common.export RUN digits.safetensors                           weights, settings and classes

ONNX and torch.export (.pt2) files take batches of any size, float32, normalised as in training; they hold the input's
mean and deviation, and the classes, as metadata (.onnx).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from common.attention.attach import evaluating
from common.config import Commands
from common.engine.run import read_file, run_of
from common.errors import ConfigError, UserError, run_main
from common.files import atomic_write
from common.models.build import ModelConfig, build_model, misfit
from common.models.table import import_models, input_size
from common.weights import architecture, load_weights

SUFFIXES = (".safetensors", ".onnx", ".pt2")
LARGEST_DIFFERENCE = 1e-3
"""Of a file's logits from torch's, as a share of the largest logit; rounding alone stays well below."""


def main() -> int:
    """Do what the command line says; returns the exit code."""
    arguments = _parser().parse_args()
    if arguments.out.suffix not in SUFFIXES or not arguments.out.parent.is_dir():
        raise ConfigError(
            f"{str(arguments.out)!r}: expected a name that ends in {', '.join(SUFFIXES)}, in a folder that exists"
        )
    if arguments.check and arguments.out.suffix == ".safetensors":
        raise ConfigError("--check: a .safetensors file has weights and no network; leave it out")
    for option, numbers in (("input-size", arguments.input_size), ("num-classes", [arguments.num_classes])):
        if any(number is not None and number < 1 for number in numbers or []):
            raise ConfigError(f"--{option} {' '.join(map(str, numbers))}: expected at least 1")
    model, about = open_model(arguments.source, arguments.model, arguments.num_classes)
    size = tuple(arguments.input_size or about.pop("size", None) or input_size(model))
    about |= {"input_size": "x".join(map(str, size))}
    if why := misfit(model, size):
        raise ConfigError(f"--input-size {' '.join(map(str, size))} does not fit the network: {why}")
    content = encoded(model, arguments.out.suffix, size, about)
    if arguments.check:
        print(checked(content, arguments.out.suffix, model, size))
    with atomic_write(arguments.out) as file:
        file.write(content)
    print(f"written: {arguments.out}, {about['model']}, input {about['input_size']}")
    return 0


def open_model(
    source: str, name: str | None = None, num_classes: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with its weights, and what is known about it: texts, and ``size``, its input's (C, H, W) in a run.

    Args:
        source: a run's folder, one checkpoint's folder, or a file of weights.
        name: the model's, for a file.
        num_classes: of the file's network; the model's own by default.

    Raises:
        UserError: there are no such weights, or it is unknown of which model.
    """
    import_models()
    run = run_of(source)
    about: dict[str, Any] = {"source": Path(source).name}
    if run is None:
        if name is None:
            raise ConfigError(f"{source!r} is not a run's folder: name its model with --model")
        published = timm.get_pretrained_cfg(name)
        settings, classes = ModelConfig(name), num_classes or (published.num_classes if published else 1000)
    else:
        config = read_file(run / "config.yaml")
        evaluation = run / "evaluation.json"
        if not evaluation.is_file():
            raise UserError(f"{run}: no evaluation.json; a run is exported once it has been evaluated")
        names = read_file(evaluation)["classes"]
        settings, classes = ModelConfig(**config["model"]), len(names)
        augment = config.get("augment", {})
        about |= {"classes": json.dumps(names), "settings": json.dumps(config["model"])}
        about |= {key: json.dumps(augment[key]) for key in ("mean", "std") if key in augment}
        if "size" in augment:
            about["size"] = (3, augment["size"], augment["size"])
        if clip := config.get("clip"):
            about["size"] = (3, clip["seq_length"], clip["size"], clip["size"])
    model = build_model(settings, classes).eval()
    load_weights(model, source)
    return model, about | {"model": architecture(model) or settings.name}


def encoded(model: nn.Module, suffix: str, size: tuple[int, ...], about: dict[str, str]) -> bytes:
    """The file's content; see :func:`to_onnx` and :func:`to_pt2`."""
    if suffix == ".safetensors":
        return save({key: t.contiguous() for key, t in model.state_dict().items()}, {"format": "pt", **about})
    return to_onnx(model, size, about) if suffix == ".onnx" else to_pt2(model, size)


def exported(model: nn.Module, size: tuple[int, ...]) -> Any:
    """``torch.export``'s program of ``model`` in evaluation mode, for batches of any size of inputs of ``size``."""
    own = next(model.parameters())
    example = torch.zeros(2, *size, device=own.device, dtype=own.dtype)
    with evaluating(model):
        return torch.export.export(
            _Named(model), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )


def to_pt2(model: nn.Module, size: tuple[int, ...]) -> bytes:
    """The content of a file for ``torch.export.load``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        torch.export.save(exported(model, size), path)
        return path.read_bytes()


def to_onnx(model: nn.Module, size: tuple[int, ...], about: dict[str, str]) -> bytes:
    """The content of an ONNX file from ``images`` (batch, \\*size) to ``logits`` (batch, classes).

    Raises:
        UserError: onnx and onnxscript are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install onnx onnxscript") from None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    program: Any = torch.onnx.export(
        exported(model, size), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
    )
    assert program is not None
    program.optimize()
    proto = program.model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=str(value))
    content: bytes = proto.SerializeToString()
    return content


def checked(content: bytes, suffix: str, model: nn.Module, size: tuple[int, ...]) -> str:
    """A line about :func:`difference`.

    Raises:
        UserError: it is more than ``LARGEST_DIFFERENCE``.
    """
    share = difference(content, suffix, model, size)
    if not share <= LARGEST_DIFFERENCE:
        raise UserError(
            f"the file's logits differ from torch's by {share:.1e} of the largest; nothing is written"
        )
    return f"checked: its logits differ from torch's by at most {share:.1e} of the largest"


def difference(
    content: bytes, suffix: str, model: nn.Module, size: tuple[int, ...], batches: Sequence[int] = (1, 3)
) -> float:
    """The largest difference of an exported file's logits from those of ``model``, as a share of the largest logit.

    Args:
        content: the file's, for ``suffix`` ``.onnx``, run by onnxruntime on the CPU, or ``.pt2``.
        size: of one input.
        batches: sizes of the batches of noise that both see.

    Raises:
        UserError: onnxruntime is not installed.
    """
    own = next(model.parameters())
    run = _onnx_runner(content) if suffix == ".onnx" else torch.export.load(io.BytesIO(content)).module()
    differences, largest = [], []
    with evaluating(model):
        for batch in batches:
            images = torch.randn(batch, *size, device=own.device, dtype=own.dtype)
            logits = model(images)
            differences.append(float((run(images) - logits).abs().max()))
            largest.append(float(logits.abs().max()))
    return max(differences) / max(largest)


def _onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--check of ONNX needs {error.name}: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    return run


class _Named(nn.Module):
    """The model behind an input that is called ``images``, whatever the model itself calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def _parser() -> argparse.ArgumentParser:
    parser = Commands(
        prog="python -m common.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a run's folder, a checkpoint, or a file of weights")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--model", metavar="NAME", help="the model of a file of weights")
    parser.add_argument("--num-classes", type=int, help="of a file of weights; the model's own by default")
    parser.add_argument("--input-size", type=int, nargs="+", metavar="N", help="C H W, for video C T H W")
    parser.add_argument("--check", action="store_true", help="compare logits with torch's, then write")
    return parser


if __name__ == "__main__":
    run_main(main)
