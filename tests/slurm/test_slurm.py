"""The launchers on a real SLURM: two nodes, signals, requeues, a dead node, arrays, GPUs, mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml

from tests.processes import last_step, metrics
from tests.slurm.conftest import LAUNCHER

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

# Checkpoints only when stopped, and at an epoch's end, which comes later: nothing is lost, or all is.
ONLY_WHEN_STOPPED = {"checkpoint.every_steps": 0}


def assert_same_run(folder, reference):
    for split in ("train", "val"):
        assert metrics(folder, split) == reference[split]


def assert_continued(output, *, by):
    """The job printed that it was stopped or killed, restarted once, and continued a checkpoint."""
    assert by in output
    steps = [int(step) for step in re.findall(r"continuing \S+ at step (\d+)", output)]
    assert len(steps) == 1, output
    assert steps[0] > 0


def test_two_nodes_train_as_two_processes_do_and_a_finished_run_is_left_alone(
    cluster, jobs, reference, tmp_path
):
    job = jobs.submit("run")
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    assert_same_run(tmp_path / "run", reference)
    logs = tmp_path / "run" / "logs" / f"{job}.0"
    assert {"rank-0.log", "rank-1.log", "node-0.log", "node-1.log"} <= set(os.listdir(logs))
    assert (logs / "rank-0.log").read_text().splitlines()[-1] in cluster.output(job)
    before = metrics(tmp_path / "run")
    cluster.client("scontrol", "requeue", job)
    cluster.wait(lambda: "has finished already" in cluster.output(job), 60, "second start", job)
    assert cluster.finish(job) == "COMPLETED"
    assert not logs.with_name(f"{job}.1").exists(), "no training process was started"
    assert metrics(tmp_path / "run") == before


def test_usr1_stops_all_ranks_and_the_job_requeues_itself(cluster, jobs, reference, tmp_path):
    job = jobs.submit("run", options=ONLY_WHEN_STOPPED)
    jobs.reach(job, "run", 6)
    cluster.client("scancel", "--batch", "--signal=USR1", job)
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert_continued(cluster.output(job), by="ended with code 75; requeueing")
    assert_same_run(tmp_path / "run", reference)


def test_preemption_stops_all_ranks_and_loses_nothing(cluster, jobs, reference, tmp_path):
    job = jobs.submit("run", "--nodes=2", "--partition=spot", options=ONLY_WHEN_STOPPED)
    jobs.reach(job, "run", 6)
    other = cluster.sbatch("--nodes=2", "--exclusive", "--wrap=sleep 1")
    assert cluster.finish(other) == "COMPLETED"
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert_continued(cluster.output(job), by="ended with code 75; requeueing")
    assert_same_run(tmp_path / "run", reference)


def test_scontrol_requeue_continues_exactly(cluster, jobs, reference, tmp_path):
    job = jobs.submit("run")
    jobs.reach(job, "run", 6)
    cluster.client("scontrol", "requeue", job)
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert_continued(cluster.output(job), by="start 1:")
    assert_same_run(tmp_path / "run", reference)


def test_a_dead_node_costs_only_the_steps_since_the_last_checkpoint(cluster, jobs, reference, tmp_path):
    job = jobs.submit("run")
    jobs.reach(job, "run", 6)
    cluster.kill_node("node2")
    cluster.wait(lambda: cluster.show(job)["Restarts"] == "1", 90, "requeue after the node's death", job)
    cluster.start_node("node2")
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    assert_continued(cluster.output(job), by="start 1:")
    assert_same_run(tmp_path / "run", reference)


def test_a_killed_rank_ends_the_others_and_the_job_requeues_itself(cluster, jobs, reference, tmp_path):
    job = jobs.submit("run")
    jobs.reach(job, "run", 6)
    os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGKILL)
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert "on node2, the ranks with: 137; see" in cluster.output(job)
    assert_continued(cluster.output(job), by="ended with code 1; requeueing")
    assert_same_run(tmp_path / "run", reference)


def process_of_rank(rank, folder):
    """The training process of a rank that is not another's child, as its data workers are."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes().split(b"\0")
            python = command[0].endswith(b"python") and f"--out={folder}".encode() in command
            if python and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return min(found)


def test_the_time_limit_requeues_and_scancel_does_not(cluster, jobs, tmp_path):
    endless = {"train.epochs": 10_000, "train.eval_every": 10_000} | ONLY_WHEN_STOPPED
    job = jobs.submit("run", "--time=1", "--signal=B:USR1@25", options=endless, PROCESSES="2")
    cluster.wait(lambda: "continuing" in cluster.output(job), 150, "second start", job)
    assert_continued(cluster.output(job), by="ended with code 75; requeueing")
    stopped_at = last_step(tmp_path / "run")
    jobs.reach(job, "run", stopped_at + 3)
    cluster.client("scancel", job)
    assert cluster.finish(job) == "CANCELLED"
    cluster.wait(lambda: cluster.node_states() == {"idle"}, 60, "idle nodes")
    assert cluster.state(job) == "CANCELLED"
    assert cluster.show(job)["Restarts"] == "1"


def test_a_run_is_evaluated_on_two_nodes(cluster, jobs, tmp_path):
    job = jobs.submit("run", "--nodes=1", options={"train.epochs": 0.3})
    assert cluster.finish(job) == "COMPLETED", cluster.output(job)
    evaluation = jobs.evaluate("run")
    assert cluster.finish(evaluation) == "COMPLETED", cluster.output(evaluation)
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["top1"] == metrics(tmp_path / "run", "val")[-1]["top1"]
    assert found["samples"] == 355
    assert "2 nodes × 1 processes" in cluster.output(evaluation)


def test_an_array_trains_a_seed_a_task_and_requeues_each_alone(cluster, jobs, tmp_path):
    job = jobs.submit("run", "--array=0-1", options={"train.epochs": 1.5})
    jobs.reach(f"{job}_0", "run/seed-0", 4)
    cluster.client("scancel", "--batch", "--signal=USR1", f"{job}_0")
    for seed in (0, 1):
        assert cluster.finish(f"{job}_{seed}") == "COMPLETED", cluster.output(f"{job}_{seed}")
        config = yaml.safe_load((tmp_path / "run" / f"seed-{seed}" / "config.yaml").read_text())
        assert config["train"]["seed"] == seed
        assert cluster.show(f"{job}_{seed}")["Restarts"] == ("1" if seed == 0 else "0")
    assert metrics(tmp_path / "run" / "seed-0") != metrics(tmp_path / "run" / "seed-1")


def test_gpus_are_requested_counted_and_never_replaced_by_the_cpu(cluster, jobs):
    refused = cluster.client("sbatch", "--gres=gpu:9", LAUNCHER, check=False)
    assert "Requested node configuration is not available" in refused
    job = jobs.submit("run", "--gres=gpu:2", PROCESSES="")
    assert cluster.finish(job) == "FAILED"
    assert cluster.show(job)["TresPerNode"] == "gres:gpu:2"
    output = cluster.output(job)
    assert "1 nodes × 2 processes" in output
    assert "error: SLURM gave 2 GPUs on node1, torch sees: 0" in output
    assert cluster.show(job)["Restarts"] == "0"


def test_a_bad_option_is_one_line_and_not_requeued(cluster, jobs, tmp_path):
    job = jobs.submit("run", options={"optim.lrr": 1})
    assert cluster.finish(job) == "FAILED"
    shown = cluster.show(job)
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
    assert "Traceback" not in cluster.output(job)
    errors = [line for line in cluster.output(job).splitlines() if line.startswith("error")]
    assert errors == ["error: optim.lrr: unknown key; did you mean 'optim.lr'?"]


def test_a_crash_loop_ends(cluster, jobs):
    job = jobs.submit("run", "--nodes=1", CONTAINER="false", MAX_RESTARTS="1")
    assert cluster.finish(job) == "FAILED"
    assert cluster.show(job)["Restarts"] == "2"
    assert cluster.output(job).count("ended with code 1; requeueing") == 2
    assert "error: 1 restarts without a new checkpoint" in cluster.output(job)
