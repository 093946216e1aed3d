"""One list of unreadable samples for all processes and starts of a run."""

import pytest

from common.data.loader import Unreadable
from common.data.quarantine import Quarantine, describe
from common.errors import RunError

BAD = [Unreadable(f"{number}.jpg", "truncated", "cut", "train/3") for number in range(4)]


def test_the_limit_counts_samples_and_not_who_has_met_them(tmp_path):
    """With another order every epoch each process comes to meet all unreadable samples."""
    ranks = [Quarantine(tmp_path / "quarantine.jsonl", limit=3) for _ in range(4)]
    for epoch in range(4):
        for rank, quarantine in enumerate(ranks):
            quarantine.add([BAD[(rank + epoch) % 3]], training=True)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3
    with pytest.raises(RunError, match="4 unreadable training samples, more than"):
        ranks[2].add([BAD[3]], training=True)


def test_samples_of_the_evaluation_and_those_of_a_mended_disk_stop_no_run(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, limit=9).add(BAD[:2], training=True)
    Quarantine(path, limit=9).add(BAD[2:], training=False)
    again = Quarantine(path, limit=1)
    again.add([], training=True)
    again.add(BAD[:1], training=False)
    with pytest.raises(RunError, match="2 unreadable training samples"):
        again.add(BAD[:1], training=True)


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, limit=9).add(BAD[:1], training=True)
    with path.open("ab") as file:
        file.write(b'{"where": "1.jpg", "reason"')
    again = Quarantine(path, limit=9)
    again.add(BAD[:3], training=True)
    assert again.known == {(sample.shard, sample.where) for sample in BAD[:3]}
    assert "unreadable samples: 3 (3 truncated); 3 in train/3; " in describe(path)
