import pytest

from covercal.quantizers import sequential


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 columns in panels of 16, so that small problems have several of both."""
    monkeypatch.setattr(sequential, "BLOCK_COLUMNS", 64)
    monkeypatch.setattr(sequential, "PANEL_COLUMNS", 16)
