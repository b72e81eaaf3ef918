"""One cluster and one folder of runs for all cluster tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster
from tests.slurm.project import Project


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running two-node cluster."""
    lacks = missing()
    if lacks:
        pytest.fail(f"a cluster needs {', '.join(lacks)}; run: make test-slurm", pytrace=False)
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Runs of the tiny configuration, with their puzzles."""
    folder: Path = tmp_path_factory.mktemp("runs")
    return Project(cluster, folder)


@pytest.fixture(scope="session")
def chain(project: Project) -> dict[str, str]:
    """The whole default chain, run undisturbed under the default launcher as run ``first``: job ids by phase."""
    jobs = project.submit_chain("first")
    for job in jobs.values():
        project.finish(job)
    return jobs
