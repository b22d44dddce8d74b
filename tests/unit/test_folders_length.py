"""How long a text may be for a model with a table of positions: its tokenizer knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.safetensors_writer import write_folder
from xandrouting.inventory.scan import HeaderCache, scan


@pytest.mark.parametrize(
    ("kind", "tokenizer", "length"),
    [
        ("absolute", '{"model_max_length": 512}', 512),
        ("absolute", '{"model_max_length": 1000000000000000019884624838656}', 514),
        ("absolute", '{"model_max_length": 1024}', 514),
        ("absolute", '{"model_max_length": null}', 514),
        ("absolute", '{"model_max_length": 0}', 514),
        ("absolute", '{"model_max_length": "512"}', 514),
        ("absolute", "{}", 514),
        ("absolute", "{", 514),
        ("rotary", '{"model_max_length": 512}', 514),
        (None, '{"model_max_length": 512}', 514),
    ],
)
def test_its_tokenizer_knows(tmp_path: Path, kind: str | None, tokenizer: str, length: int) -> None:
    config = {"max_position_embeddings": 514, "position_embedding_type": kind}
    write_folder(tmp_path / "m", config, tokenizer_config__json=tokenizer)
    [model] = scan(tmp_path, HeaderCache()).models
    assert model.problem is None
    assert model.traits.context_length == length


def test_the_least_length_holds(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 8192, "max_target_positions": 448, "seq_length": 0}
    write_folder(tmp_path / "m", config)
    [model] = scan(tmp_path, HeaderCache()).models
    assert model.traits.context_length == 448


def test_what_it_was_taught_goes_first(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "m",
        {"max_position_embeddings": 514, "position_embedding_type": "absolute"},
        tokenizer_config__json='{"model_max_length": 512}',
        sentence_bert_config__json='{"max_seq_length": 128}',
    )
    [model] = scan(tmp_path, HeaderCache()).models
    assert model.traits.context_length == 128
