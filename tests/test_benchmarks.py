"""The benchmark core: no time without a right result, every row says where it comes from."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import measure, provenance, run, tables
from benchmarks.__main__ import main
from benchmarks.ops.mask_postprocess import undecided_only
from benchmarks.registry import Case, Workload, load_cases

CEILING = measure.Ceiling(bytes_per_second=1e9, flops_per_second=1e9)


def is_one(result: Tensor) -> str | None:
    return None if float(result) == 1 else f"got {float(result)}"


def case_of(**values: float) -> Case:
    """A case whose providers give these values."""
    providers = {name: partial(torch.tensor, value) for name, value in values.items()}
    workload = Workload(providers, is_one, moved_bytes=8, flops=0, shapes={"result": []})
    return Case("operator", "case", "plain", lambda device: workload)


def test_wrong_result_gets_no_time() -> None:
    rows = {r["provider"]: r for r in run.run_case(case_of(plain=1, fast=2), "cpu", CEILING, 0.01)}
    assert rows["fast"]["wrong"] == "got 2.0"
    assert "median_ms" not in rows["fast"]
    assert rows["plain"]["median_ms"] > 0
    assert rows["plain"]["speedup"] == 1


def test_result_that_turns_wrong_while_timed_gets_no_time() -> None:
    calls = Counter[str]()

    def drifting() -> Tensor:
        calls["drifting"] += 1
        return torch.tensor(1.0 if calls["drifting"] <= 3 else 2.0)

    workload = Workload({"drifting": drifting}, is_one, moved_bytes=8, flops=0, shapes={})
    (row,) = run.run_case(
        Case("operator", "case", "none", lambda d: workload), "cpu", CEILING, 0.01
    )
    assert row["wrong"] == "got 2.0"
    assert "median_ms" not in row


def test_providers_are_timed_in_turn() -> None:
    order: list[str] = []
    providers = {name: partial(order.append, name) for name in "abc"}
    times = measure.time_interleaved(providers, "cpu", seconds=0.0)
    assert {t.rounds for t in times.values()} == {measure.MINIMUM_ROUNDS}
    rounds = [order[i : i + 3] for i in range(6, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {"a", "b", "c"}


def test_quantiles_are_of_the_samples() -> None:
    times = measure.summarise([0.001 * value for value in range(11)])
    assert (times.median_ms, times.p20_ms, times.p80_ms) == pytest.approx((5, 2, 8))


def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 64 * 2**20

    def allocate() -> Tensor:
        return torch.ones(size // 4)[:1] + 1

    used = measure.peak_memory(allocate, "cpu")
    if used is None:
        pytest.skip("the peak of this process cannot be reset here")
    assert 0.9 * size < used < 1.5 * size


def test_ceiling_is_the_slower_of_memory_and_arithmetic() -> None:
    assert CEILING.milliseconds(moved_bytes=2_000_000, flops=1) == pytest.approx(2)
    assert CEILING.milliseconds(moved_bytes=1, flops=3_000_000) == pytest.approx(3)


def test_mask_gate_refuses_wrong_masks() -> None:
    expected = torch.zeros(1, 100, 100, dtype=torch.bool)
    decided = torch.rand(1, 100, 100, generator=torch.Generator().manual_seed(0)) > 0.01
    assert undecided_only(expected, expected=expected, decided=decided) is None
    assert undecided_only(~decided, expected=expected, decided=decided) is None
    wrong = undecided_only(~expected, expected=expected, decided=decided)
    assert wrong == f"{int(decided.sum())} decided pixels differ, none may"


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"operator: got 'mask_postproces', wanted one of .*mask_postprocess"
    ):
        load_cases(["mask_postproces"])


def test_rows_say_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.measure_ceiling", lambda device: CEILING)
    monkeypatch.setattr("benchmarks.__main__.load_cases", lambda names: [case_of(plain=1, other=1)])
    assert main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["plain", "other"]
    assert rows[0]["provenance"].keys() == provenance.collect("cpu").keys()
    assert rows[0]["provenance"]["versions"]["torch"] == torch.__version__
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_wrong_result_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.__main__.measure_ceiling", lambda device: CEILING)
    monkeypatch.setattr("benchmarks.__main__.load_cases", lambda names: [case_of(plain=1, other=2)])
    assert main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 1


def test_tables_of_the_pages_are_those_of_the_committed_results() -> None:
    assert tables.main(["--check"]) == 0


def test_a_stale_table_would_be_found() -> None:
    text = "<!-- table: nano_targets -->\nold\n<!-- end -->"
    assert "old" not in tables.fill(text)
    assert "frames/s" in tables.fill(text)
