"""One cluster for all tests, and what they submit: the repository's own launchers on the digits."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from common.data.digits import prepare_digits
from tests.processes import ROOT, SMALL, last_step, metrics, run
from tests.slurm.cluster import Cluster, missing

LAUNCHER = "slurm/imagenet_resnet50_bat.sh"
OPTIONS = SMALL | {"data.workers": 1, "train.epochs": 3}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), ROOT)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(path, "folder")
    return path


class Jobs:
    """Submits launchers with the small model and watches what they do."""

    def __init__(self, cluster: Cluster, data: Path, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        # Set here, so that a developer's own slurm/site.env changes nothing.
        self.environment = {"DATA": str(data), "PROCESSES": "1", "MODULES": "", "CONTAINER": "", "VENV": ""}
        self.submitted: list[str] = []

    def submit(
        self, name: str, *sbatch: str, options: dict[str, object] | None = None, **environment: str
    ) -> str:
        """Submit a run with ``--nodes=2`` unless told otherwise, into the folder ``name``."""
        words = [f"--{key}={value}" for key, value in (OPTIONS | (options or {})).items()]
        environment = self.environment | {"OUT": str(self.folder / name)} | environment
        sbatch = sbatch or ("--nodes=2",)
        self.submitted.append(self.cluster.sbatch(*sbatch, LAUNCHER, *words, **environment))
        return self.submitted[-1]

    def evaluate(self, name: str) -> str:
        """Submit the evaluation of a run on two nodes."""
        environment = self.environment | {"RUNS": str(self.folder)}
        self.submitted.append(
            self.cluster.sbatch("--nodes=2", "slurm/eval_imagenet.sh", self.folder / name, **environment)
        )
        return self.submitted[-1]

    def reach(self, job: str, name: str, step: int) -> None:
        """Wait until the run has done a step."""
        self.cluster.wait(lambda: last_step(self.folder / name) >= step, 120, f"step {step}", job)

    def cancel(self) -> None:
        """Cancel what is not done."""
        for job in self.submitted:
            with contextlib.suppress(AssertionError):
                self.cluster.client("scancel", job)
        self.cluster.wait(lambda: self.cluster.node_states() == {"idle"}, 60, "idle nodes")


@pytest.fixture
def jobs(cluster, digits, tmp_path):
    jobs = Jobs(cluster, digits, tmp_path)
    yield jobs
    jobs.cancel()


@pytest.fixture(scope="session")
def reference(tmp_path_factory, digits):
    """The metrics of a run of two processes that never met SLURM, and that nothing ever disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    options = {"config": "image/recipes/resnet50_bat.yaml"} | OPTIONS | {"data.path": digits, "out": folder}
    done = run("image/train.py", processes=2, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return {split: metrics(folder, split) for split in ("train", "val")}
