"""The system's own Chromium, and the folder where screenshots are left; nothing is downloaded."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@contextmanager
def launched() -> "Iterator[Browser]":
    """Yield a browser; without one the test is skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium is installed, and none is downloaded")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def screenshots() -> Path:
    """Return the folder that `COVERCAL_SCREENSHOTS` names, else `build/screenshots`."""
    folder = Path(os.environ.get("COVERCAL_SCREENSHOTS") or Path(__file__).parents[1] / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
