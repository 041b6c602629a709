"""The benchmarks of int8 at a tiny size: rows for all of ours, reasons for peers that are not there, errors by block."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import programs
from benchmarks.end_to_end import int8, peers
from benchmarks.end_to_end.int8_accuracy import DTYPES, errors_by_block
from benchmarks.report import tables
from refsam import RefSAMConfig
from tests.model.test_image_encoder import build_encoder
from tests.tiny_model import CONFIG


@torch.inference_mode()
def rows_of(folder: Path | None = None) -> list[dict[str, Any]]:
    config = RefSAMConfig.from_dict(CONFIG)
    return list(int8.run_all(list(int8.PROVIDERS), config, folder, repeats=1))


def test_ours_are_timed_and_peers_say_why_they_are_not() -> None:
    rows = rows_of()
    ours = [row for row in rows if row["name"] == int8.OURS]
    assert len(ours) == 6 and len(rows) == len(int8.PROVIDERS)
    assert all(row["median_ms"] > 0 for row in ours)
    errors = {row["dtype"]: row["error"] for row in ours if not row["wide"]}
    assert errors["float32"] < 1e-5 < errors["int8"] < 0.1
    theirs = [row for row in rows if row["name"] != int8.OURS]
    assert all("--prepare" in row["skipped"] for row in theirs)


def test_missing_packages_are_told(tmp_path: Path) -> None:
    config = RefSAMConfig.from_dict(CONFIG)
    sam, pixels = int8.seeded_sam(config), int8.image(config)
    with (
        mock.patch.object(peers, "export_onnx"),
        mock.patch.dict("sys.modules", {"openvino": None, "nncf": None}),
    ):
        reasons = list(peers.prepare(sam, pixels, tmp_path))
    assert [reason.partition(":")[0] for reason in reasons] == [peers.FLOAT_MODEL, peers.INT8_MODEL]


def test_the_table_shows_what_was_measured() -> None:
    rows = [row | {"model": "tiny", "image_size": 64, "threads": 1} for row in rows_of()]
    with mock.patch.object(tables, "read_rows", return_value=rows):
        lines = tables.int8_cpu().splitlines()
    assert len([line for line in lines if line.startswith("| tiny")]) == len(rows)
    assert any("1.00x" in line for line in lines) and any("skipped" in line for line in lines)
    slower = [row | {"instruction_set": "avx2"} for row in rows]
    with mock.patch.object(tables, "read_rows", return_value=rows + slower):
        assert tables.int8_cpu().count("refsam, avx2 |") == 6


def test_rows_of_other_settings_stay(tmp_path: Path) -> None:
    setting = {"name": "refsam", "dtype": "int8", "wide": False, "model": "vit_b", "image_size": 64}
    rows = [setting | {"threads": n, "instruction_set": s} for n in (1, 2) for s in ("", "avx2")]
    int8.write_rows(tmp_path / "rows.jsonl", rows)
    new = [rows[1] | {"median_ms": 1.0}]
    assert int8.other_rows(tmp_path / "rows.jsonl", new) == [rows[0], *rows[2:]]
    assert int8.other_rows(tmp_path / "none.jsonl", new) == []


def test_the_accuracy_table_shows_each_variant() -> None:
    score = {"davis": {"summary": {"J": 0.5, "false_area": 0.1}}}
    score["generated"] = {"accuracy": {"everything": {"J&F": 0.25}}}
    last = [{"up_to_it": 0.01}]
    result = {"clips": 60, "every": 3, "nano": last, "vit_b, random weights": last}
    result |= dict.fromkeys(DTYPES, score)
    with mock.patch.object(tables, "read_result", return_value=result):
        table = tables.int8_accuracy()
    assert "one frame in 3, mean J | 0.500 | 0.500 | 0.500 |" in table
    assert "the first 60 frozen clips, mean J&F | 0.250 | 0.250 | 0.250 |" in table


def test_memory_of_a_first_call() -> None:
    used = int8.first_call_bytes(int8.PROVIDERS[2], RefSAMConfig.from_dict(CONFIG))
    assert used is None or used > 0


def test_a_new_process_gives_its_result() -> None:
    assert programs.in_new_process(os.getpid) != os.getpid()


@pytest.mark.parametrize("size", [160])
def test_errors_grow_from_block_to_block_but_stay_small(size: int) -> None:
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        rows = errors_by_block(build_encoder(), pixels)
    assert [row["block"] for row in rows] == [0, 1, 2, 3]
    assert all(0 < row["alone"] < 0.05 and 0 < row["up_to_it"] < 0.05 for row in rows)
