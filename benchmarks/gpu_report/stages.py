"""The stages of the GPU report, ordered by worth, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (
    "rel_pos_attention",
    "mask_postprocess",
    "token_image_attention",
    "dense_attention",
    "mask_upscale",
    "adapter_mlp",
    "adapter_projection",
    "mask_loss",
)
MODELS = ("vit_b", "vit_l", "vit_h")


@dataclass(frozen=True)
class Task:
    """One process: a function of `benchmarks.gpu_report.tasks` with arguments, or a command of its own for the interpreter."""

    name: str
    function: str = ""
    arguments: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    limit_s: float | None = None  # None: the stage's
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Tasks that share a time limit; `is_background`: beside the next stages, until one is timed."""

    name: str
    limit_s: float
    tasks: tuple[Task, ...]
    parallel: int = 1
    is_timed: bool = False
    is_background: bool = False


def of(function: str, *names: str, limit_s: float | None = None) -> tuple[Task, ...]:
    """A task for each name, which is the function's argument."""
    return tuple(Task(name, function, (name,), limit_s=limit_s) for name in names)


def test_files() -> tuple[Task, ...]:
    """A pytest process for each file that has tests for a GPU."""
    paths = [
        *sorted((ROOT / "tests" / "kernels" / "triton").glob("test_*.py")),
        *sorted((ROOT / "tests" / "kernels" / "cuda").glob("test_*.py")),
        ROOT / "tests" / "kernels" / "test_rel_pos_attention_augmented.py",
        ROOT / "tests" / "session" / "test_cuda_graphs.py",
        ROOT / "tests" / "session" / "test_uploads.py",
    ]
    options = ["-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    options += ["-p", "benchmarks.gpu_report.pytest_rows", "-m", "gpu"]
    names = [path.relative_to(ROOT / "tests").as_posix() for path in paths]
    return tuple(
        Task(name, command=(*options, str(path))) for name, path in zip(names, paths, strict=True)
    )


def smoke_tasks() -> tuple[Task, ...]:
    """A process for each operator and backend, so that a kernel that breaks the device loses no other's results."""
    kernels = ROOT / "kernels" / "refsam_kernels"
    return tuple(
        Task(f"{operator}, {backend}", "smoke", (operator, backend))
        for backend in ("triton", "cuda", "fallback", "automatic")
        for operator in OPERATORS
        if backend == "automatic" or [*(kernels / operator).glob(f"{backend}*")]
    )


# Processes of which each takes seconds to start, so that few of them measure many operators.
GROUPS = (
    ("token_image_attention", "dense_attention"),
    ("mask_postprocess", "mask_upscale", "mask_loss"),
    ("adapter_mlp", "adapter_projection"),
)
STAGES = (
    Stage("precompile", 170, of("precompile", "shipped", "tuning"), 2, is_background=True),
    # At once if the carried libraries load; else they are built here.
    Stage("libraries", 170, (Task("libraries", "libraries"),), is_background=True),
    Stage("start", 40, (Task("machine", "machine"),)),
    Stage("smoke", 80, smoke_tasks(), parallel=10),
    Stage("tests", 80, test_files(), parallel=8),
    Stage("encoder", 120, of("encoder", *MODELS), is_timed=True),
    Stage("tuning", 80, of("tuning", "64-14", "64-0", "80-14", "80-0"), is_timed=True),
    Stage("attention", 40, of("attention", "64", "80"), is_timed=True),
    Stage("training", 40, of("training", "vit_b", "vit_h"), is_timed=True),
    Stage("frames", 40, of("frames", "1", "8", "threads"), is_timed=True),
    Stage(
        "operators",
        50,
        tuple(Task(group[0], "operators", group) for group in GROUPS),
        is_timed=True,
    ),
    # Peers that are compiled for half a minute before they can be timed get what is left.
    Stage(
        "peers",
        90,
        tuple(Task(head_dim, "attention", (head_dim, "peers")) for head_dim in ("64", "80")),
        is_timed=True,
    ),
    # For a second call: what failed in the first one's rows, under compute-sanitizer.
    Stage("memcheck", 200, of("memcheck", *OPERATORS), parallel=4),
)
FIRST = tuple(stage.name for stage in STAGES if stage.name != "memcheck")
