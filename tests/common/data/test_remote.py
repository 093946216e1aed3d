"""Shards from a real web server on localhost that fails in every way, and from S3's interface."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.data import remote
from common.data.forms import open_source
from common.data.images import DataConfig
from common.data.source import Cache, DataError, Source
from common.errors import ConfigError, UserError
from tests.common.data.forms import few_digits, pairs, read_all, write_split
from tests.common.data.server import FAULTS, FaultyServer
from tests.processes import ROOT

SAMPLES = few_digits(30)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """30 digits in six shards of about 20 kB."""
    write_split(tmp_path / "shards", "webdataset", SAMPLES, max_samples=5)
    return tmp_path / "shards"


def sizes(shards: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(shards.glob("*.tar"))]


def kept(cache: Cache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.path.glob("*/*.tar")}


def test_the_samples_are_those_of_the_folder(tmp_path: Path, shards: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    with FaultyServer(shards) as server:
        source = open_source(server.url, "train", cache=cache)
        assert not kept(cache)  # nothing is fetched before it is read
        assert source.read(12) == pairs(SAMPLES)[12]
        assert list(kept(cache)) == ["train-000002.tar"]
        assert read_all(source) == pairs(SAMPLES)
        again = open_source(f"{server.url}/", "train", "webdataset", cache)
        assert read_all(pickle.loads(pickle.dumps(again))) == pairs(SAMPLES)
        local = open_source(shards, "train")
        assert source.fingerprint() == again.fingerprint() == local.fingerprint()
        assert [source.where(n) for n in (0, 29)] == [local.where(n) for n in (0, 29)]
        assert source.classes == local.classes
        # All but the manifest is fetched once.
        assert server.requests.pop("train.json") == 2
        assert set(server.requests.values()) == {1}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_tried_again(tmp_path: Path, shards: Path, fault: str) -> None:
    def twice(name: str, number: int) -> str | None:
        unseen = fault == "garble" and not name.endswith(".tar")  # only a checksum tells
        return fault if number < 2 and not unseen else None

    with FaultyServer(shards, twice) as server:
        source = open_source(server.url, "train", cache=Cache(str(tmp_path / "cache")))
        assert read_all(source) == pairs(SAMPLES)
        assert server.requests["train-000003.tar"] == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_stays_broken_is_named_and_leaves_nothing(
    tmp_path: Path, shards: Path, fault: str
) -> None:
    cache = Cache(str(tmp_path / "cache"))
    with FaultyServer(shards, lambda name, number: fault if name == "train-000001.tar" else None) as server:
        source = open_source(server.url, "train", cache=cache)
        with pytest.raises(DataError, match=rf"{server.url}/train-000001\.tar: .*; tried 6 times") as raised:
            source.read(5)
        assert "\n" not in str(raised.value)
        assert server.requests["train-000001.tar"] == remote.ATTEMPTS
        assert source.read(0) == pairs(SAMPLES)[0]
    assert list(kept(cache)) == ["train-000000.tar"]
    assert not list(cache.path.glob("*/.*.part"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that this machine has signed for itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    words = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=pairwise.test"
    )
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run(["openssl", *words.split(), *options], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.mark.parametrize("fault", [None, "drop", "reset"])
def test_https_with_a_trusted_certificate(
    tmp_path: Path, shards: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with FaultyServer(shards, lambda name, number: None if number else fault, certificate) as server:
        source = open_source(server.url, "train", cache=Cache(str(tmp_path / "cache")))
        assert server.url.startswith("https://")
        assert read_all(source) == pairs(SAMPLES)


def test_https_with_a_certificate_that_is_not_trusted(
    tmp_path: Path, shards: Path, certificate: Path
) -> None:
    with FaultyServer(shards, certificate=certificate) as server:
        with pytest.raises(
            DataError, match="its certificate is not trusted; SSL_CERT_FILE .*self-signed"
        ) as raised:
            open_source(server.url, "train", cache=Cache(str(tmp_path / "cache")))
        assert "\n" not in str(raised.value)
        assert "tried" not in str(raised.value)
        assert not server.requests, "nothing was asked for"


def test_https_with_a_certificate_of_another_host(
    tmp_path: Path, shards: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with FaultyServer(shards, certificate=certificate) as server:
        other = server.url.replace("127.0.0.1", "localhost")
        with pytest.raises(DataError, match="its certificate is not trusted.*Hostname mismatch"):
            open_source(other, "train", cache=Cache(str(tmp_path / "cache")))


@pytest.mark.parametrize("status", ["403", "404", "410"])
def test_what_is_not_there_is_not_asked_for_again(tmp_path: Path, shards: Path, status: str) -> None:
    with FaultyServer(shards, lambda name, number: status) as server:
        with pytest.raises(DataError, match=rf"train\.json: HTTP {status}"):
            open_source(server.url, "train", cache=Cache(str(tmp_path / "cache")))
        assert server.requests == {"train.json": 1}


def test_no_server_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Connection refused.*; tried 6 times"):
        open_source("http://127.0.0.1:9/data", "train", cache=Cache(str(tmp_path)))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_redirects_lead_to_web_servers_only(tmp_path: Path, shards: Path, target: str) -> None:
    server = FaultyServer(shards, lambda name, number: f"-> {target}")
    with server, pytest.raises(DataError, match=r"train\.json: "):
        open_source(server.url, "train", cache=Cache(str(tmp_path / "cache")))


def test_the_cache_stays_within_its_bound(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture
) -> None:
    room = max(sizes(shards)) * 5 // 2
    cache = Cache(str(tmp_path / "cache"), room / 1e9)
    with FaultyServer(shards) as server:
        source = open_source(server.url, "train", cache=cache)
        assert "warning: data.cache_gb" in capsys.readouterr().err
        for index in [0, 29, 7, 13, 1, 22, 3, 18, *range(30)]:
            assert source.read(index) == pairs(SAMPLES)[index]
            assert 0 < sum(kept(cache).values()) <= room


def test_what_was_not_read_for_longest_goes_first(tmp_path: Path, shards: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), max(sizes(shards)) * 3.5 / 1e9)
    with FaultyServer(shards) as server:
        source = open_source(server.url, "train", cache=cache)
        for shard in (0, 1, 2):
            source.read(5 * shard)
        for age, shard in ((300, 1), (200, 0), (100, 2)):
            (path,) = cache.path.glob(f"*/train-{shard:06d}.tar")
            os.utime(path, (time.time() - age,) * 2)
        source.read(6)  # of shard 1, which is now the last one read
        source.read(15)
        assert sorted(kept(cache)) == [f"train-00000{shard}.tar" for shard in (1, 2, 3)]


def test_a_shard_larger_than_the_cache(tmp_path: Path, shards: Path) -> None:
    with (
        FaultyServer(shards) as server,
        pytest.raises(ConfigError, match=r"data\.cache_gb = 1e-05: .* has a shard"),
    ):
        open_source(server.url, "train", cache=Cache(str(tmp_path / "cache"), 1e-5))


def test_other_data_under_the_same_address_is_noticed(tmp_path: Path, shards: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    with FaultyServer(shards) as server:
        assert read_all(open_source(server.url, "train", cache=cache)) == pairs(SAMPLES)
        write_split(tmp_path / "others", "webdataset", SAMPLES[3:9], max_samples=5)
        server.root = tmp_path / "others"
        assert read_all(open_source(server.url, "train", cache=cache)) == pairs(SAMPLES[3:9])


def read_some(source: Source, seed: int) -> int:
    import random

    for index in random.Random(seed).choices(range(30), k=60):
        assert source.read(index) == pairs(SAMPLES)[index]
    return os.getpid()


def test_processes_and_threads_share_it(tmp_path: Path, shards: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    with FaultyServer(shards, lambda name, number: FAULTS[number % 3] if number < 2 else None) as server:
        source = open_source(server.url, "train", cache=cache)
        with multiprocessing.get_context("fork").Pool(4) as pool, ThreadPoolExecutor(4) as threads:
            processes = pool.starmap_async(read_some, [(source, seed) for seed in range(8)], 1)
            list(threads.map(read_some, [source] * 8, range(8)))
            processes.get(60)
        assert {server.requests[f"train-{shard:06d}.tar"] for shard in range(6)} == {
            3
        }  # fetched once, the third time


def test_processes_share_a_cache_that_is_too_small(tmp_path: Path, shards: Path) -> None:
    room = max(sizes(shards)) * 3 // 2
    cache = Cache(str(tmp_path / "cache"), room / 1e9)
    most = 0
    with FaultyServer(shards) as server:
        source = open_source(server.url, "train", cache=cache)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            processes = pool.starmap_async(read_some, [(source, seed) for seed in range(3)], 1)
            while not processes.ready():
                with remote._locked(cache.path / ".lock"):  # nothing is removed or begun meanwhile
                    most = max(most, sum(kept(cache).values()))
                time.sleep(0.005)  # others want the lock too
            processes.get(60)
    assert 0 < most <= room


def test_what_a_killed_process_was_fetching_is_removed(tmp_path: Path, shards: Path) -> None:
    room = max(sizes(shards)) * 5 // 2
    cache = Cache(str(tmp_path / "cache"), room / 1e9)
    with FaultyServer(shards) as server:
        source = open_source(server.url, "train", cache=cache)
        (folder,) = (path for path in cache.path.iterdir() if path.is_dir())
        part = folder / ".train-000005.tar.part"
        part.write_bytes(bytes(room - 100))
        assert read_all(source) == pairs(SAMPLES)
        assert not part.exists()


def test_s3_goes_through_fsspec(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    opened = []

    def fake(url: str, mode: str) -> io.BufferedReader:
        opened.append(url)
        if len(opened) % 3 == 0:
            raise TimeoutError("slow")
        return open(shards / url.removeprefix("s3://bucket/some/"), mode)

    monkeypatch.setattr(fsspec, "open", fake)
    source = open_source("s3://bucket/some", "train", cache=Cache(str(tmp_path / "cache")))
    assert read_all(source) == pairs(SAMPLES)

    def missing(url: str, mode: str) -> io.BufferedReader:
        raise FileNotFoundError("the bucket does not exist")  # without an errno, as s3fs does

    monkeypatch.setattr(fsspec, "open", missing)
    with pytest.raises(DataError, match=r"s3://bucket/some/val\.json: FileNotFoundError.*exist$"):
        open_source("s3://bucket/some", "val", cache=Cache(str(tmp_path / "cache")))


def test_s3_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="pip install fsspec s3fs"):
        open_source("s3://bucket/some", "train", cache=Cache(str(tmp_path)))


@pytest.mark.parametrize("url", ["http://user:word@host/x", "https://host/x?key=1", "https:///x"])
def test_addresses_are_folders(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected scheme://host/folder"):
        open_source(url, "train", cache=Cache(str(tmp_path)))


def test_other_forms_are_local(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recordio is read from local folders only"):
        open_source("https://host/x", "train", "recordio", Cache(str(tmp_path)))


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match=r"cache_gb = 0: expected a number above 0"):
        DataConfig(cache_gb=0)


def test_a_folder_that_cannot_be_made(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "file").write_text("")
    with FaultyServer(shards) as server, pytest.raises(UserError, match=r"data\.cache: .*file"):
        open_source(server.url, "train", cache=Cache(str(tmp_path / "file" / "cache")))


@pytest.mark.slow
def test_training_from_a_server(tmp_path: Path, shards: Path) -> None:
    write_split(shards, "webdataset", SAMPLES, split="val", max_samples=16)
    small = {"layers": [1] * 4, "channels": [8, 8, 16, 16], "bat_size": 2, "nl_mod": [1, 1, 1000]}
    words = {
        "--model.name": "resnet18_bat",
        "--model.args": str(small).replace("'", '"'),
        "--augment.size": "32",
        "--train.epochs": "1",
        "--train.batch_size": "10",
        "--data.workers": "2",
        "--data.cache": str(tmp_path / "cache"),
        "--out": str(tmp_path / "run"),
    }
    with FaultyServer(shards, lambda name, number: "drop" if number == 0 else None) as server:
        done = subprocess.run(
            [
                sys.executable,
                "image/train.py",
                f"--data.path={server.url}",
                *(f"{k}={v}" for k, v in words.items()),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    assert len(kept(Cache(str(tmp_path / "cache")))) == 6 + 2
