"""Tables of other libraries' models: which `optimize()` makes faster, and by how much."""

from typing import Any

from benchmarks.end_to_end.products import Products
from benchmarks.report.results import machine_of, markdown, mebibytes, read_rows, spread, table
from refsam_kernels.integrations.models import MODELS


@table
def models_served() -> str:
    """The models that `optimize()` is tested with."""
    rows = ((each.model, each.classes.replace("*", r"\*"), each.parts) for each in MODELS)
    return markdown("model | classes | parts that are replaced", rows, text=3)


@table
def models_cpu() -> str:
    """Other libraries' models before and after `optimize()`."""
    rows = read_rows("models_cpu")
    memory = {_key(row): row for row in rows if row["measured"] == "memory"}
    timed = [row for row in rows if row["measured"] == "time"]
    header = "model | of | before, s | after, s | as fast | at most | memory, MiB | after | kept | error | after"
    origin = timed[0]["provenance"]
    rounds = sorted({row["before"]["rounds"] for row in timed})
    note = f"{machine_of(origin, 'threads')}, {' or '.join(map(str, rounds))} rounds."
    return markdown(header, (_line(row, memory.get(_key(row))) for row in timed), note, text=2)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["case"], row["dtype"]


def _line(row: dict[str, Any], memory: dict[str, Any] | None) -> list[str]:
    what = f"{row['task']}, {row['pixels']} pixels, {row['dtype']}"
    times = [spread(row[which], 1e-3) for which in ("before", "after")]
    errors = [f"{row['errors'][which]:.0e}" for which in ("before", "after")]
    sizes = ["", "", ""]
    if memory:
        before, after = memory["before"]["call"], memory["after"]["call"]
        share = f"{mebibytes(after)} ({100 * after / before:.0f} %)"
        sizes = [mebibytes(before), share, mebibytes(memory["after"]["kept"])]
    return [row["model"], what, *times, f"{row['speedup']:.2f}x", _bound(row), *sizes, *errors]


def _bound(row: dict[str, Any]) -> str:
    """How much faster than the plain model its matrix products alone are, without padding and at the best rate."""
    if "products" not in row:
        return ""
    products = Products(**row["products"])
    return f"{row['before']['median_ms'] / 1e3 / products.seconds:.2f}x"
