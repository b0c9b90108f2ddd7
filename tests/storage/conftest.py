import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.storage.faults import allow_writing

# Writing files is as slow as the disk of the day; no test here is about time.
settings.register_profile("store", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("store")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach (`tmp_path` lies below a folder of its owner alone)."""
    folder = Path(tempfile.mkdtemp(prefix="covercal-public-"))
    folder.chmod(0o755)
    yield folder
    allow_writing(folder)
    shutil.rmtree(folder)
