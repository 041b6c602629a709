"""setuptools' build backend, and a line of help where `pip install --no-build-isolation` finds none or too old a one."""

import sys

try:
    from setuptools import __version__
    from setuptools.build_meta import *  # noqa: F403 (the hooks that pip asks for)
except ModuleNotFoundError as error:
    sys.exit(
        f"refsam: {error.name} is not installed, which a build without isolation needs: "
        "pip install 'setuptools>=77' pybind11, or leave out --no-build-isolation"
    )

if int(__version__.split(".")[0]) < 77:
    sys.exit(
        f"refsam: setuptools is {__version__}, wanted 77 or newer: pip install 'setuptools>=77'"
    )
