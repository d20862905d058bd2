"""What is refused before a model is loaded."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from census_tf_dagster.demo.checkpoint import build_checkpoint, build_pretrained_embeddings
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.inference.set_aside import NonFiniteError
from census_tf_dagster.inference.tokens import Tokenizer
from tests.support import load_engine

GENES = [f"ENSG{i:011d}" for i in range(30)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_checkpoint(tmp_path / "c", {"x": GENES}, ["a", "b"], embed_dim=16, seq_len=63, block_len=64)
    return tmp_path / "c"


def edit_config(folder: Path, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["model"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["config.json", "model_weights.pt", "vocabs", "vocabs/a_gene.h5"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    path = folder / name.replace("a_gene", "x_gene")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=path.name):
        read_checkpoint(folder)


def test_another_architecture(folder: Path) -> None:
    edit_config(folder, lambda model: model["model_config"].pop("softcap"))
    with pytest.raises(UserError, match=r"config.json is not a TranscriptFormer configuration: KeyError\('softcap'\)"):
        read_checkpoint(folder)


def test_two_auxiliary_columns(folder: Path) -> None:
    edit_config(folder, lambda model: model["data_config"].update(aux_cols="assay,sex"))
    with pytest.raises(UserError, match="expected one auxiliary column"):
        read_checkpoint(folder)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_checkpoint(folder)


def load(folder: Path, precision: str = "fp32") -> tuple[Tokenizer, Engine]:
    checkpoint = read_checkpoint(folder)
    tokenizer = Tokenizer.build(GENES, checkpoint)
    return tokenizer, load_engine(checkpoint, tokenizer.known_genes, precision)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model_weights.pt"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match="is no whole PyTorch file of weights"):
        read_checkpoint(folder)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("evil-was-here"),)  # type: ignore[return-value]


def test_weights_that_would_run_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, folder / "model_weights.pt")
    with pytest.raises(UserError, match=r"is a pickle that names .*only tensors may be in it"):
        read_checkpoint(folder)
    assert not Path("evil-was-here").exists()


def test_pickled_pretrained_embeddings(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "genes.pkl"
    path.write_bytes(pickle.dumps({"ENSG1": np.zeros(96)}))
    with pytest.raises(UserError, match=r"is a pickle, which is never loaded; expected upstream's \.h5"):
        read_checkpoint(folder, [path])


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, lambda model: model["model_config"].update(model_dim=99))
    with pytest.raises(UserError, match=r"linear1.weight is \(128, 16\); config.json says \(99, 16\)"):
        load(folder)


def test_a_folder_above_the_checkpoint(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"has no config.json; expected a checkpoint .* Did you mean {folder}\?"):
        read_checkpoint(folder.parent)


def test_a_missing_vocabulary(folder: Path) -> None:
    (file,) = (folder / "vocabs").glob("*_gene.h5")
    file.unlink()
    with pytest.raises(UserError, match=rf"{file} does not exist"):
        read_checkpoint(folder)


def test_missing_weight(folder: Path) -> None:
    state = torch.load(folder / "model_weights.pt", weights_only=True)
    del state["transformer_encoder.encoder_layers.1.norm2.weight"]
    torch.save(state, folder / "model_weights.pt")
    with pytest.raises(UserError, match=r"has no transformer_encoder.encoder_layers.1.norm2.weight"):
        load(folder)


def test_pretrained_embeddings_of_another_width(folder: Path, tmp_path: Path) -> None:
    build_pretrained_embeddings(tmp_path / "p.h5", GENES, 7, seed=0)
    checkpoint = read_checkpoint(folder, [tmp_path / "p.h5"])
    tokenizer = Tokenizer.build(GENES, checkpoint)
    with pytest.raises(UserError, match=r"is \(7,\); the checkpoint takes \(96,\)"):
        load_engine(checkpoint, tokenizer.known_genes)


def test_fingerprint_follows_every_part(folder: Path, tmp_path: Path) -> None:
    found = {read_checkpoint(folder).fingerprint}
    build_pretrained_embeddings(tmp_path / "p.h5", GENES, 96, seed=0)
    found.add(read_checkpoint(folder, [tmp_path / "p.h5"]).fingerprint)
    edit_config(folder, lambda model: model["model_config"].update(softcap=9))
    found.add(read_checkpoint(folder).fingerprint)
    vocabulary = folder / "vocabs" / "assay_vocab.json"
    swapped = {"unknown": 0, "a": 2, "b": 1}
    assert json.loads(vocabulary.read_text()) != swapped
    vocabulary.write_text(json.dumps(swapped))
    found.add(read_checkpoint(folder).fingerprint)
    weights = bytearray((folder / "model_weights.pt").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / "model_weights.pt").write_bytes(weights)
    found.add(read_checkpoint(folder).fingerprint)
    assert len(found) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_one_clear_error(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    with pytest.raises(UserError, match="asks for a GPU"):
        load_engine(checkpoint, Tokenizer.build(GENES, checkpoint).known_genes, "fp16", device="cuda")


def packed(tokenizer: Tokenizer, rng: np.random.Generator) -> PackedCells:
    lengths = rng.integers(3, 30, 50)
    tokens = np.concatenate([[tokenizer.start_row, *rng.integers(4, 30, n - 1)] for n in lengths]).astype(np.int32)
    return PackedCells(tokens, rng.random(len(tokens), np.float32), np.cumsum([0, *lengths]))


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("bf16", 5e-2)])
def test_lower_precisions_are_close_to_fp32(folder: Path, precision: str, bound: float) -> None:
    tokenizer, exact = load(folder)
    _, rough = load(folder, precision)
    cells = packed(tokenizer, np.random.default_rng(0))
    reference, ours = exact.embed(cells), rough.embed(cells)
    error = np.linalg.norm(ours - reference) / np.linalg.norm(reference)
    assert 1e-5 < error < bound


def test_values_that_are_not_finite_are_caught_and_named(folder: Path) -> None:
    state = torch.load(folder / "model_weights.pt", weights_only=True)
    state["transformer_encoder.encoder_layers.1.linear2.weight"] *= 1e6
    torch.save(state, folder / "model_weights.pt")
    tokenizer, engine = load(folder, "fp16")
    with pytest.raises(NonFiniteError, match=r"not finite in fp16, nor in fp32"):
        engine.embed(packed(tokenizer, np.random.default_rng(0)))
