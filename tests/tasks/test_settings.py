"""Settings of a machine: who wins, what is refused, what is told."""

import json
from pathlib import Path

import pytest

from covercal.errors import InputError
from tasks import settings
from tasks.cached import open_store
from tasks.settings import KNOWN, all_settings, apply_settings, read_file, without_secret
from tests.flows.test_cli import Command, command

__all__ = ["command"]


@pytest.fixture(autouse=True)
def nothing_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what another test applied, and every variable."""
    monkeypatch.setattr(settings, "_from_file", set())
    for known in KNOWN.values():
        monkeypatch.delenv(known.variable, raising=False)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file, not there yet."""
    path = tmp_path / "settings.toml"
    monkeypatch.setenv(settings.FILE, str(path))
    return path


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(file: Path) -> None:
    file.write_text('cache = "/from/file"\nremote = "/shared"\noffline = true\n')
    environment = {settings.FILE: str(file), "COVERCAL_CACHE": "/from/environment"}
    apply_settings(environment)
    assert environment["COVERCAL_CACHE"] == "/from/environment"
    assert environment["COVERCAL_REMOTE"] == "/shared"
    assert environment["COVERCAL_OFFLINE"] == "1"
    found = {each.name: (each.value, each.origin) for each in all_settings(environment)}
    assert found["cache"] == ("/from/environment", "environment")
    assert found["remote"] == ("/shared", str(file))
    assert found["remote_write"] == ("", "default")


def test_the_store_is_where_the_file_says(file: Path, tmp_path: Path) -> None:
    file.write_text(f"cache = {json.dumps(str(tmp_path / 'store'))}\n")
    assert open_store().root == tmp_path / "store"


def test_an_empty_name_of_the_file_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_file({settings.FILE: ""}) == {}


def test_without_a_file_nothing_is_changed_and_one_that_is_named_must_be_there(file: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_file({settings.FILE: str(file)})
    environment: dict[str, str] = {}
    apply_settings(environment)
    assert environment == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('cash = "/x"', "no setting `cash`; did you mean `cache`"),
        ('zzzzzz = "/x"', "there are cache, remote"),
        ("cache = [1]", "`cache` is a list"),
        ("cache =", "not valid TOML"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_with_what_would_be_right(file: Path, text: str, words: str) -> None:
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=words):
        read_file({settings.FILE: str(file)})


def test_every_setting_is_shown_with_its_origin(command: Command, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("remote_timeout = 5\n")
    monkeypatch.setenv("PREFECT_API_URL", "http://admin:secret@host:4200/api")
    code, out, _ = command("config", "--json")
    value = json.loads(out)
    rows = {row["name"]: row for row in value["settings"]}
    assert code == 0
    assert set(rows) == set(KNOWN)
    assert (rows["remote_timeout"]["value"], rows["remote_timeout"]["from"]) == ("5", str(file))
    assert rows["prefect_api_url"]["value"] == "http://…@host:4200/api"
    assert (value["file"], value["file_exists"]) == (str(file), True)
    _, shown, _ = command("config")
    assert "secret" not in shown
    assert all(known.variable in shown for known in KNOWN.values())


def test_a_wrong_settings_file_ends_with_2_before_any_work(command: Command, file: Path) -> None:
    file.write_text("cash = 1\n")
    code, _, err = command("cache", "ls")
    assert (code, "did you mean `cache`" in err) == (2, True)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://a:b@h/x", "https://…@h/x"),
        ("https://h/x@y", "https://h/x@y"),
        ("s3://b/p", "s3://b/p"),
        ("/a@b", "/a@b"),
    ],
)
def test_names_and_passwords_in_addresses_are_not_told(value: str, shown: str) -> None:
    assert without_secret(value) == shown
