"""Bad checkpoints are refused before a model is loaded."""

import json
import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from census_tf_dagster.demo.checkpoint import SPECIAL_TOKENS, build_checkpoint, build_pretrained_embeddings
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference import shape
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.model import ACTIVATIONS
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.inference.tokens import Tokenizer
from tests.support.project import load_engine

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
    refused(folder, "is not the configuration of a TranscriptFormer model: model.model_config has no softcap")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("assay,sex", r'aux_cols is "assay,sex"; expected one auxiliary column such as "assay"'),
        (["assay"], r'aux_cols is \["assay"\]; expected one obs column as text, such as "assay", not a list'),
        (None, r"aux_cols is null; expected one obs column .*: models without an auxiliary token are not supported"),
        (3, "aux_cols is 3; expected one auxiliary column"),
        ("x" * 10_000, "expected one auxiliary column"),
        ("a\0", "expected one auxiliary column"),
        ("../assay", "expected one auxiliary column"),
        ("platform", "platform_vocab.json does not exist; expected a checkpoint"),
    ],
)
def test_other_auxiliary_columns(folder: Path, value: object, message: str) -> None:
    edit_config(folder, lambda model: model["data_config"].update(aux_cols=value))
    refused(folder, message)


SENSELESS: dict[str, list[object]] = {
    "num_layers": [0, -2, 1.5, 2.0, True, "2", None, 10**12, [2]],
    "num_heads": [0, -4, 2.5, "4", True],
    "embed_dim": [0, -16, 16.9, math.inf, math.nan, "16", 10**12],
    "model_dim": [0, -128, 128.5, "128"],
    "seq_len": [0, -5, 1, 1e12, 10**12, "63", True],
    "softcap": [math.nan, math.inf, -math.inf, 1e300, 10**400, 1e-300, "10", None, True],
    "log_counts_eps": [-1e-6, math.nan, math.inf, "0", None],
    "activation": ["tanh", 3, None, ["gelu"]],
    "attn_bias": [0, "false", None],
    "fw_bias": [1, "true"],
    "gene_head_hidden_dim": [0, -1, 1.5, "32", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SENSELESS.items() for value in values])
def test_numbers_that_make_no_sense(folder: Path, name: str, value: object) -> None:
    edit_config(folder, lambda model: model["model_config"].update({name: value}))
    refused(folder, rf"model.model_config.{name} is .*; expected (a whole number|a number|one of|true or false)")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([*SPECIAL_TOKENS, "[PAD]"], "expected each token once"),
        ([["unknown"], *SPECIAL_TOKENS], "expected a list of names"),
        ([*SPECIAL_TOKENS[1:]], "expected unknown among them"),
        (None, "expected a list of names"),
        ("[START]", "expected a list of names"),
        ([*SPECIAL_TOKENS, "\ud800"], "expected a list of names"),
        ([*SPECIAL_TOKENS, "x" * 10_000], "expected a list of names"),
        ([*SPECIAL_TOKENS, GENES[0]], rf"{GENES[0]} is a special token and a gene"),
    ],
)
def test_special_tokens_that_are_not_usable(folder: Path, value: object, message: str) -> None:
    edit_config(folder, lambda model: model["data_config"].update(special_tokens=value))
    refused(folder, message)


UNHONOURED = [
    ("data_config", "clip_counts", 10),
    ("data_config", "normalize_to_scale", 10000),
    ("data_config", "sort_genes", True),
    ("data_config", "filter_to_vocabs", False),
    ("model_config", "use_aux", False),
    ("model_config", "aux_len", 2),
    ("data_config", "pad_zeros", "false"),
    ("data_config", "gene_pad_token", "[MASK]"),
]


@pytest.mark.parametrize(("section", "name", "value"), UNHONOURED)
def test_settings_that_are_not_computed_here(folder: Path, section: str, name: str, value: object) -> None:
    edit_config(folder, lambda model: model[section].update({name: value}))
    refused(folder, rf"model.{section}.{name} is {re.escape(json.dumps(value))}; expected")


def test_the_entries_of_a_published_checkpoint(folder: Path) -> None:
    def as_published(model: dict[str, dict[str, object]]) -> None:
        overridden = ["clip_counts", "filter_to_vocabs", "filter_outliers", "sort_genes", "randomize_genes"]
        model["data_config"].update(dict.fromkeys([*overridden, "min_expressed_genes"]), normalize_to_scale=0)
        model["data_config"]["special_tokens"] = ["unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]"]
        for name in ("use_raw", "remove_duplicate_genes"):
            del model["data_config"][name]
        for name in ("use_aux", "compile_block_mask"):
            del model["model_config"][name]

    edit_config(folder, as_published)
    read_checkpoint(folder)
    edit_config(folder, lambda model: model["data_config"].update(clip_counts=30.0, randomize_genes=True))
    read_checkpoint(folder)


def test_activations_are_those_of_the_model() -> None:
    assert set(ACTIVATIONS) == set(shape.ACTIVATIONS)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_checkpoint(folder)


def load(folder: Path, precision: str = "fp32") -> tuple[Tokenizer, Engine]:
    checkpoint = read_checkpoint(folder)
    tokenizer = Tokenizer.build(GENES, checkpoint)
    return tokenizer, load_engine(checkpoint, tokenizer.known_genes, precision)


def edit_state(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save the weights again: edited in place, or the return value of `edit`."""
    state = torch.load(folder / "model_weights.pt", weights_only=True)
    edited = edit(state)
    torch.save(edited if isinstance(edited, dict) else state, folder / "model_weights.pt")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model_weights.pt"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused(folder, "model_weights.pt is damaged or truncated .* Get model_weights.pt again")


@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps({"a": 1})])
def test_weights_that_are_something_else(folder: Path, content: bytes) -> None:
    (folder / "model_weights.pt").write_bytes(content)
    refused(folder, "model_weights.pt is not a file of weights that PyTorch saved")


def test_something_before_the_weights(folder: Path) -> None:
    weights = folder / "model_weights.pt"
    weights.write_bytes(b"\n" + weights.read_bytes())
    with pytest.raises(UserError, match="is damaged: it has bytes before its zip archive"):
        read_checkpoint(folder)


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / "model_weights.pt").unlink()
    (folder / "model_weights.pt").mkdir()
    refused(folder, r"model_weights.pt cannot be read \(Is a directory\)")


@pytest.mark.parametrize(
    ("section", "value"), [("model_config", None), ("data_config", []), ("loss_config", 3), ("loss_config", {})]
)
def test_a_section_that_is_none(folder: Path, section: str, value: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"][section] = value
    path.write_text(json.dumps(config))
    refused(folder, rf"model.{section} (is .*; expected a JSON object|has no gene_id_loss_weight)")


@pytest.mark.parametrize("weight", [10**400, math.nan, "1", None])
def test_a_loss_weight_that_makes_no_sense(folder: Path, weight: object) -> None:
    edit_config(folder, lambda model: model["loss_config"].update(gene_id_loss_weight=weight))
    refused(folder, r"model.loss_config.gene_id_loss_weight is .*; expected a number")


def test_weights_in_the_old_format(folder: Path) -> None:
    path = folder / "model_weights.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    refused(folder, "is in PyTorch's format from before 1.6; expected the zip format. Save it again: `python -c")
    torch.save(torch.load(path, weights_only=True), path)
    read_checkpoint(folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_of_another_number_of_layers(folder: Path, layers: int) -> None:
    edit_config(folder, lambda model: model["model_config"].update(num_layers=layers))
    what = "it has" if layers == 1 else "it has no"
    refused(folder, rf"not hold the weights .*: {what} transformer_encoder.encoder_layers.{min(layers, 2)}.* more\)")


def test_a_tensor_that_no_model_has(folder: Path) -> None:
    edit_state(folder, lambda state: state.update(extra=torch.zeros(2)))
    refused(folder, "it has extra, which such a model does not have")


@pytest.mark.parametrize("name", ["mu.mlp.layers.4.bias", "gene_id_head.layers.0.weight"])
def test_a_head_that_is_incomplete(folder: Path, name: str) -> None:
    edit_state(folder, lambda state: {key: value for key, value in state.items() if key != name})
    refused(folder, rf"it has no {name}")


def test_a_model_without_a_gene_id_head(folder: Path) -> None:
    edit_config(folder, lambda model: model["loss_config"].update(gene_id_loss_weight=0))
    refused(folder, r"it has gene_id_head.layers.0.weight \(and 5 more\), which such a model does not have")
    edit_state(folder, lambda state: {key: value for key, value in state.items() if "gene_id_head" not in key})
    read_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_names_with_a_prefix(folder: Path, prefix: str) -> None:
    edit_state(folder, lambda state: {f"{prefix}{key}": value for key, value in state.items()})
    refused(folder, rf"the names of its tensors begin with '{prefix}'.*Save them without it")


def test_a_training_checkpoint(folder: Path) -> None:
    edit_state(folder, lambda state: {"state_dict": state, "epoch": 3, "lr": [1e-3]})
    refused(folder, r"holds a dictionary of dictionaries .*torch.load\(path, weights_only=True\)\['state_dict'\]")


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"a": 1}, {1: torch.zeros(2)}])
def test_weights_that_are_no_state_dict(folder: Path, content: object) -> None:
    torch.save(content, folder / "model_weights.pt")
    refused(folder, "does not hold a dictionary of tensors by name")


def test_a_vocabulary_that_lacks_a_gene(folder: Path) -> None:
    with h5py.File(folder / "vocabs" / "x_gene.h5", "r+") as file:
        keys = file["keys"][:-1]
        del file["keys"]
        file["keys"] = keys
    refused(folder, r"embedding.weight has 37 rows; expected 36, one for each special token and each gene in .*vocabs")


@pytest.mark.parametrize("tokens", [{"unknown": 0, "a": 7, "b": 1}, {"unknown": 0, "a": "1", "b": 2}, {"a": 0, "b": 1}])
def test_assay_tokens_that_are_not_usable(folder: Path, tokens: dict[str, object]) -> None:
    (folder / "vocabs" / "assay_vocab.json").write_text(json.dumps(tokens))
    refused(folder, "assay_vocab.json( has tokens that are not whole numbers| has no unknown)")


def test_biases(folder: Path) -> None:
    edit_config(folder, lambda model: model["model_config"].update(attn_bias=True))
    refused(folder, r"it has no transformer_encoder.encoder_layers.0.self_attn.linears.0.bias \(and 7 more\)")
    edit_config(folder, lambda model: model["model_config"].update(attn_bias=False))
    bias = {f"transformer_encoder.encoder_layers.{i}.linear1.bias": torch.zeros(128) for i in range(2)}
    edit_state(folder, lambda state: state.update(bias))
    refused(folder, r"it has transformer_encoder.encoder_layers.0.linear1.bias .*which such a model does not have")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    def harm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
        # This tensor belongs to a head, so no embedding depends on it.
        state["mu.mlp.layers.4.bias"][:] = value
        return state

    edit_state(folder, harm)
    read_checkpoint(folder)
    edit_state(folder, lambda state: state["transformer_encoder.encoder_layers.1.linear2.weight"][-1, -1].fill_(value))
    refused(folder, "encoder_layers.1.linear2.weight holds values that are NaN or infinite")


def test_weights_that_are_no_floating_point_numbers(folder: Path) -> None:
    edit_state(folder, lambda state: {key: tensor.int() for key, tensor in state.items()})
    refused(folder, "gene_embeddings.embedding.weight is a IntStorage; expected floating-point numbers")


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
def test_flipped_bits_in_the_weights(folder: Path, where: float) -> None:
    weights = folder / "model_weights.pt"
    content = bytearray(weights.read_bytes())
    content[int(len(content) * where)] ^= 1
    weights.write_bytes(content)
    refused(folder, r"is damaged: the bytes of .* do not match the checksum in the file. Get model_weights.pt again")


def test_weights_without_checksums(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        edit_state(folder, lambda _: None)
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(folder / "model_weights.pt") as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    load(folder)


def test_any_flipped_bit_is_one_clear_error(folder: Path) -> None:
    weights = folder / "model_weights.pt"
    good, fingerprint = weights.read_bytes(), read_checkpoint(folder).fingerprint
    rng = np.random.default_rng(0)
    refusals = []
    for at in rng.choice(len(good), 300, replace=False):
        content = bytearray(good)
        content[at] ^= 1 << rng.integers(8)
        weights.write_bytes(content)
        with suppress(UserError):
            # Nobody reads the bytes between the entries, but the file differs.
            assert read_checkpoint(folder).fingerprint != fingerprint
            continue
        refusals.append(at)
    assert len(refusals) > 200


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("evil-was-here"),)  # type: ignore[return-value]


def test_weights_that_would_run_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, folder / "model_weights.pt")
    with pytest.raises(UserError, match=r"is a pickle that names .*expected a dictionary of tensors and nothing else"):
        read_checkpoint(folder)
    assert not Path("evil-was-here").exists()


def test_pickled_pretrained_embeddings(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "genes.pkl"
    path.write_bytes(pickle.dumps({"ENSG1": np.zeros(96)}))
    with pytest.raises(UserError, match=r"is a pickle, which this project never loads; .* upstream's \.h5"):
        read_checkpoint(folder, [path])


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, lambda model: model["model_config"].update(model_dim=99))
    refused(folder, r"linear1.weight is \(128, 16\); config.json says \(99, 16\)")


def test_a_folder_above_the_checkpoint(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"has no config.json; expected a checkpoint .* Did you mean {folder}\?"):
        read_checkpoint(folder.parent)


def test_a_missing_vocabulary(folder: Path) -> None:
    (file,) = (folder / "vocabs").glob("*_gene.h5")
    file.unlink()
    with pytest.raises(UserError, match=rf"{file} does not exist"):
        read_checkpoint(folder)


def test_missing_weight(folder: Path) -> None:
    edit_state(folder, lambda state: state.pop("transformer_encoder.encoder_layers.1.norm2.weight"))
    refused(folder, r"has no transformer_encoder.encoder_layers.1.norm2.weight")


def test_pretrained_embeddings_of_another_width(folder: Path, tmp_path: Path) -> None:
    build_pretrained_embeddings(tmp_path / "p.h5", GENES, 7, seed=0)
    with pytest.raises(UserError, match=r"has shape \(7,\); expected \(96,\)"):
        read_checkpoint(folder, [tmp_path / "p.h5"])


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
    edit_state(folder, lambda state: state["aux_embeddings.assay.weight"][0, 0].add_(1))
    found.add(read_checkpoint(folder).fingerprint)
    assert len(found) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_one_clear_error(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    with pytest.raises(UserError, match="has `device: cuda`, but this machine has no GPU"):
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


def grow(folder: Path, factor: float) -> None:
    edit_state(folder, lambda state: state["transformer_encoder.encoder_layers.1.linear1.weight"].mul_(factor))


def test_values_that_leave_fp16_are_computed_in_float32(folder: Path) -> None:
    # The weights are in range, but values computed with them are not.
    grow(folder, 4e4)
    cells = packed(load(folder, "fp16")[0], np.random.default_rng(0))
    found, exact = (load(folder, precision)[1].embed(cells) for precision in ("fp16", "fp32"))
    # The weights are those of fp16.
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-2


def test_weights_beyond_the_range_of_a_precision(folder: Path) -> None:
    grow(folder, 1e7)
    with pytest.raises(UserError, match=r"weights \(1.linear1\) leave the range of fp16; .* set .* to bf16 or fp32"):
        load(folder, "fp16")
    load(folder, "bf16")
