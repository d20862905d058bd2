"""The expected tensors of a checkpoint are those of upstream's own model."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.inference.checkpoint_config import read_config
from census_tf_dagster.inference.state_dict import expected_tensors
from tests.support.project import UpstreamCommand

pytestmark = pytest.mark.upstream

MODELS = """
import json, sys, torch
from omegaconf import OmegaConf
from transcriptformer.model.model import Transcriptformer
for path in sys.argv[1:]:
    model = OmegaConf.create(json.load(open(path)))["model"]
    model.model_config.compile_block_mask = False
    tokens = {token: row for row, token in enumerate([*model.data_config.special_tokens, "a", "b", "c"])}
    built = Transcriptformer(
        model.data_config, model.model_config, model.loss_config, gene_vocab_dict=tokens,
        aux_vocab_dict={"assay": {"unknown": 0, "x": 1}}, emb_matrix=torch.zeros(len(tokens), 24),
    )
    print("MODEL", json.dumps({name: list(tensor.shape) for name, tensor in built.state_dict().items()}))
"""

EDITS: list[Callable[[dict[str, Any]], Any]] = [
    lambda _: None,
    lambda model: model["model_config"].update(attn_bias=True),
    lambda model: model["model_config"].update(fw_bias=True, num_layers=3, embed_dim=24, num_heads=2),
    lambda model: model["loss_config"].update(gene_id_loss_weight=0),
    lambda model: model["loss_config"].update(gene_id_loss_weight=-1.5),
]


def test_names_and_shapes_are_those_of_upstreams_model(upstream_command: UpstreamCommand, tmp_path: Path) -> None:
    build_checkpoint(tmp_path, {"x": ["a", "b", "c"]}, ["x"], embed_dim=16, seq_len=63, block_len=64)
    paths = []
    for number, edit in enumerate(EDITS):
        config = json.loads((tmp_path / "config.json").read_text())
        edit(config["model"])
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(config))
    command = [str(upstream_command.command.with_name("python")), "-c", MODELS, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    upstream = [json.loads(line.removeprefix("MODEL ")) for line in done.stdout.splitlines() if line[:6] == "MODEL "]
    for path, theirs in zip(paths, upstream, strict=True):
        ours = expected_tensors(read_config(path), tokens=10, aux_values=2, esm_dim=24)
        assert {name: list(shape) for name, shape in ours.items()} == theirs
