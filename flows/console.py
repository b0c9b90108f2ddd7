"""What every command shares: where it prints, and which store it works on."""

import json
import os
import re
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from storage.artifacts import ArtifactStore

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
Offline = Annotated[bool, typer.Option("--offline", help="Go on without the remote cache: from the local one alone.")]

FILE_WIDTH = 140  # where no terminal says how wide it is
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def the_store(*, offline: bool = False) -> ArtifactStore:
    """Return the store that the environment names; `offline` holds for everything this process does."""
    from tasks.cached import open_store

    if offline:
        os.environ["COVERCAL_OFFLINE"] = "1"
    return open_store()


def new_console(as_json: bool) -> Console:
    """Return where people read: stdout, or stderr when stdout is for a machine."""
    console = Console(stderr=as_json, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


def printable(text: str) -> str:
    """Return text without what a terminal takes for commands, and without line breaks."""
    return _CONTROL.sub(" ", text)


def say(console: Console, line: str) -> None:
    """Print a line as it stands, whatever is quoted in it: nothing of it is markup, and nothing is cut off."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def megabytes(count: int) -> str:
    """Return bytes as people read them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
