"""Problems of masks to score, collected and listed in full."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refsam.errors import UserError

_KINDS = {
    "video missing": ("video missing", "videos missing"),
    "video extra": ("video not in the truth", "videos not in the truth"),
    "expression missing": ("expression missing", "expressions missing"),
    "expression extra": ("expression not in the truth", "expressions not in the truth"),
    "expression refused": (
        "expression that the model cannot take",
        "expressions that the model cannot take",
    ),
    "frame missing": ("frame missing", "frames missing"),
    "frame extra": ("frame not in the truth", "frames not in the truth"),
    "unreadable": ("unreadable PNG", "unreadable PNGs"),
    "mode": ("PNG neither palette nor grey", "PNGs neither palette nor grey"),
    "size": ("mask of another size than the truth", "masks of another size than the truth"),
    "values": ("mask not binary", "masks not binary"),
    "objects": ("mask with too high an object number", "masks with too high an object number"),
    "truth": ("fault in the truth", "faults in the truth"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `kind` (a key of the table above), `where` (a video, or video/expression), `what` in it."""

    kind: str
    where: str
    what: str

    @property
    def in_truth(self) -> bool:
        """Whether the truth itself is wrong, which no option can correct."""
        return self.kind == "truth"


class MaskProblemsError(UserError):
    """Masks that cannot be scored as they are; `problems` holds every reason, `advice` says what to do."""

    def __init__(self, problems: Sequence[Problem], advice: str = "") -> None:
        self.problems = tuple(problems)
        self.advice = (
            advice or "put them right, or score what cannot be used as empty with --missing zero"
        )
        if any(problem.in_truth for problem in problems):
            self.advice = "those of the truth must be put right"
        super().__init__(f"{'; '.join(describe(problems))}; {self.advice}")


def describe(problems: Iterable[Problem]) -> list[str]:
    """One line for each place and kind of problem, with everything it concerns."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem in problems:
        groups[problem.where, problem.kind].append(problem.what)
    lines = []
    for (where, kind), whats in groups.items():
        place = f"{where}: " if where else ""
        lines.append(f"{place}{len(whats)} {_KINDS[kind][len(whats) > 1]}: {', '.join(whats)}")
    return lines
