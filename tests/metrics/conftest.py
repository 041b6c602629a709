"""Every test of the metrics runs on the compiled module and on the Python that stands in for it."""

import importlib.util
from collections.abc import Iterator

import pytest

from refsam.metrics import region_contour


@pytest.fixture(scope="module", params=["native", "python"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which of the two computes J and F."""
    if request.param == "native" and not region_contour.is_native():
        pytest.skip("refsam.metrics._native was not built here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(region_contour, "_native", None)
        yield request.param


@pytest.fixture(scope="module")
def native():
    """The compiled module."""
    if importlib.util.find_spec("refsam.metrics._native") is None:
        pytest.skip("refsam.metrics._native was not built here")
    return importlib.import_module("refsam.metrics._native")
