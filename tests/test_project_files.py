"""Citation, notices and workflows agree with the project."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import refsam

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Packages for a checkout, not for an installation: tests, linters, their tools.
NOT_SHIPPED = {"dev"}


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == refsam.__version__
    assert citation["license"] == project()["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    papers = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert "arXiv:2307.00997" in papers


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_notices_name_every_dependency() -> None:
    extras = project()["optional-dependencies"]
    shipped = [
        package for name, group in extras.items() if name not in NOT_SHIPPED for package in group
    ]
    names = {
        re.split(r"[<>=;\[ ]", package)[0] for package in [*project()["dependencies"], *shipped]
    }
    rows = re.findall(r"^\| ([\w, -]+?) \|", (ROOT / "THIRD_PARTY_NOTICES.md").read_text(), re.M)
    listed = {name for row in rows for name in row.split(", ")}
    assert names <= listed, f"THIRD_PARTY_NOTICES.md lacks {sorted(names - listed)}"
    assert "THIRD_PARTY_NOTICES.md" in project()["license-files"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_files_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML reads "on" as a truth value
    for pattern in (triggers["pull_request"] or {}).get("paths", []):
        assert list(ROOT.glob(pattern)), pattern
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert "uses" in step or "run" in step
