"""The GPU report's processes: nothing that one task does may cost another its results."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu_report import rows, stand_in
from benchmarks.gpu_report import runner as runner_module
from benchmarks.gpu_report.runner import Runner, share
from benchmarks.gpu_report.stages import Stage, Task

ROW = """
import os
from pathlib import Path
from benchmarks.gpu_report.rows import Rows
rows = Rows(Path(os.environ["REFSAM_REPORT_OUT"]) / "rows.jsonl", *(
    os.environ["REFSAM_REPORT_" + name] for name in ("STAGE", "TASK")))
rows.write(value=1)
"""
HANG = ROW + "import time\ntime.sleep(600)"
IGNORES = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
STUBBORN = (
    IGNORES
    + "import subprocess, sys\n"
    + "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    + HANG.replace("value=1", "child=child.pid")
)
# In its last half second what is timed would come, if it did not wait.
AFTER_BESIDE = (
    """
import os, time
from pathlib import Path
path = Path(os.environ["REFSAM_REPORT_OUT"], "rows.jsonl")
while not (path.exists() and "beside" in path.read_text()):
    time.sleep(0.01)
time.sleep(0.5)
"""
    + ROW
)
PATIENCE = 300  # seconds: bounds a hang, decides nothing


class Clock:
    """The report's clock. It stands still until all tasks wrote their rows, then jumps: no machine is too slow for a limit."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.jump = 0.0
        self.has_come: Callable[[], bool] = lambda: False

    def jumps(self, out: Path, seconds: float, *tasks: str) -> None:
        """Lets it jump as soon as the tasks' rows are there."""
        self.jump = seconds
        self.has_come = lambda: {row["task"] for row in rows.read(out / "rows.jsonl")} >= {*tasks}

    def monotonic(self) -> float:
        """Seconds."""
        is_due = self.has_come() or time.monotonic() > self.begun + PATIENCE
        return self.jump if is_due else 0.0

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`."""
        time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(runner_module, "time", found)
    monkeypatch.setattr(runner_module, "GRACE", 0.2)
    return found


def task(name: str, code: str, limit_s: float | None = None) -> Task:
    return Task(name, command=("-c", code), limit_s=limit_s)


def stage(name: str, *tasks: Task, limit_s: float = PATIENCE, **options: object) -> Stage:
    return Stage(name, limit_s, tasks, **options)  # type: ignore[arg-type]


def run(out: Path, *stages: Stage, deadline: float = 2 * PATIENCE) -> tuple[int, list[dict]]:
    out.mkdir(exist_ok=True)
    code = Runner(out, deadline, {}).run(stages)
    return code, rows.read(out / "rows.jsonl")


def outcomes(found: list[dict]) -> dict[str, str]:
    return {row["task"]: row["outcome"] for row in found if "outcome" in row}


def test_a_failure_a_crash_and_a_hang_lose_only_themselves(tmp_path: Path, clock: Clock) -> None:
    clock.jumps(tmp_path, 11, "hangs")
    code, found = run(
        tmp_path,
        stage(
            "bad",
            task("fails", ROW + "raise RuntimeError('no such kernel')"),
            task("crashes", ROW + "os.abort()"),
            task("hangs", HANG, limit_s=10),
            parallel=3,
        ),
        stage("good", task("works", ROW), is_timed=True),
    )
    assert code == 1
    ended = outcomes(found)
    assert ended["fails"] == "failed: exit code 1: RuntimeError: no such kernel"
    assert ended["crashes"] == "failed: ended by SIGABRT"
    assert ended["hangs"] == "killed at its limit of 10 s"
    assert ended["works"] == "done"
    # The earlier output of each is there.
    assert [row["task"] for row in found if "value" in row].count("hangs") == 1
    assert sum("value" in row for row in found) == 4
    summary = (tmp_path / "summary.txt").read_text()
    assert "fails: failed: exit code 1" in summary
    assert "works: value 1" in summary
    assert "Traceback" in (tmp_path / "report.log").read_text()


def is_alive(process: int) -> bool:
    """Whether a process runs; one that was killed may need a moment to be gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_kill_takes_the_tasks_own_children_with_it(tmp_path: Path, clock: Clock) -> None:
    clock.jumps(tmp_path, 11, "stubborn")
    _, found = run(tmp_path, stage("bad", task("stubborn", STUBBORN, limit_s=10)))
    (child,) = (row["child"] for row in found if "child" in row)
    ends = time.monotonic() + PATIENCE
    while is_alive(child):
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_the_deadline_ends_everything_and_says_so(tmp_path: Path, clock: Clock) -> None:
    clock.jumps(tmp_path, 6, "hangs")
    stages = (stage("first", task("hangs", HANG)), stage("second", task("late", ROW)))
    code, found = run(tmp_path, *stages, deadline=5)
    assert code == 1
    assert outcomes(found) == {
        "hangs": "killed at its limit of 5 s",
        "late": "left out: no time was left",
    }


def test_what_is_made_to_hang_is_killed_after_its_first_row(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "time", clock)
    hangs, silent = task("hangs", HANG, limit_s=100), task("silent", "pass", limit_s=100)
    monkeypatch.setattr(stand_in, "HANG_LIMIT", 0.0)
    runner = stand_in.HangingRunner(tmp_path, 1000, {})
    assert runner.run([stage("bad", hangs, silent, parallel=2)]) == 1
    found = outcomes(rows.read(tmp_path / "rows.jsonl"))
    assert found == {"hangs": "killed at its limit of 0 s", "silent": "done"}


def test_time_spent_before_the_first_stage_counts(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 5, {}, began=time.monotonic() - 60)
    assert runner.run([stage("first", task("late", ROW))]) == 1
    assert runner.outcomes[0]["outcome"] == "left out: no time was left"


def test_tasks_at_their_limit_are_ended_together(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other each would take seconds, in which nothing else is measured."""
    sent: list[signal.Signals] = []
    send = runner_module.signalled
    monkeypatch.setattr(
        runner_module, "signalled", lambda one, number: sent.append(number) or send(one, number)
    )
    names = [f"stubborn {number}" for number in range(3)]
    clock.jumps(tmp_path, 4, *names)
    tasks = [task(name, IGNORES + HANG, limit_s=3) for name in names]
    _, found = run(tmp_path, stage("bad", *tasks, parallel=3))
    assert sent == [signal.SIGTERM] * 3 + [signal.SIGKILL] * 3
    assert outcomes(found) == dict.fromkeys(names, "killed at its limit of 3 s")


def test_no_task_takes_the_time_of_those_behind_it(clock: Clock) -> None:
    tasks = tuple(task(name, ROW) for name in ("first", "second", "third"))
    one_by_one = stage("timed", *tasks)
    assert [share(one_by_one, 120, behind) for behind in (2, 1, 0)] == [60, 80, 120]
    assert share(stage("smoke", *tasks, parallel=3), 120, 2) == 120


def test_the_log_stays_small_enough_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "MOST_LOG", 2000)
    run(tmp_path, stage("loud", task("loud", "for _ in range(99): print('x' * 100)")))
    assert (tmp_path / "report.log").stat().st_size <= 2000
    assert "loud" in (tmp_path / "summary.txt").read_text()


def test_the_summary_is_there_after_every_stage(tmp_path: Path) -> None:
    reads = "import os\nfrom pathlib import Path\n"
    reads += "print(Path(os.environ['REFSAM_REPORT_OUT'], 'summary.txt').read_text())"
    run(tmp_path, stage("first", task("works", ROW)), stage("second", task("reads", reads)))
    assert "reads] first        1 of 1 tasks done" in (tmp_path / "report.log").read_text()


def test_a_stages_limit_leaves_time_to_the_next(tmp_path: Path, clock: Clock) -> None:
    clock.jumps(tmp_path, 5, "hangs")
    stages = (stage("first", task("hangs", HANG), limit_s=4), stage("second", task("works", ROW)))
    _, found = run(tmp_path, *stages)
    assert outcomes(found) == {"hangs": "killed at its limit of 4 s", "works": "done"}


def test_nothing_is_timed_beside_work_in_the_background(tmp_path: Path) -> None:
    _, found = run(
        tmp_path,
        stage("compile", task("background", AFTER_BESIDE), is_background=True),
        stage("beside", task("beside", ROW)),
        stage("timed", task("timed", ROW), is_timed=True),
    )
    order = [row["task"] for row in found if "value" in row]
    assert order == ["beside", "background", "timed"]


def test_all_done_is_zero_also_with_wrong_results(tmp_path: Path) -> None:
    code, _ = run(tmp_path, stage("good", task("works", ROW + "rows.write(wrong='off by 1')")))
    assert code == 0
    assert "WRONG works: wrong: off by 1" in (tmp_path / "summary.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.log",
        "rows.jsonl",
        "summary.txt",
    ]


def test_each_test_of_a_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_skipped(): pass\n"
    )
    options = ["-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    options += ["-p", "benchmarks.gpu_report.pytest_rows", "--rootdir", str(tmp_path), str(path)]
    code, found = run(tmp_path / "out", stage("tests", Task("file", command=tuple(options))))
    results = {row["test"]: row for row in found if "test" in row}
    assert code == 0
    assert results["test_bad"]["wrong"]
    assert "not here" in results["test_skipped"]["skipped"]
    assert not results["test_good"].keys() & {"wrong", "skipped"}
