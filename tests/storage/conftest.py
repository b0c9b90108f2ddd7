import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.faults import allow_writing


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach (`tmp_path` lies below a folder of its owner alone)."""
    folder = Path(tempfile.mkdtemp(prefix="covercal-public-"))
    folder.chmod(0o755)
    yield folder
    allow_writing(folder)
    shutil.rmtree(folder)
