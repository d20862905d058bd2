"""Reads a checkpoint's ``config.json`` and checks each entry before anything is computed with it.

All entries are below ``model``: ``model_config`` (sizes), ``data_config`` (vocabulary and tokens) and ``loss_config``.
Entries that do not change an embedding are ignored (``dropout``, ``block_len``, ``mu_link_fn``). Upstream's command
line has its own values for how a cell becomes tokens (`COMMAND_LINE`). They override ``config.json``, and this project
computes with them. The published checkpoints have null in these entries. A checkpoint with another value is refused,
because it would be embedded differently from what it states.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.shape import ACTIVATIONS, ModelShape

START, END, PAD, UNKNOWN = "[START]", "[END]", "[PAD]", "unknown"
NEEDED_TOKENS = (UNKNOWN, START, END, PAD)
"""Special tokens that upstream's model looks up."""
COMMAND_LINE: Mapping[str, object] = {
    "clip_counts": 30,
    "normalize_to_scale": 0,
    "sort_genes": False,
    "filter_to_vocabs": True,
}
"""Entries of ``data_config`` that upstream's command line overrides with these values. It also overrides
``randomize_genes``, ``filter_outliers`` and ``min_expressed_genes``, which choose cells and orders for training."""
LARGEST = {"num_layers": 1000, "num_heads": 1024, "embed_dim": 2**16, "model_dim": 2**20, "seq_len": 2**20}
"""Largest accepted sizes: far above any model, and small enough to compute with."""
LONGEST_NAME = 200
"""Most characters in the name of a column, a token or a file."""
GENE_HEAD_DIM = 2048
"""Upstream's default hidden width of the gene-id head."""


@dataclass(frozen=True)
class CheckpointConfig:
    """A configuration that this project can compute.

    Attributes
    ----------
    content
        Everything below ``model``, unchanged.
    shape
        The model's sizes and constants.
    aux_column
        The obs column of the auxiliary token.
    gene_files
        Names of the embedding files in ``vocabs``, in the vocabulary's order.
    special_tokens
        The vocabulary's first entries.
    attn_bias, fw_bias
        Whether the projections of attention and of the feed-forward part have biases.
    gene_head_dim
        Hidden width of the gene-id head; None: there is no such head.
    """

    content: Mapping[str, Any]
    shape: ModelShape
    aux_column: str
    gene_files: tuple[str, ...]
    special_tokens: tuple[str, ...]
    attn_bias: bool
    fw_bias: bool
    gene_head_dim: int | None


def read_config(path: Path) -> CheckpointConfig:
    """Read and check a ``config.json``.

    Raises
    ------
    UserError
        When an entry is missing, invalid, or requires something that this project does not compute. The message names
        the first such entry.
    """
    content = read_json(path)
    whole = _Section(path, "model", _object(path, "model", content.get("model")))
    model, data, loss = whole.section("model_config"), whole.section("data_config"), whole.section("loss_config")
    sizes = {name: model.whole(name, 2 if name == "seq_len" else 1, most) for name, most in LARGEST.items()}
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise UserError(
            f"{path}: embed_dim {sizes['embed_dim']} is not a multiple of num_heads {sizes['num_heads']}; expected a "
            "multiple, as in the published checkpoints. Get it from its publisher again."
        )
    shape = ModelShape(
        **sizes,
        # Zero or less means no cap.
        softcap=model.number("softcap", -1e6, 1e6),
        log_counts_eps=model.number("log_counts_eps", 0, 1),
        activation=model.one_of("activation", ACTIVATIONS),
    )
    if 0 < shape.softcap < 1e-3:
        raise model.wrong("softcap", "a number from 0.001 to 1,000,000, or 0 for no cap")
    for section, name, value in [
        (model, "use_aux", True),
        (model, "aux_len", 1),
        *((data, name, value) for name, value in COMMAND_LINE.items()),
    ]:
        section.only(name, value)
    if data.get("pad_zeros") is not True:
        raise data.wrong("pad_zeros", "true, as in the published checkpoints")
    if data.get("gene_pad_token") != PAD:
        raise data.wrong("gene_pad_token", f"{PAD}, as in the published checkpoints")
    weight = loss.number("gene_id_loss_weight", -1e6, 1e6)
    return CheckpointConfig(
        content=whole.content,
        shape=shape,
        aux_column=_aux_column(data),
        gene_files=data.names("esm2_mappings"),
        special_tokens=_special_tokens(data),
        attn_bias=model.flag("attn_bias"),
        fw_bias=model.flag("fw_bias"),
        gene_head_dim=model.whole("gene_head_hidden_dim", 1, 2**20, GENE_HEAD_DIM) if weight > 0 else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    UserError
        When the file does not exist or is not a JSON object.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist; expected a checkpoint folder as `transcriptformer download` makes it: get the "
            "checkpoint from its publisher again."
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error)[:200]}); expected a JSON object. Get it from its publisher again."
        ) from error
    return _object(path, None, content)


def _object(path: Path, name: str | None, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        where = f"{path}: {name}" if name else str(path)
        raise UserError(
            f"{where} is {_shown(value)}; expected a JSON object, as in a checkpoint of `transcriptformer download`. "
            "Get it from its publisher again."
        )
    return value


def _aux_column(data: "_Section") -> str:
    value = data.get("aux_cols")
    match value:
        case None:
            expected = 'one obs column such as "assay": models without an auxiliary token are not supported'
        case list():
            expected = 'one obs column as text, such as "assay", not a list'
        case str() if _is_name(value) and value.strip() == value and "," not in value and "/" not in value:
            return value
        case _:
            expected = 'one auxiliary column such as "assay", as in the published checkpoints'
    raise data.wrong("aux_cols", expected)


def _special_tokens(data: "_Section") -> tuple[str, ...]:
    tokens = data.names("special_tokens")
    if len(set(tokens)) < len(tokens):
        raise data.wrong("special_tokens", "each token once")
    lacking = [token for token in NEEDED_TOKENS if token not in tokens]
    if lacking:
        raise data.wrong("special_tokens", f"{', '.join(lacking)} among them, as in the published checkpoints")
    return tokens


@dataclass(frozen=True)
class _Section:
    """A JSON object of the configuration, with its file and its name for messages."""

    path: Path
    name: str
    content: Mapping[str, Any]

    def section(self, name: str) -> "_Section":
        full = f"{self.name}.{name}"
        return _Section(self.path, full, _object(self.path, full, self.content.get(name)))

    def get(self, name: str) -> Any:
        if name not in self.content:
            raise UserError(
                f"{self.path} is not the configuration of a TranscriptFormer model: {self.name} has no {name}. "
                "Expected all entries of a published checkpoint: get it from its publisher again."
            )
        return self.content[name]

    def wrong(
        self, name: str, expected: str, action: str = "Get the checkpoint from its publisher again."
    ) -> UserError:
        found = _shown(self.content.get(name))
        return UserError(f"{self.path}: {self.name}.{name} is {found}; expected {expected}. {action}")

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int:
        value = self.get(name) if default is None else self.content.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least:,} to {most:,}")
        return value

    def number(self, name: str, least: float, most: float) -> float:
        value = self.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:,.0f} to {most:,.0f}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.get(name)
        if value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.get(name)
        if not isinstance(value, list) or not value or not all(map(_is_name, value)):
            raise self.wrong(name, "a list of names")
        return tuple(value)

    def only(self, name: str, value: object) -> None:
        """Refuse any other value. Null or a missing entry mean the same as this value."""
        found = self.content.get(name)
        if found is None or (found == value and isinstance(found, bool) == isinstance(value, bool)):
            return
        raise self.wrong(
            name,
            f"{json.dumps(value)} or null, as in the published checkpoints, because this project computes nothing else",
            "Set it to null to embed as upstream's command does.",
        )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
