"""The benchmark core: no time without a right result, every row says where it comes from."""

import json
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import measure, provenance, run
from benchmarks.__main__ import main, table_line
from benchmarks.ops import rel_pos_attention
from benchmarks.ops.frame import compare_frames
from benchmarks.ops.image_encoder import encoder_flops
from benchmarks.ops.mask_postprocess import undecided_only
from benchmarks.registry import SHORT, Case, Workload, load_cases, unusable
from benchmarks.report import plots, tables
from refsam import RefSAMConfig
from tests.tiny_model import tiny_model

CEILING = measure.Ceiling(
    bytes_per_second=1e9, flops_per_second={torch.float32: 1e9, torch.bfloat16: 2e9}
)


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
    assert CEILING.milliseconds(1, 3_000_000, torch.bfloat16) == pytest.approx(1.5)
    assert str(CEILING) == "1.0 GB/s, 1 GFLOP/s in float32, 2 GFLOP/s in bfloat16"


def test_shares_of_the_limit_and_of_a_case_s_own_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"plain": 4.0, "half": 2.0}  # milliseconds
    times = {name: measure.Times(median, median, median, 1) for name, median in taken.items()}
    monkeypatch.setattr(run, "time_interleaved", lambda *_: times)
    workload = Workload(
        {"plain": lambda: None},
        lambda _: None,
        moved_bytes=2_000_000,
        flops=0,
        shapes={},
        ceilings={"half": lambda: None},
        skipped={"absent": "is not installed"},
    )
    case = Case("operator", "case", "plain", lambda device: workload)
    plain, half, absent = run.run_case(case, "cpu", CEILING, 0.01)
    assert plain["percent_of"]["half"] == 50
    assert plain["percent_of_ceiling"] == pytest.approx(50)  # it moves 2 MB at 1 GB/s
    assert half["is_ceiling"] and half["percent_of"]["half"] == 100
    assert absent["skipped"] == "is not installed" and "median_ms" not in absent
    assert "skipped: is not installed" in table_line(absent)
    assert "of the limit" in table_line(plain) and "% of half" in table_line(plain)


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
        load_cases(["mask_postproces"], "cpu")


def test_rows_say_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.measure_ceiling", lambda device: CEILING)
    monkeypatch.setattr(
        "benchmarks.__main__.load_cases", lambda *_, **__: [case_of(plain=1, other=1)]
    )
    assert main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["plain", "other"]
    assert rows[0]["provenance"].keys() == provenance.collect("cpu").keys()
    assert rows[0]["provenance"]["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("limits measured on cpu: 1.0 GB/s")
    assert len(printed) == 4


def test_wrong_result_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.__main__.measure_ceiling", lambda device: CEILING)
    monkeypatch.setattr(
        "benchmarks.__main__.load_cases", lambda *_, **__: [case_of(plain=1, other=2)]
    )
    assert main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 1


def test_plots_of_the_rows(tmp_path: Path) -> None:
    matplotlib_is_there = find_spec("matplotlib") is not None
    rows = list(run.run_case(case_of(plain=1, other=1, wrong=2), "cpu", CEILING, 0.01))
    said = plots.write_plots(rows, tmp_path)
    if not matplotlib_is_there:
        pytest.skip(said)
    assert said == "plots: operator.svg"
    picture = (tmp_path / "operator.svg").read_text()
    assert "case: other" in picture and "case: wrong" not in picture
    plots.write_plots(rows, tmp_path)
    assert (tmp_path / "operator.svg").read_text() == picture


def test_the_short_set_is_of_known_cases() -> None:
    cases = load_cases([], "cpu", short=True)
    assert len(cases) == len(SHORT)
    assert {case.operator for case in load_cases([], "cpu")} == {c.operator for c in cases}
    assert "image_encoder/ViT-H, 1024 pixels, bfloat16" not in {
        f"{case.operator}/{case.name}" for case in load_cases([], "cpu")
    }


def test_peers_that_cannot_run_say_why() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel for this device\nand a long story")

    assert unusable(broken) == "RuntimeError: no kernel for this device"
    assert unusable(lambda: None) is None


def test_operations_of_the_encoders() -> None:
    """Against counts by hand: products, windows without padding, global attention, relative terms."""
    billions = {"vit_b": 935.5, "vit_l": 2830.1, "vit_h": 5629.8}
    for preset, expected in billions.items():
        flops = encoder_flops(RefSAMConfig.preset(preset))
        assert flops / 1e9 == pytest.approx(expected, abs=0.05)


def test_frames_of_all_ways_agree() -> None:
    workload = compare_frames(tiny_model(), ("the red ball", "a dog"), (48, 64))
    assert list(workload.providers) == [
        "per-expression loop",
        "session, float32",
        "session, automatic dtypes",
    ]
    found = {name: provider() for name, provider in workload.providers.items()}
    assert all(workload.wrong(masks) is None for masks in found.values())
    masks, limit = found["session, float32"]
    assert 0 < masks.float().mean() < 1
    assert "decided pixels differ" in str(workload.wrong((~masks, limit)))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("trains", [False, True])
def test_ways_to_attend_agree(window: int, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, which takes seconds to compile, is left out."""
    monkeypatch.setattr(rel_pos_attention, "flex_attention", raise_absent)
    setting = rel_pos_attention.Setting("tiny", 2, 16, window, trains, grid=8)
    workload = rel_pos_attention.workload("cpu", setting=setting)
    assert workload.skipped["FlexAttention"] == "ImportError: absent"
    assert "augmented q and k, xformers" in workload.skipped
    assert "augmented q and k, SDPA" in workload.providers
    assert all(workload.wrong(provider()) is None for provider in workload.providers.values())


def raise_absent(*_: Tensor, **__: object) -> Tensor:
    raise ImportError("absent")


def test_tables_of_the_pages_are_those_of_the_committed_results() -> None:
    assert tables.main(["--check"]) == 0


def test_the_table_of_a_run() -> None:
    rows = list(run.run_case(case_of(plain=1, wrong=2), "cpu", CEILING, 0.01))
    good, wrong = (tables._bench_line(row) for row in rows)
    assert good[:2] == ["operator, case", "plain"] and "1.00x" in good
    assert any(cell.startswith("wrong: got 2.0") for cell in wrong)
    assert len(good) == len(wrong) == 6


def test_a_stale_table_would_be_found() -> None:
    text = "<!-- table: segment_nano_cpu -->\nold\n<!-- end -->"
    assert "old" not in tables.fill(text)
    assert "frames/s" in tables.fill(text)
