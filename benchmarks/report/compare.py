"""Compare two runs: `python -m benchmarks --compare BEFORE AFTER`.

Machines differ from day to day, so a provider is judged by its time relative to its case's baseline in the same run, of which
both runs' times are given too. Baselines are other people's code: they are shown, not judged.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str]  # device, operator, case, provider


@dataclass(frozen=True)
class Change:
    """One provider of one case in both runs; `slower_percent` is None where it cannot be judged, `note` then says why."""

    key: Key
    before_ms: float | None
    after_ms: float | None
    slower_percent: float | None
    note: str = ""

    def is_regression(self, threshold: float) -> bool:
        """Whether it became slower by more percent than that, or wrong."""
        slower = self.slower_percent is not None and self.slower_percent > threshold
        return slower or self.note.startswith("wrong")

    def line(self, threshold: float) -> str:
        """One row as a line to print."""
        name = f"{self.key[1]:18} {self.key[2]:20} {self.key[3]:18}"
        times = " -> ".join(
            "" if t is None else f"{t:9.2f} ms" for t in (self.before_ms, self.after_ms)
        )
        change = "" if self.slower_percent is None else f"{self.slower_percent:+7.1f} %"
        mark = "  REGRESSION" if self.is_regression(threshold) else ""
        return f"{name} {times} {change} {self.note}".rstrip() + mark


def report(before: Path, after: Path, threshold: float) -> int:
    """Prints every change; returns 1 if there is a regression, raises ValueError for what is no result of a run."""
    old, new = read_rows(before), read_rows(after)
    changes = list(compare_rows(old, new))
    if not changes:
        raise ValueError(f"{before}, {after}: have no case in common")
    print("time relative to the case's baseline in the same run; + is slower")
    for change in changes:
        print(change.line(threshold))
    machines = {machine(row) for rows in (old, new) for row in rows.values()}
    if len(machines) > 1:
        print(f"note: measured on different machines ({'; '.join(sorted(machines))})")
    regressions = sum(change.is_regression(threshold) for change in changes)
    print(
        f"{regressions} of {len(changes)} are regressions (more than {threshold:g} % slower, or wrong)"
    )
    return int(regressions > 0)


def read_rows(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a run by key, from its file or from all of its folder; raises ValueError if there are none."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    rows = {}
    for file in files:
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                rows[row["device"], row["operator"], row["case"], row["provider"]] = row
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{file}: got no rows of a benchmark, wanted what --out wrote"
            ) from None
    if not rows:
        raise ValueError(f"{path}: got no rows, wanted a file or folder that --out wrote")
    return rows


def compare_rows(
    old: dict[Key, dict[str, Any]], new: dict[Key, dict[str, Any]]
) -> Iterator[Change]:
    """A change for every provider of the cases that both runs have."""
    cases = {key[:3] for key in old} & {key[:3] for key in new}
    for key in [*old, *(key for key in new if key not in old)]:
        if key[:3] in cases:
            yield change_of(key, old.get(key, {}), new.get(key, {}))


def change_of(key: Key, before: dict[str, Any], after: dict[str, Any]) -> Change:
    """The change between two rows, of which one may be missing, skipped or wrong."""
    times = before.get("median_ms"), after.get("median_ms")
    if "wrong" in after:
        return Change(key, *times, None, f"wrong: {after['wrong']}")
    if None in times:
        side, row = ("after", after) if times[1] is None else ("before", before)
        reason = next((f"{word} {side}" for word in ("skipped", "wrong") if word in row), "")
        return Change(key, *times, None, reason or f"not measured {side}")
    if before.get("is_ceiling") or before["speedup"] is None or after["speedup"] is None:
        return Change(key, *times, None, "not judged")
    return Change(key, *times, 100 * (before["speedup"] / after["speedup"] - 1))


def machine(row: dict[str, Any]) -> str:
    """The machine that a row was measured on."""
    hardware = row["provenance"]["hardware"]
    return f"{hardware.get('gpu') or hardware['processor']}, {row['provenance']['threads']} threads"
