"""Requests that the ranks agree on, where one of them no longer answers."""

import subprocess
import sys
import time

from tests.processes import ROOT

RANK = """
import sys, time
import torch.distributed as dist
from common.engine.preemption import Requests
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
requests = Requests(timeout_minutes=0.05)
if rank == 1:
    print("silent", flush=True)
    time.sleep(300)
requests.poll()
requests.close()
print("left", flush=True)
dist.destroy_process_group()  # as the end of a training does
del requests
"""


def test_a_rank_that_waits_for_no_answer_ends(tmp_path):
    """torch waits at exit for what was posted, for as long as the group's limit says."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert ranks[1].stdout.readline() == "silent\n"
        assert ranks[0].stdout.readline() == "left\n"
        begun = time.monotonic()
        ranks[0].wait(60)
        assert time.monotonic() - begun > 2, "it did wait: the limit is what ended it"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
