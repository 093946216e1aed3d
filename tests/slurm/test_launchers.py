"""What the launchers check and submit, where there is no SLURM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.processes import ROOT

LAUNCHERS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "launch.sh")


@pytest.fixture
def repository(tmp_path):
    """A folder with the launchers, the recipes, an environment, and an sbatch that prints what it gets."""
    for name in ("slurm", "image/recipes", "video/recipes", "cifar/recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("site.env"))
    for name in ("image/eval.py", "video/eval.py", "cifar/eval.py", "data/file", "run/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    program(tmp_path / ".venv" / "bin" / "python", "")
    program(tmp_path / "bin" / "sbatch", 'printf "%s|" "$@" "$SBATCH_PARTITION" "$DATA" "$IMAGENET"')
    return tmp_path


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def call(repository, launcher, *arguments, **environment):
    """Call a launcher outside of any job."""
    ours = (
        "SLURM_",
        "SBATCH_",
        "DATA",
        "IMAGENET",
        "KINETICS",
        "CIFAR",
        "VENV",
        "MODULES",
        "CONTAINER",
        "OUT",
        "RUNS",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    kept |= {"PATH": f"{repository}/bin:{os.environ['PATH']}"} | environment
    command = ["bash", str(repository / "slurm" / f"{launcher}.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=kept, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "launcher, arguments, environment, expected",
    [
        ("imagenet_resnet50_bat", [], {"DATA": "/no/where"}, "/no/where (DATA or IMAGENET) does not exist"),
        ("imagenet_resnet50_bat", [], {"DATA": ""}, "set DATA, or IMAGENET in slurm/site.env"),
        ("cifar_fbn", ["resnet164_fbn_cifar10"], {"DATA": ""}, "set DATA, or CIFAR10 in slurm/site.env"),
        ("kinetics_i3d_bat", [], {"DATA": ""}, "set DATA, or KINETICS in slurm/site.env"),
        ("imagenet_resnet50_bat", [], {"VENV": "/no/venv"}, "/no/venv/bin/python does not exist"),
        ("imagenet_resnet50_bat", [], {"MODULES": "cuda"}, "there is no module command"),
        ("imagenet_resnet50_bat", [], {"CONTAINER": "apptainr exec"}, "there is no command apptainr"),
        ("imagenet_resnet50_bat", ["--out=x"], {}, "--out: name the run's folder by OUT"),
        ("imagenet_noah", [], {}, "MODEL is missing; recipes: "),
        (
            "imagenet_noah",
            ["resnet50_noha"],
            {},
            "image/recipes/resnet50_noha.yaml does not exist; recipes: ",
        ),
        ("eval_imagenet", [], {}, "RUN is missing"),
        ("eval_imagenet", ["/no/run"], {}, "/no/run does not exist"),
        ("prepare_imagenet", ["archives"], {}, "expected the archives' folder and the folder to make"),
        ("launch", [], {}, "call one of those"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(
    repository, launcher, arguments, environment, expected
):
    done = call(repository, launcher, *arguments, **({"DATA": "data"} | environment))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize(
    "line", ["IMAGENET = /data", 'IMAGENET="/data', "export IMAGENET", "IMAGENET=/my data", "if"]
)
def test_a_mistake_in_site_env_is_one_line(repository, line):
    (repository / "slurm" / "site.env").write_text(f"# ours\nRUNS=runs\n{line}\n")
    done = call(repository, "imagenet_resnet50_bat", DATA="data")
    assert done.returncode == 2
    assert done.stderr == f'error: slurm/site.env, line 3: expected NAME=value or NAME="value": {line}\n'


def test_called_by_bash_a_launcher_submits_itself_with_what_the_site_says(repository):
    text = 'SBATCH_PARTITION=gpu # ours\nIMAGENET="data"\n\nSBATCH_OPTIONS="--nodes=2 --array=0-4"\n'
    (repository / "slurm" / "site.env").write_text(text)
    done = call(repository, "imagenet_noah", "resnet50_noah", "--optim.lr", "0.05")
    script = "slurm/imagenet_noah.sh|resnet50_noah|--optim.lr|0.05"
    assert done.stdout == f"--nodes=2|--array=0-4|{script}|gpu||data|", done.stderr
    done = call(repository, "imagenet_noah", "resnet50_noah", SBATCH_PARTITION="mine", SBATCH_OPTIONS="")
    assert done.stdout == "slurm/imagenet_noah.sh|resnet50_noah|mine||data|", "the environment goes before"


def test_the_example_of_site_env_is_right(repository):
    example = (repository / "slurm" / "site.env.example").read_text()
    everything = re.sub(r"^# (\w+=)", r"\1", example, flags=re.MULTILINE)
    for text in (example, everything):
        (repository / "slurm" / "site.env").write_text(text)
        done = call(
            repository, "imagenet_resnet50_bat", DATA="data", MODULES="", CONTAINER="", SBATCH_OPTIONS=""
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_every_launcher_finds_what_it_needs(repository, launcher):
    needed = {
        "imagenet_noah": ["resnet50_noah"],
        "imagenet_fbn": ["resnet50_fbn"],
        "cifar_fbn": ["resnet164_fbn_cifar10"],
        "eval_imagenet": ["run"],
        "eval_kinetics": ["run"],
        "eval_cifar": ["run"],
        "prepare_imagenet": ["archives", "made"],
    }
    arguments = needed.get(launcher.stem, [])
    done = call(repository, launcher.stem, *arguments, DATA="data")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"slurm/{launcher.name}|")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_launchers_pass_shellcheck():
    paths = [str(path.relative_to(ROOT)) for path in (*LAUNCHERS, ROOT / "slurm" / "launch.sh")]
    done = subprocess.run(["shellcheck", "-x", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
