"""A run's log after a kill: metrics.jsonl and TensorBoard have each entry once."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.engine.log import Log, LogConfig
from common.engine.run import Run, read_metrics

TRAIN = dict.fromkeys(
    ("loss", "top1", "lr", "samples_per_s", "compute_samples_per_s", "data_wait", "memory_gib"), 1.0
)
VAL = {"top1": 2.0, "top5": 3.0, "loss": 4.0, "samples": 5, "unreadable": 0, "confusion": [[1]]}


def start(run, step, evaluated_step):
    run.rewind(step, evaluated_step)
    return Log(run, LogConfig(), steps=9, start=step, main=True)


def steps_in(folder, split):
    """By metrics.jsonl, and by TensorBoard."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = events.Scalars(f"{split}/loss") if f"{split}/loss" in events.Tags()["scalars"] else []
    entries = [entry["step"] for entry in read_metrics(folder) if entry["split"] == split]
    return entries, [scalar.step for scalar in scalars]


def test_what_is_computed_again_is_there_once(tmp_path):
    run = Run(tmp_path)
    log = start(run, 0, 0)
    for step in (1, 2, 3):
        log.train(step, 0.1, TRAIN, 1)
    log = start(run, 0, 0)  # killed before the first checkpoint
    for step in (1, 2, 3, 4):
        log.train(step, 0.1, TRAIN, 1)
    log.evaluation(4, 0.1, VAL)
    log.train(5, 0.1, TRAIN, 1)
    log = start(run, 4, 0)  # the checkpoint of step 4 is from before its evaluation
    assert steps_in(tmp_path, "train") == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert steps_in(tmp_path, "val") == ([], [])
    log.evaluation(4, 0.1, VAL)
    log = start(run, 4, 4)  # that one is from behind it
    log.train(5, 0.1, TRAIN, 1)
    log.close()
    assert steps_in(tmp_path, "train") == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert steps_in(tmp_path, "val") == ([4], [4])


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    run = Run(tmp_path)
    log = start(run, 0, 0)
    log.train(1, 0.1, TRAIN, 1)
    with run.metrics.open("ab") as file:
        file.write(b'{"split": "train", "step": 2, "lo')
    log = start(run, 1, 0)
    log.train(2, 0.1, TRAIN, 1)
    assert [json.loads(line)["step"] for line in run.metrics.read_bytes().splitlines()] == [1, 2]


def test_a_full_disk_is_an_error_that_names_the_event_file(tmp_path):
    log = start(Run(tmp_path), 0, 0)
    log.board._records._writer = open("/dev/full", "ab")  # noqa: SIM115  (the log closes it)
    with pytest.raises(OSError, match="No space left on device") as error:
        log.train(1, 0.1, TRAIN, 1)
    assert error.value.filename == str(log.board.path)
    log.close()
