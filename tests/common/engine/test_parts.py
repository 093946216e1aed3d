"""Checkpoints in parts: every rank writes its own, and they are whole or not there, like those of one process."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from common.engine import checkpoint
from common.engine.checkpoint import CheckpointError
from common.engine.consolidate import consolidate
from common.engine.parts import Part, Stored, encode
from common.engine.ranks import Ranks
from common.weights import load_weights, read_state_dict

WHOLE = {
    "weight": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)),
    "bias": torch.arange(2.0),
    "scalar": torch.tensor(0.1 + 0.2),
    "count": torch.tensor([[1 << 40]]),
}


def by_rows(tensor, rank, world):
    rows = -(-len(tensor) // world)
    first = min(rows * rank, len(tensor))
    return Part(tensor[first : first + rows], tuple(tensor.shape), first * math.prod(tensor.shape[1:]))


def by_elements(tensor, rank, world):
    """Of unequal sizes: where ZeRO divides all tensors as one, a rank's range of one begins anywhere."""
    first, last = (round(tensor.numel() * (share / world) ** 2) for share in (rank, rank + 1))
    return Part(tensor.flatten()[first:last], tuple(tensor.shape), first)


def own(rank, world, divide=by_elements):
    return {name: divide(tensor, rank, world) if tensor.dim() else tensor for name, tensor in WHOLE.items()}


def content(rank, world, divide=by_elements):
    """What a rank writes."""
    parts = {
        name: value
        for name, value in own(rank, world, divide).items()
        if rank == 0 or isinstance(value, Part)
    }
    files = {checkpoint.part_name(kind, rank, world): parts for kind in ("model", "ema", "optimizer")}
    return files | ({"state.json": {"step": 1}} if rank == 0 else {})


def crew(world):
    """Ranks that are threads."""
    meeting, values = threading.Barrier(world, timeout=30), [None] * world

    def gather(rank):
        def gathered(value):
            values[rank] = value
            meeting.wait()
            found = list(values)
            meeting.wait()
            return found

        return gathered

    return [Ranks(rank, world, gather(rank)) for rank in range(world)]


def together(work, world):
    """What ``work(rank, ranks)`` gives or raises on every rank."""
    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(work, rank, ranks) for rank, ranks in enumerate(crew(world))]
        return [future.exception() or future.result() for future in futures]


def saved(folder, world, step=1):
    (path,) = set(together(lambda r, ranks: checkpoint.save(folder, step, content(r, world), ranks), world))
    return path


@pytest.mark.parametrize("divide", [by_rows, by_elements])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_what_was_divided_is_whole_again_and_divides_otherwise(tmp_path, world, divide):
    stored = Stored()
    for rank in range(world):
        (tmp_path / str(rank)).write_bytes(
            encode(content(rank, world, divide)[f"model-{rank + 1}-of-{world}.safetensors"])
        )
        stored.add_file(tmp_path / str(rank))
    assert set(stored) == set(WHOLE)
    for name, tensor in WHOLE.items():
        assert stored.whole(name).dtype == tensor.dtype
        assert torch.equal(stored.whole(name), tensor)
    for other in (1, 3):
        for rank in range(other):
            wanted = own(rank, other, by_rows)
            for name, value in wanted.items():
                like = torch.zeros_like(value.data if isinstance(value, Part) else value)
                stored.fill(name, Part(like, value.shape, value.offset) if isinstance(value, Part) else like)
                assert torch.equal(like, value.data)


def test_a_hole_is_an_error():
    stored = Stored()
    stored.add("a", Part(torch.ones(2), (2, 2), 2))
    assert torch.equal(stored.read("a", 3, 4), torch.ones(1))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"{name}: "):
            stored.read(name, 1, 3)


def test_every_rank_writes_its_share(tmp_path):
    path = saved(tmp_path, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    names = {f"{kind}-{n}-of-3.safetensors" for kind in ("model", "ema", "optimizer") for n in (1, 2, 3)}
    assert {file.name for file in path.iterdir()} == names | {"state.json", "manifest.json"}
    assert set(json.loads((path / "manifest.json").read_text())) == names | {"state.json"}
    assert together(lambda rank, ranks: checkpoint.newest(tmp_path, ranks), 2) == [path, path]
    state = checkpoint.load(path, "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in WHOLE.items())
    assert sum(len(load_file(path / f"model-{n}-of-3.safetensors")["weight"]) for n in (1, 2, 3)) == 21


@pytest.mark.parametrize(
    "harm, expected", [("flip", "has 6[0-9][0-9] bytes, SHA-256"), ("remove", "is missing")]
)
def test_a_damaged_part_is_named_and_the_checkpoint_before_it_used(tmp_path, capsys, harm, expected):
    before, last = saved(tmp_path, 3, 1), saved(tmp_path, 3, 2)
    part = last / "optimizer-2-of-3.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.unlink()
    if harm == "flip":
        part.write_bytes(data)
    assert together(lambda rank, ranks: checkpoint.newest(tmp_path, ranks), 2) == [before, before]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert f"checkpoint {last} is damaged (optimizer-2-of-3.safetensors" in warnings[0]
    if harm == "remove":
        with pytest.raises(CheckpointError, match="optimizer-2-of-3.safetensors: missing"):
            checkpoint.tensors(last, "optimizer")


def test_weights_in_parts_are_read_and_consolidated_as_whole_ones(tmp_path):
    path = saved(tmp_path / "run" / "checkpoints", 2)
    network = nn.Module()
    for name, tensor in WHOLE.items():
        network.register_buffer(name, torch.zeros_like(tensor))
    for source in (tmp_path / "run", path):
        assert load_weights(network, source) == f"weights from {path}/ema.safetensors: every key loaded"
        assert all(torch.equal(tensor, WHOLE[name]) for name, tensor in network.state_dict().items())
        network.get_buffer("weight").zero_()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "test_resnet"}}))
    for plain, kind in ((True, "weights of"), (False, "averaged weights (EMA)")):
        line = consolidate(tmp_path / "run", tmp_path / "out.safetensors", plain)
        assert kind in line
        assert all(torch.equal(t, WHOLE[n]) for n, t in read_state_dict(tmp_path / "out.safetensors").items())
    (path / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match="is damaged .model-1-of-2.safetensors is missing"):
        consolidate(path, tmp_path / "other.safetensors")


@pytest.mark.parametrize("bad", [0, 2])
def test_where_one_rank_cannot_write_all_say_so_and_nothing_stays(tmp_path, monkeypatch, bad):
    first, write = saved(tmp_path, 3, 1), checkpoint._write

    def failing(folder, files):
        entries = write(folder, files)
        if f"model-{bad + 1}-of-3.safetensors" in files:
            raise OSError(28, "No space left on device")
        return entries

    monkeypatch.setattr(checkpoint, "_write", failing)
    errors = together(lambda rank, ranks: checkpoint.save(tmp_path, 2, content(rank, 3), ranks), 3)
    assert {type(error) for error in errors} == {CheckpointError}
    (line,) = set(map(str, errors))
    assert (
        f"step 2 not written to {tmp_path}: No space left on device (rank {bad}); {first} is intact" in line
    )
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]
    assert checkpoint.damage(first) is None


def test_a_rank_that_fails_otherwise_keeps_none_waiting(tmp_path):
    def work(rank, ranks):
        files = content(rank, 2)
        return checkpoint.save(tmp_path, 1, files | ({"bad.json": {1, 2}} if rank == 1 else {}), ranks)

    (line,) = set(map(str, together(work, 2)))
    assert (
        "TypeError: Object of type set is not JSON serializable (rank 1); there is no earlier checkpoint"
        in line
    )


def test_a_folder_that_nodes_do_not_share_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_UNSEEN_SECONDS", 0.2)

    def work(rank, ranks):
        return checkpoint.save(tmp_path / f"disk of node {rank}", 1, content(rank, 2), ranks)

    errors = together(work, 2)
    for error in errors:
        assert "is not seen here: a run's folder must lie where all nodes see it (rank 1)" in str(error)
    assert not list(tmp_path.rglob("*.safetensors"))


PROCESS = """
import os, resource, signal, sys, torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
from common.engine import checkpoint, parallel
from common.engine.optim import load_named_state, named_state
from common.engine.parts import Part
from common.engine.ranks import all_ranks

folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), 2
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
ranks = all_ranks(0.5)

def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
    return model, optimizer

def state(model, optimizer):
    flat = {f"{n}.{k}": v for n, entry in named_state(model, optimizer).items() for k, v in entry.items()}
    return {"model": parallel.own_state(model), "optimizer": flat}

def content(states):
    return {checkpoint.part_name(kind, rank, world): {
        n: v for n, v in state.items() if rank == 0 or isinstance(v, Part)} for kind, state in states.items()}

def failure(step):
    try:
        checkpoint.save(folder / "checkpoints", step, content(mine), ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

model, optimizer = network(0)
mine = state(model, optimizer)
path = checkpoint.save(folder / "checkpoints", 1, content(mine), ranks)
stored = checkpoint.tensors(path, "model")
whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
assert set(stored) == set(whole)
assert rank or all(torch.equal(stored.whole(n), t) for n, t in whole.items())  # rank 0's running statistics

model, optimizer = network(1)
parallel.load_own_state(model, stored)
load_named_state(model, optimizer, checkpoint.tensors(path, "optimizer"))
for kind, tensors in state(model, optimizer).items():
    assert set(tensors) == set(mine[kind])
    for n, t in tensors.items():
        assert isinstance(t, Part) == isinstance(mine[kind][n], Part)
        assert torch.equal(t.data, mine[kind][n].data) or (rank and "running" in n), n

assert parallel.everywhere(torch.tensor(True)) and not parallel.everywhere(torch.tensor(rank == 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (500 if rank == 1 else 10**9, 10**9))
print(failure(2), flush=True)
write = checkpoint._write
checkpoint._write = lambda *words: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else write(*words)
print(failure(3), flush=True)
os._exit(0)
"""


def test_of_real_processes_one_finds_the_disk_full_and_then_dies(tmp_path):
    """FSDP's parts are what they are; the other process hears of either in time, and the checkpoint before stays."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, -9], outputs
    (full, dead), (same,) = (out.splitlines() for out, _ in outputs)
    assert full == same
    folder = tmp_path / "checkpoints"
    expected = (
        f"step 2 not written to {folder}: File too large (rank 1); {folder / 'step-000000001'} is intact"
    )
    assert full == f"CheckpointError: checkpoint of {expected}"
    assert re.search("Connection (closed|reset)", dead)
    assert [path.name for path in folder.glob("*step-*")] == ["step-000000001"]
    assert checkpoint.damage(folder / "step-000000001") is None
