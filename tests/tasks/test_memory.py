"""How much memory hidden states may take: what the environment says, and a share of the free memory otherwise."""

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from covercal.calibration import Memory
from covercal.errors import InputError
from tasks.memory import FREE_SHARE, VARIABLE, activation_memory, parse_bytes

CPU = torch.device("cpu")
WRONG = ["many", "M", "G8", "-1", "-5M", "nan", "inf", "infG", "8T", "8GB", "0x10", "1,5G"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("1e6", 1_000_000),
        ("1K", 1024),
        ("500M", 500 * 1024**2),
        ("8G", 8 * 1024**3),
        ("8g", 8 * 1024**3),
        ("1.5k", 1536),
        ("0.5M", 512 * 1024),
        ("2 G", 2 * 1024**3),
    ],
)
def test_bytes_are_a_number_with_or_without_a_unit(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", [*WRONG, ""])
def test_what_is_no_number_of_bytes_is_named(text: str) -> None:
    message = f"COVERCAL_ACTIVATION_MEMORY is {text!r}; it is a number of bytes such as 500M or 8G."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "expected"), [("500M", 500 * 1024**2), (" 3K\n", 3072), ("0", 0)])
def test_the_environment_says_how_much_memory_hidden_states_may_take(
    text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert activation_memory(tmp_path, CPU) == Memory(expected, tmp_path / "activations")


@pytest.mark.parametrize("text", [None, "", "  "])
def test_where_it_does_not_they_may_take_a_share_of_the_free_memory(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(VARIABLE, text)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    assert activation_memory(tmp_path, CPU) == Memory(int(FREE_SHARE * 8000), tmp_path / "activations")


def test_on_another_device_it_is_the_free_memory_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 9000))
    assert activation_memory(tmp_path, torch.device("cuda")).limit == int(FREE_SHARE * 4000)


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_value_in_the_environment_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InputError, match=re.escape(f"{VARIABLE} is {text!r}")):
        activation_memory(tmp_path, CPU)


def test_no_folder_is_made_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    activation_memory(tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []
