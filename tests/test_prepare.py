"""A prepared checkpoint is built once, and again when it is not whole."""

from pathlib import Path

import pytest
import torch

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference import checkpoint as checkpoint_module
from census_tf_dagster.inference import weights
from census_tf_dagster.inference.checkpoint import Checkpoint, read_checkpoint
from census_tf_dagster.inference.prepare import prepare
from census_tf_dagster.inference.prepared import load_model
from tests.test_engine import ASSAYS, GENES


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


def test_cut_short_it_is_built_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = prepare(checkpoint, "fp32", tmp_path / "cache")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    assert prepare(checkpoint, "fp32", tmp_path / "cache").stat().st_size == size
    load_model(path, GENES, torch.device("cpu"))


def test_a_cache_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"the prepared checkpoint cannot be written below .*cache"):
        prepare(checkpoint, "fp32", tmp_path / "cache")


def test_files_are_hashed_once_until_they_change(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    own = checkpoint_module._hash_file

    def spy(path: Path) -> bytes:
        hashed.append(path.name)
        return own(path)

    monkeypatch.setattr(checkpoint_module, "_hash_file", spy)
    found = {read_checkpoint(checkpoint.folder, cache=tmp_path / "cache").fingerprint for _ in range(2)}
    assert found == {checkpoint.fingerprint}
    assert hashed == ["model_weights.pt"]
    build_checkpoint(
        tmp_path / "other", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128, seed=5
    )
    (tmp_path / "other" / "model_weights.pt").replace(checkpoint.folder / "model_weights.pt")
    assert read_checkpoint(checkpoint.folder, cache=tmp_path / "cache").fingerprint not in found
