import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors a second thread only spins
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "160"  # what a table looks like does not depend on the terminal that the tests run in
os.environ["COVERCAL_CACHE"] = tempfile.mkdtemp(prefix="covercal-tests-")  # no test touches the user's cache
os.environ["COVERCAL_SETTINGS"] = tempfile.mkstemp(prefix="covercal-settings-")[1]  # and none reads the user's settings
os.environ.pop("PREFECT_API_URL", None)

from flows.server import PREFECT_SETTINGS
from storage.artifacts import ArtifactStore

os.environ.update(PREFECT_SETTINGS)

# One commit gives one verdict: the examples are the same in every run; HYPOTHESIS_PROFILE=search looks for new ones.
# Writing files is as slow as the disk of the day, and no test is about time.
settings.register_profile("repeatable", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


LONGEST = {"test_faults.py", "test_team.py", "test_memory.py"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """An empty store that also the command line and the tasks use."""
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "cache"))
    return ArtifactStore(tmp_path / "cache")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server for the whole session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take minutes first, so that several processes end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
