import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors a second thread only spins
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COVERCAL_CACHE"] = tempfile.mkdtemp(prefix="covercal-tests-")  # no test touches the user's cache
os.environ["COVERCAL_SETTINGS"] = tempfile.mkstemp(prefix="covercal-settings-")[1]  # and none reads the user's settings
os.environ.pop("PREFECT_API_URL", None)

from flows.run import PREFECT_SETTINGS
from storage.artifacts import ArtifactStore

os.environ.update(PREFECT_SETTINGS)


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
