"""A prepared checkpoint is built once, and again if it is damaged."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference import checkpoint_cache, digests, weights
from census_tf_dagster.inference.checkpoint import Checkpoint, read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.prepared_checkpoint import load_model
from census_tf_dagster.inference.sealed_file import is_sealed
from tests.support.cells import ASSAYS, GENES


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    build_checkpoint(
        tmp_path / "checkpoint", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128
    )
    return read_checkpoint(tmp_path / "checkpoint")


def test_built_once_for_each_precision(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(checkpoint, "fp32", tmp_path / "cache")
    half = prepare(checkpoint, "fp16", tmp_path / "cache")
    assert half.stat().st_size < 0.6 * first.stat().st_size
    monkeypatch.setattr(weights, "write_prepared", lambda *_: pytest.fail("built again"))
    assert prepare(checkpoint, "fp32", tmp_path / "cache") == first
    assert list(first.parent.glob(".*")) == []


def test_of_two_that_prepare_at_once_one_builds(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has found no file before the first one writes it. It waits, and takes the file of the first."""
    built: list[str] = []
    found_none: set[int] = set()
    both = threading.Event()
    look, write = checkpoint_cache.is_sealed, weights.write_prepared

    def looking(path: Path) -> bool:
        found = look(path)
        found_none.add(threading.get_ident())
        if len(found_none) == 2:
            both.set()
        return found

    def writing(checkpoint: Checkpoint, precision: str, path: Path) -> None:
        assert both.wait(60)
        built.append(precision)
        write(checkpoint, precision, path)

    monkeypatch.setattr(checkpoint_cache, "is_sealed", looking)
    monkeypatch.setattr(weights, "write_prepared", writing)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: prepare(checkpoint, "fp32", tmp_path / "cache"), range(2)))
    assert paths[0] == paths[1]
    assert built == ["fp32"]


def memory(entry: str) -> int:
    """Return an entry of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{entry}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak memory")
def test_preparing_needs_less_memory_than_the_weights(tmp_path: Path) -> None:
    genes = [f"ENSG{i:011d}" for i in range(5000)]
    sizes = {"embed_dim": 512, "model_dim": 2048, "num_layers": 8, "esm_dim": 2560}
    build_checkpoint(tmp_path / "checkpoint", genes, ASSAYS, **sizes)
    # This begins a new peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    prepared = prepare(read_checkpoint(tmp_path / "checkpoint"), "fp32", tmp_path / "cache")
    assert is_sealed(prepared)
    grown = memory("VmHWM") - before
    weights = tmp_path / "checkpoint" / "model_weights.pt"
    assert grown < 0.5 * (weights.stat().st_size + prepared.stat().st_size)


def flip(path: Path, at: int) -> None:
    """Change a byte, but keep the length and the time of change."""
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_cut_short_it_is_built_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = prepare(checkpoint, "fp32", tmp_path / "cache")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    assert prepare(checkpoint, "fp32", tmp_path / "cache").stat().st_size == size
    load_model(path, GENES, torch.device("cpu"))


@pytest.mark.parametrize("where", ["length", "header", "digest", "middle", "end"])
def test_damaged_it_is_not_loaded_and_built_again(checkpoint: Checkpoint, tmp_path: Path, where: str) -> None:
    path = prepare(checkpoint, "fp32", tmp_path / "cache")
    good = path.read_bytes()
    places = {"length": 0, "header": 20, "digest": good.index(b'"digest":"') + 12, "middle": len(good) // 2, "end": -1}
    flip(path, places[where])
    with pytest.raises(UserError, match=r"is missing or damaged; .* run this again"):
        load_model(path, GENES, torch.device("cpu"))
    assert prepare(checkpoint, "fp32", tmp_path / "cache") == path
    assert path.stat().st_size == len(good)
    load_model(path, GENES, torch.device("cpu"))


def test_it_is_synced_before_it_takes_its_name(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, any((tmp_path / "cache" / "prepared").glob("*.safetensors"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    path = prepare(checkpoint, "fp32", tmp_path / "cache")
    assert synced == [(path.stat().st_ino, False), (path.parent.stat().st_ino, True)]


def test_what_was_damaged_since_it_was_read_is_not_prepared(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 0)
    weights, cache = checkpoint.folder / "model_weights.pt", tmp_path / "cache"
    good = weights.read_bytes()
    read_checkpoint(checkpoint.folder, cache=cache)
    flip(weights, len(good) // 2)
    remembered = read_checkpoint(checkpoint.folder, cache=cache)
    assert remembered.fingerprint == checkpoint.fingerprint
    with pytest.raises(UserError, match=r"model_weights.pt is damaged: the bytes of .* do not match"):
        prepare(remembered, "fp32", cache)
    assert not (cache / "prepared").exists()
    with pytest.raises(UserError, match=r"model_weights.pt is damaged"):
        read_checkpoint(checkpoint.folder, cache=cache)
    build_checkpoint(
        checkpoint.folder, {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128, seed=5
    )
    with pytest.raises(UserError, match=rf"expected {checkpoint.fingerprint}, as when it was last read"):
        prepare(remembered, "fp32", cache)


def test_a_cache_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"the prepared checkpoint cannot be written below .*cache"):
        prepare(checkpoint, "fp32", tmp_path / "cache")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the files that were hashed; files of any size are remembered."""
    found: list[str] = []
    own = digests._hash_file

    def spy(path: Path) -> bytes:
        found.append(path.name)
        return own(path)

    monkeypatch.setattr(digests, "_hash_file", spy)
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 0)
    return found


def test_files_are_hashed_once_until_they_change(checkpoint: Checkpoint, tmp_path: Path, hashed: list[str]) -> None:
    found = {read_checkpoint(checkpoint.folder, cache=tmp_path / "cache").fingerprint for _ in range(2)}
    assert found == {checkpoint.fingerprint}
    assert hashed == ["model_weights.pt"]
    build_checkpoint(
        tmp_path / "other", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128, seed=5
    )
    (tmp_path / "other" / "model_weights.pt").replace(checkpoint.folder / "model_weights.pt")
    assert read_checkpoint(checkpoint.folder, cache=tmp_path / "cache").fingerprint not in found


@pytest.mark.parametrize("harm", ["flipped", "cut short", "grown", "empty"])
def test_a_remembered_digest_that_is_damaged_is_made_again(
    checkpoint: Checkpoint, tmp_path: Path, hashed: list[str], harm: str
) -> None:
    cache = tmp_path / "cache"
    read_checkpoint(checkpoint.folder, cache=cache)
    (entry,) = (cache / "digests").iterdir()
    good = entry.read_bytes()
    flipped = bytes([good[0] ^ 1]) + good[1:]
    entry.write_bytes({"flipped": flipped, "cut short": good[:32], "grown": good + b"x", "empty": b""}[harm])
    assert read_checkpoint(checkpoint.folder, cache=cache).fingerprint == checkpoint.fingerprint
    assert len(hashed) == 2
    assert entry.read_bytes() == good


def test_a_digest_from_before_the_check_is_not_taken_for_one(
    checkpoint: Checkpoint, tmp_path: Path, hashed: list[str]
) -> None:
    weights, cache = checkpoint.folder / "model_weights.pt", tmp_path / "cache"
    flip(weights, weights.stat().st_size // 2)
    # `fetch` reads the file in this way, without checking checksums.
    digests.file_digest(weights, cache)
    with pytest.raises(UserError, match=r"model_weights.pt is damaged"):
        read_checkpoint(checkpoint.folder, cache=cache)


def test_small_files_are_hashed_each_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = digests.file_digest(tmp_path / "a", tmp_path / "cache")
    state = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(b"2")
    os.utime(tmp_path / "a", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests.file_digest(tmp_path / "a", tmp_path / "cache") != first
    assert not (tmp_path / "cache").exists()
