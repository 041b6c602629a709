"""The benchmark of other libraries' models at a tiny size: rows, the products that bound them, and their table."""

from typing import Any

import pytest
import torch

from benchmarks.end_to_end import integrations, products
from benchmarks.end_to_end.integrations import Case, low_rank, measure
from benchmarks.report import model_tables
from tests.kernels.encoder_models import SAM
from tests.sam_modeling import sam_image_encoder

FEATURES = Case("tiny", lambda: sam_image_encoder(**SAM), 32)
STEP = Case("tiny", lambda: low_rank(sam_image_encoder(**SAM)), 32, "training step")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best rate is then another, measured faster."""
    monkeypatch.setattr(products, "ROWS", 8)


def test_a_row_counts_the_products_without_padding() -> None:
    row = measure(FEATURES, "float32", 1)
    tokens, width, height, window = 64, SAM["embed_dim"], 8, SAM["window_size"]
    layers = 2 * 2 * tokens * 12 * width**2
    zero = 2 * 3 * width**2  # the counter hooks all modules: qkv is called on what padding is, too
    positions = 4 * tokens * width * (height + window)  # queries with the rows of both tables
    attention = 4 * tokens * width * (tokens + window**2) + positions
    patches = 2 * tokens * width * 3 * 4**2
    neck = 2 * tokens * 16 * (width + 9 * 16)
    assert row["products"]["gflop"] == pytest.approx(
        1e-9 * (layers + zero + attention + patches + neck)
    )
    assert row["products"]["best_rate"] > 0
    assert row["errors"]["after"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_steps_row(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row: dict[str, Any] = measure(STEP, dtype, 1)
    assert row["errors"]["after"] <= max(1e-5, 2 * row["errors"]["before"])
    labels = {"case": "tiny", "model": "tiny", "pixels": 32, "task": STEP.task, "dtype": dtype}
    provenance: dict[str, Any] = {
        "versions": {"torch": "2"},
        "hardware": {"processor": "one"},
        "threads": 1,
    }
    row |= labels | {"measured": "time", "provenance": provenance}
    monkeypatch.setattr(model_tables, "read_rows", lambda name: [row])
    bound = (
        row["before"]["median_ms"] / 1e3 / row["products"]["gflop"] * row["products"]["best_rate"]
    )
    assert f"| {row['speedup']:.2f}x | {bound:.2f}x |" in model_tables.models_cpu()


def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integrations.CASES, "tiny", STEP)
    found = integrations.memory_of("tiny", "float32", "after")
    assert found.keys() == {"first_call", "call", "kept"}
    assert torch.is_grad_enabled()
