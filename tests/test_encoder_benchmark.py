"""The encoder's benchmark at a tiny size: all providers agree, and a wrong one gets no time."""

from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.end_to_end import encoder
from benchmarks.report import tables
from refsam import RefSAMConfig
from tests.tiny_model import CONFIG

PEERS = (encoder.SDPA, encoder.TIMM, encoder.COMPILED, encoder.OPENVINO, encoder.ONNXRUNTIME)


@torch.inference_mode()
def rows_of(dtype: str, *, with_peers: bool = False) -> dict[str, dict[str, Any]]:
    """Rows by name; transformers takes seconds to import, and to compile takes more."""
    config = RefSAMConfig.from_dict(CONFIG)
    sam = encoder.random_sam(config)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    compared = [p for p in encoder.providers(dtype) if with_peers or not p.name.startswith(PEERS)]
    with (
        mock.patch.object(encoder, "memory_of", return_value=2**20),
        mock.patch.object(encoder, "providers", return_value=compared),
    ):
        rows = encoder.run_group(config, sam, dtype, sam(pixels), pixels, repeats=1)
        return {row["name"]: row for row in rows}


@pytest.mark.parametrize(
    "with_peers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ours", "all"]
)
def test_all_providers_agree(with_peers: bool) -> None:
    rows = rows_of("float32", with_peers=with_peers)
    assert {"refsam, fallback", "refsam, fallback, with adapters"} <= rows.keys()
    assert "segment-anything, optimize(), fallback" in rows
    assert (encoder.SDPA in rows) == (encoder.COMPILED in rows) == with_peers
    skipped = [name for name, row in rows.items() if "skipped" in row]
    assert set(skipped) <= {encoder.OPENVINO, encoder.ONNXRUNTIME}  # an extra of their own
    rows = {name: row for name, row in rows.items() if name not in skipped}
    assert all("wrong" not in row and row["median_ms"] > 0 for row in rows.values())
    assert all(row["error"] <= 1e-5 for row in rows.values())


def test_a_wrong_result_gets_no_time() -> None:
    with mock.patch.object(encoder, "TOLERANCE", 0.0):
        rows = rows_of("float32")
    assert "wrong" not in rows[encoder.BASELINE]
    ours = rows["refsam, fallback"]
    assert "error" in ours["wrong"] and "median_ms" not in ours


def test_a_peer_that_cannot_run_is_skipped() -> None:
    make_theirs = encoder.make_theirs

    def make(provider: encoder.Provider, *arguments: Any) -> Any:
        if provider.name.startswith(encoder.BASELINE) and provider.name != encoder.COMPILED:
            return make_theirs(provider, *arguments)
        return mock.Mock(side_effect=RuntimeError("no compiler"))

    with mock.patch.object(encoder, "make_theirs", make):
        rows = rows_of("float32", with_peers=True)
    row = rows[encoder.COMPILED]
    assert row["skipped"] == "RuntimeError: no compiler" and "median_ms" not in row
    assert "skipped" in encoder.table_line(row)
    assert "skipped" in " ".join(tables._encoder_line(row, rows[encoder.BASELINE]))


def test_the_table_of_the_rows() -> None:
    rows = rows_of("bfloat16")
    baseline = rows[encoder.BASELINE] | {"peak_memory_bytes": 2**22}
    lines = {name: tables._encoder_line(row, baseline) for name, row in rows.items()}
    assert all(len(line) == 7 for line in lines.values())
    assert lines["refsam, fallback"][4:6] == ["1", "25 %"]
    assert "wrong: far off" in tables._encoder_line({**baseline, "wrong": "far off"}, baseline)
