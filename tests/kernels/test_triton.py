"""Triton kernels without a GPU: their tests in the interpreter, and ahead-of-time compilation of a few."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gates import compile_gate
from refsam_kernels.core import triton_aot
from refsam_kernels.core.triton_aot import CompilationError, Resources, cases_of, compile_ahead
from tests.kernels.interpreter import run_interpreted
from tests.kernels.processes import processes_of

pytest.importorskip("triton")

OPERATORS = triton_aot.operators_with_triton()


@pytest.mark.parametrize("operators", processes_of(OPERATORS), ids=" ".join)
def test_in_the_interpreter(operators: tuple[str, ...]) -> None:
    run_interpreted(operators)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_slow_in_the_interpreter(operator: str) -> None:
    run_interpreted([operator], "-m", "slow")


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_ahead_of_time(operator: str) -> None:
    """Two configurations each; `python -m benchmarks.gates.compile_gate` compiles all."""
    for case in cases_of(operator)[:2]:
        resources = compile_ahead(case, case.architectures[0])
        assert 0 < resources.registers < 256
        assert resources.spill_bytes <= triton_aot.SPILL_LIMIT


def test_log_of_ptxas_is_read() -> None:
    log = "0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nUsed 142 registers, used 1 barriers"
    assert triton_aot.read_ptxas_log(log) == (142, 12)
    with pytest.raises(CompilationError, match="ptxas said nothing"):
        triton_aot.read_ptxas_log("")


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   FFMA R3, R3, R3, R3 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/                   FADD R3, R3, R3 ;
        /*0050*/                   FADD R3, R3, R3 ;
        /*0060*/              @!P1 BRA.U UP0, `(.L_x_1) 0x40 ;
        /*0070*/                   BRA 0x10 ;
        /*0080*/                   BRA 0x80 ;
"""


def test_the_longest_innermost_loop_is_counted() -> None:
    assert triton_aot.longest_loop(CODE) == 3
    assert triton_aot.longest_loop("") == 0


def case_named(name: str, **options: Any) -> triton_aot.CompileCase:
    return triton_aot.CompileCase(name, kernel=None, signature={}, **options)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cases that compile to made-up resources, and where the gate writes its rows."""

    def compiled(case: triton_aot.CompileCase, architecture: int) -> Resources:
        if case.name == "broken":
            raise CompilationError(f"broken, sm_{architecture}: no such thing")
        return Resources(registers=99, shared_bytes=0, spill_bytes=65)

    monkeypatch.setattr(compile_gate, "compile_ahead", compiled)
    monkeypatch.setattr(compile_gate, "operators_with_triton", lambda: ["one", "other"])
    return tmp_path / "gate.json"


def run_gate(gate: Path, monkeypatch: pytest.MonkeyPatch, operator: str, *cases: Any) -> int:
    monkeypatch.setattr(compile_gate, "cases_of", lambda _: list(cases))
    return compile_gate.main([operator, "--out", str(gate)])


def test_gate_fails_for_spills_and_for_what_does_not_compile(
    gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_gate(gate, monkeypatch, "one", case_named("spills")) == 1
    assert run_gate(gate, monkeypatch, "one", case_named("broken")) == 1
    assert run_gate(gate, monkeypatch, "one", case_named("listed", spill_limit=None)) == 0
    row = json.loads(gate.read_text())["rows"][0]
    assert (row["case"], row["registers"], row["architecture"]) == ("listed", 99, 80)


def test_gate_goes_on_where_it_was_ended(gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def judge(case: triton_aot.CompileCase, architecture: int) -> dict[str, Any]:
        seen.append(case.name)
        if case.name == "killed":
            raise KeyboardInterrupt
        return {"registers": 1, "shared_bytes": 0, "spill_bytes": 0, "loop_instructions": 0}

    monkeypatch.setattr(compile_gate, "judge", judge)
    monkeypatch.setattr(
        compile_gate,
        "cases_of",
        lambda _: [case_named(name, architectures=(90,)) for name in ("done", "killed", "behind")],
    )
    with pytest.raises(KeyboardInterrupt):
        compile_gate.main(["one", "--out", str(gate)])
    assert [row["case"] for row in json.loads(gate.read_text())["rows"]] == ["done"]
    monkeypatch.setattr(
        compile_gate,
        "cases_of",
        lambda _: [case_named(name, architectures=(90,)) for name in ("done", "behind")],
    )
    seen.clear()
    assert compile_gate.main(["one", "--resume", "--out", str(gate)]) == 0
    assert seen == ["behind"]
    seen.clear()
    monkeypatch.setattr(compile_gate, "key_of", lambda case: "another source")
    compile_gate.main(["one", "--resume", "--out", str(gate)])
    assert seen == ["done", "behind"]


def test_gate_replaces_the_rows_of_its_operators_only(
    gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for operator, name in (("other", "kept"), ("one", "old"), ("one", "new")):
        case = case_named(name, spill_limit=None, architectures=(90,))
        run_gate(gate, monkeypatch, operator, case)
    rows = json.loads(gate.read_text())["rows"]
    assert [row["case"] for row in rows] == ["new", "kept"]
