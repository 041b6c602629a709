"""Starts the tasks of the stages, stops them at their limits, keeps one log, and sums up. Nothing here imports torch."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import rows
from benchmarks.gpu_report.stages import Stage, Task

ROOT = Path(__file__).resolve().parents[2]
GRACE = 2.0  # seconds between the request to end and the kill
LEAST = 2.0  # seconds below which nothing is started any more
LAST_WORDS = 5.0  # seconds that what a task has printed may take to arrive
POLL = 0.05
MOST_LOG = 8 * 2**20  # bytes of the log, which must come back from the machine


def interpreter() -> list[str]:
    """The Python of the tasks: `REFSAM_PYTHON`, or the one that runs this."""
    return shlex.split(os.environ.get("REFSAM_PYTHON") or "") or [sys.executable]


@dataclass
class Running:
    """One task's process group."""

    stage: Stage
    task: Task
    process: subprocess.Popen[str]
    started: float
    ends: float
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    reader: threading.Thread | None = None


class Runner:
    """One run of the report into a folder."""

    def __init__(
        self,
        out: Path,
        deadline: float,
        environment: Mapping[str, str],
        site: Path | None = None,
        began: float | None = None,
    ) -> None:
        """`deadline` seconds after `began`, a time of `time.monotonic`, or else after now."""
        self.out, self.environment = out, environment
        self.began = time.monotonic() if began is None else began
        self.ends = self.began + deadline
        paths = [str(ROOT), str(ROOT / "kernels"), *([str(site)] if site else [])]
        self.paths = [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.rows = out / "rows.jsonl"
        self.log = (out / "report.log").open("w", buffering=1)
        self.lock = threading.Lock()
        self.logged = 0
        self.background: list[Running] = []
        self.outcomes: list[dict[str, Any]] = []

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs the stages in order; 0 if every task ran to its end."""
        self.rows.unlink(missing_ok=True)
        try:
            for stage in stages:
                self.run_stage(stage)
                self.write_summary(stages)
            self.wait_for_background()
        except KeyboardInterrupt:
            self.say("told to end: what runs is killed, and this is the summary")
        finally:
            self.end(self.background, "killed: the report ended")
            self.say("\n".join(self.write_summary(stages)))
        return int(any(outcome["outcome"] != "done" for outcome in self.outcomes))

    def run_stage(self, stage: Stage) -> None:
        """Runs a stage's tasks, `parallel` at a time, until its limit or the deadline."""
        if stage.is_timed:
            self.wait_for_background()
        ends = min(time.monotonic() + stage.limit_s, self.ends)
        left = deque(stage.tasks)
        running: list[Running] = []
        try:
            while left or running:
                while left and len(running) < stage.parallel:
                    task = left.popleft()
                    if ends - time.monotonic() < LEAST:
                        self.note(stage, task, "left out: no time was left", 0.0)
                    else:
                        until = share(stage, ends, len(left))
                        running.append(self.start(stage, task, until))
                if stage.is_background:
                    self.background += running
                    return
                running = self.unfinished(running)
                self.background = self.unfinished(self.background)
                time.sleep(POLL)
        except KeyboardInterrupt:
            self.end(running, "killed: the report ended")
            raise
        self.sum_up_stage(stage)

    def start(self, stage: Stage, task: Task, ends: float) -> Running:
        """Starts a task as a process group of its own."""
        now = time.monotonic()
        function = ["-m", "benchmarks.gpu_report.task", task.function, *task.arguments]
        environment = {**os.environ, **self.environment, **task.environment}
        environment |= {
            "PYTHONPATH": os.pathsep.join(self.paths),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "REFSAM_REPORT_OUT": str(self.out.resolve()),
            "REFSAM_REPORT_STAGE": stage.name,
            "REFSAM_REPORT_TASK": task.name,
        }
        process = subprocess.Popen(
            [*interpreter(), *(task.command or function)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        running = Running(stage, task, process, now, min(now + (task.limit_s or 1e9), ends))
        running.reader = threading.Thread(target=self.copy_output, args=(running,), daemon=True)
        running.reader.start()
        return running

    def copy_output(self, running: Running) -> None:
        """Copies a task's output to the log, line by line, under its name."""
        assert running.process.stdout is not None
        name = f"{running.stage.name}/{running.task.name}"
        for line in running.process.stdout:
            running.last_lines.append(line.rstrip())
            self.write_log(f"[{time.monotonic() - self.began:6.1f} {name}] {line.rstrip()}")

    def unfinished(self, running: Sequence[Running]) -> list[Running]:
        """The tasks that still run; those at their limit are ended first."""
        now = time.monotonic()
        for one in running:
            if (code := one.process.poll()) is not None:
                self.end([one], "done" if code == 0 else self.why(one, code))
        left = [one for one in running if one.process.returncode is None]
        late = [one for one in left if now >= one.ends]
        self.end(late, "killed at its limit of {limit:.0f} s")
        return [one for one in left if one not in late]

    def why(self, running: Running, code: int) -> str:
        """The reason of a failure in one line: the signal, or the last line that the task printed."""
        if code < 0:
            return f"failed: ended by {signal.Signals(-code).name}"
        if running.reader:
            running.reader.join(LAST_WORDS)
        said = next((line for line in reversed(running.last_lines) if line.strip()), "")
        return f"failed: exit code {code}: {said.strip()[:300]}"

    def end(self, running: Sequence[Running], outcome: str) -> None:
        """Ends what is left of the tasks' process groups, all at once, and notes the outcome of each."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            there = [one for one in running if signalled(one, number)]
            patience = time.monotonic() + GRACE
            for one in there:
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(max(0.0, patience - time.monotonic()))
        for one in running:
            if one.reader:
                one.reader.join(LAST_WORDS)
            said = outcome.format(limit=one.ends - one.started)
            self.note(one.stage, one.task, said, time.monotonic() - one.started)

    def note(self, stage: Stage, task: Task, outcome: str, seconds: float) -> None:
        """Writes the outcome of a task as a row, and prints it if it is a bad one."""
        facts = {"outcome": outcome, "seconds": round(seconds, 1)}
        rows.Rows(self.rows, stage.name, task.name).write(**facts)
        self.outcomes.append({"stage": stage.name, "task": task.name, **facts})
        if outcome != "done":
            self.say(f"{stage.name}/{task.name}: {outcome}")

    def wait_for_background(self) -> None:
        """Nothing is timed while other work runs."""
        while self.background:
            self.background = self.unfinished(self.background)
            time.sleep(POLL)

    def say(self, text: str) -> None:
        """Prints to the screen and to the log."""
        print(text, flush=True)
        self.write_log(text)

    def write_log(self, line: str) -> None:
        """Appends to the log until it is as long as it may be."""
        with self.lock:
            self.logged += len(line) + 1
            if self.logged <= MOST_LOG:
                self.log.write(line + "\n")

    def sum_up_stage(self, stage: Stage) -> None:
        """The stage's rows as a short table, and how its tasks ended."""
        found = [row for row in rows.read(self.rows) if row["stage"] == stage.name]
        self.say(f"{time.monotonic() - self.began:6.1f} s  {self.outcome_of(stage, found)}")
        if stage.is_timed:
            lines = (f"    {line_of(row)}" for row in found if "outcome" not in row)
            self.say("\n".join(lines))

    def outcome_of(self, stage: Stage, found: Sequence[Mapping[str, Any]]) -> str:
        """One line about a stage."""
        ended = [one for one in self.outcomes if one["stage"] == stage.name]
        done = sum(one["outcome"] == "done" for one in ended)
        results = Counter(result_of(row) for row in found if "outcome" not in row)
        counts = ", ".join(f"{count} {name}" for name, count in sorted(results.items()))
        return f"{stage.name:12} {done} of {len(stage.tasks)} tasks done; rows: {counts or 'none'}"

    def write_summary(self, stages: Sequence[Stage]) -> list[str]:
        """Writes how every stage ended, what went wrong, and the figures; returns it without the figures."""
        found = rows.read(self.rows)
        lines = [f"summary after {time.monotonic() - self.began:.0f} s"]
        lines += [
            self.outcome_of(stage, [row for row in found if row["stage"] == stage.name])
            for stage in stages
        ]
        bad = [one for one in self.outcomes if one["outcome"] != "done"]
        lines += [f"  {one['stage']}/{one['task']}: {one['outcome']}" for one in bad]
        lines += [f"  WRONG {line_of(row)}" for row in found if result_of(row) == "wrong"]
        timed = {stage.name for stage in stages if stage.is_timed}
        figures = [line_of(row) for row in found if row["stage"] in timed and "outcome" not in row]
        (self.out / "summary.txt").write_text("\n".join([*lines, *figures]) + "\n")
        return lines


def share(stage: Stage, ends: float, behind: int) -> float:
    """The time at which a task must end: one of several in sequence may take twice its share of the time left."""
    if stage.parallel > 1 or not behind:
        return ends
    now = time.monotonic()
    return now + (ends - now) * 2 / (behind + 2)


def signalled(running: Running, number: signal.Signals) -> bool:
    """Sends a signal to a task's process group; returns whether the group existed."""
    with suppress(ProcessLookupError):
        os.killpg(running.process.pid, number)
        return True
    return False


def result_of(row: Mapping[str, Any]) -> str:
    """Whether a row is a wrong result, a skipped one or a good one."""
    return "wrong" if row.get("wrong") else "skipped" if row.get("skipped") else "good"


def line_of(row: Mapping[str, Any]) -> str:
    """One row as a line to print: names first, then its figures."""
    hidden = {"stage", "at", "wrong", "skipped", "provenance", "task", "shapes"}
    facts = [f"{key} {short(value)}" for key, value in row.items() if key not in hidden]
    end = [f"{key}: {str(row[key])[:160]}" for key in ("wrong", "skipped") if row.get(key)]
    return f"{row['task']}: {', '.join([*facts, *end])}"[:400]


def short(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
