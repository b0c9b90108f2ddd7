"""A remote that fails is an error that names it and its cause, never a miss and never a recomputation."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import storage.remote
from storage.artifacts import ArtifactStore
from storage.errors import RemoteError, RemoteSettingsError
from storage.manifest import MANIFEST, Decision, Manifest, Request
from storage.remote import MARKER, RemoteObjects, open_remote
from storage.runs import RunRecord, StageRecord, new_run_name, write_run
from storage.testing import write_artifact
from tests.storage.faults import as_ordinary_user
from tests.storage.s3 import SECRET_KEY, answering, closed_port, reply, s3_server, use_s3

STAGE = "statistics"
REQUEST = Request(STAGE, 2, {"sample": 0, "text": "größe"})  # what `write_artifact` makes
ADDRESS = "s3://bucket/team"
SIGNED = b"see https://host/x?sv=2024&sp=r&sig=some%2Fsignature for more"
DENIED = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>No.</Message></Error>'
LONGEST_SECONDS = 8.0  # with a time limit of one second for each request
Answer = Callable[[str, str], bytes | None]


def build(folder: Path) -> None:
    (folder / "values.bin").write_bytes(bytes(200))


def must_not_build(folder: Path) -> None:
    raise AssertionError("a remote that fails was taken for one that has nothing")


def always(text: bytes | None) -> Answer:
    """Answer every request with the same."""
    return lambda method, path: text


def marked(rest: Answer) -> Answer:
    """Answer as a cache that is set up, and everything but the marker by `rest`."""
    return lambda method, path: reply("200 OK", b'{"format":1}') if path.endswith(MARKER) else rest(method, path)


@contextmanager
def nothing_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_s3(monkeypatch, closed_port())
    yield


@contextmanager
def served(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with answering(answer) as url:
        use_s3(monkeypatch, url)
        yield


def remote(*, writable: bool = True) -> RemoteObjects:
    return open_remote(ADDRESS, writable=writable, timeout=1)


def folder_remote(folder: Path, marker: bytes | None = b'{"format":1}') -> Path:
    """Return a shared folder with a marker, or without one."""
    folder.mkdir()
    if marker is not None:
        (folder / MARKER).write_bytes(marker)
    return folder


# what goes wrong on the way: how, the address, and what a person must read

ON_THE_WAY: dict[str, tuple[Answer | None, str]] = {
    "nothing listens": (None, "error sending request"),
    "no answer": (always(None), "error sending request"),
    "the line is cut": (always(b""), "error sending request"),
    "another protocol": (always(b"SSH-2.0-OpenSSH_9.6\r\n"), "error sending request"),
    "forbidden": (always(reply("403 Forbidden", DENIED)), "403 Forbidden"),
    "unauthorised": (always(reply("401 Unauthorized", b"who are you")), "401 Unauthorized"),
    "server error": (always(reply("500 Internal Server Error", b"oops")), "500 Internal Server Error"),
    "unavailable": (always(reply("503 Slow Down", b"later")), "503 Service Unavailable"),
    "half an answer": (always(reply("200 OK", b'{"for', length=12)), ""),
    "forbidden behind the marker": (marked(always(reply("403 Forbidden", DENIED))), "403 Forbidden"),
    "server error behind the marker": (marked(always(reply("500 Internal Server Error"))), "500 Internal"),
    "half an answer behind the marker": (marked(always(reply("200 OK", b"{", length=900))), ""),
}


@pytest.fixture(autouse=True)
def _one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what fails fail at once."""
    monkeypatch.setattr(storage.remote, "RETRIES", 0)


@pytest.fixture(params=ON_THE_WAY)
def cause(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let something go wrong on the way to `ADDRESS`; the cause that a person must read."""
    answer, text = ON_THE_WAY[request.param]
    way = served(answer, monkeypatch) if answer is not None else nothing_listens(monkeypatch)
    with way:
        yield text


def test_what_goes_wrong_on_the_way_is_told_with_its_cause_and_never_recomputed(cause: str, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "cache", remote())
    started = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        store.build_once(REQUEST, must_not_build)
    assert time.monotonic() - started < LONGEST_SECONDS
    assert not isinstance(caught.value, RemoteSettingsError)
    message = str(caught.value)
    assert message.startswith(f"Remote {ADDRESS} ")
    assert cause in message
    assert "Nothing was recomputed" in message
    assert "--offline" in message
    assert "\n" not in message
    assert list(store.manifests()) == []
    assert list((store.root / "staging").glob("*")) == []
    assert not (store.root / "unsent").exists()


def test_offline_a_store_builds_and_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_listens(monkeypatch):
        offline = ArtifactStore(tmp_path / "cache")
        assert offline.build_once(REQUEST, build).decision is Decision.BUILT
        assert offline.build_once(REQUEST, must_not_build).decision is Decision.HIT


def test_what_is_here_is_a_hit_though_nothing_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ArtifactStore(tmp_path / "cache").build_once(REQUEST, build)
    with nothing_listens(monkeypatch):
        outcome = ArtifactStore(tmp_path / "cache", remote()).build_once(REQUEST, must_not_build)
    assert outcome.decision is Decision.HIT


ASKED: dict[str, Callable[[RemoteObjects, Manifest, Path], object]] = {
    "look_up": lambda each, manifest, folder: each.look_up(STAGE, manifest.key),
    "manifests": lambda each, manifest, folder: list(each.manifests()),
    "folders": lambda each, manifest, folder: list(each.folders()),
    "verify": lambda each, manifest, folder: each.verify(STAGE, manifest.key),
    "fetch": lambda each, manifest, folder: each.fetch(manifest, folder),
    "commit": lambda each, manifest, folder: each.commit(manifest, folder),
    "records": lambda each, manifest, folder: each.records(),
    "send_record": lambda each, manifest, folder: each.send_record("a-run", b"{}"),
    "check": lambda each, manifest, folder: each.check(),
    "create": lambda each, manifest, folder: each.create(),
}
ASKED_BEHIND_THE_MARKER = [name for name in ASKED if name not in ("check", "create")]
BROKEN = always(reply("500 Internal Server Error", b"oops"))


@pytest.mark.parametrize(
    ("asked", "answer"),
    [(name, BROKEN) for name in ASKED] + [(name, marked(BROKEN)) for name in ASKED_BEHIND_THE_MARKER],
    ids=[*ASKED, *(f"{name} behind the marker" for name in ASKED_BEHIND_THE_MARKER)],
)
def test_whatever_is_asked_a_fault_is_an_error(
    asked: str, answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    manifest = write_artifact(tmp_path / "made", {"values.bin": b"x"})
    with served(answer, monkeypatch), pytest.raises(RemoteError, match=f"^Remote {ADDRESS} failed to .*500"):
        ASKED[asked](remote(), manifest, tmp_path / "made")


def test_a_server_that_recovers_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.remote, "RETRIES", 2)
    marker = reply("200 OK", b'{"format":1}')
    answers = iter([reply("503 Slow Down"), b"", marker, reply("404 Not Found"), marker])
    with served(lambda method, path: next(answers), monkeypatch):
        found = remote().look_up(STAGE, REQUEST.key)
    assert (found.manifest, found.damaged) == (None, False)


def test_a_server_that_never_answers_is_asked_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.remote, "RETRIES", 2)
    monkeypatch.setattr(storage.remote, "RETRY_SECONDS", 1)
    asked: list[str] = []
    with served(lambda method, path: asked.append(path), monkeypatch), pytest.raises(RemoteError):
        open_remote(ADDRESS, timeout=1).check()
    assert len(asked) == 3


# a file whose bytes do not come through is a fault of the line, not of the file


def serving(
    manifest: Manifest, files: dict[str, bytes], broken: str, answer: Callable[[bytes], bytes | None]
) -> Answer:
    """Answer as a cache with one artifact, of which the bytes of one file come as `answer` lets them."""

    def rest(method: str, path: str) -> bytes | None:
        if path.endswith(f"/{MANIFEST}"):
            return reply("200 OK", manifest.to_bytes())
        if "list-type=2" in path:
            return reply("200 OK", listing_of(manifest))
        name = path.rpartition(f"/{manifest.digest[:32]}/")[2]
        data = files[name]
        if method == "HEAD":
            return reply("200 OK", b"", length=len(data))
        if name == broken:
            return answer(data)
        return reply("206 Partial Content", data, Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}")

    return marked(rest)


def listing_of(manifest: Manifest) -> bytes:
    """Return what S3 says of the files of an artifact."""
    folder = f"team/objects/{manifest.stage}/{manifest.key[:2]}/{manifest.key}/{manifest.digest[:32]}"
    listed = "".join(
        f"<Contents><Key>{folder}/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>tag</ETag><Size>{each['size']}</Size></Contents>"
        for name, each in manifest.files.items()
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>".encode()


def partial(data: bytes, sent: int) -> bytes:
    return reply(
        "206 Partial Content", data[:sent], length=len(data), Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}"
    )


@pytest.fixture
def sent(tmp_path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """An artifact and its files."""
    files = {"a": bytes(range(200)), "b": bytes(range(100))}
    (tmp_path / "sent").mkdir()
    return write_artifact(tmp_path / "sent", files), files


def test_the_server_of_these_tests_can_be_pulled_from(
    sent: tuple[Manifest, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = sent
    with served(serving(manifest, files, "a", lambda data: partial(data, len(data))), monkeypatch):
        outcome = ArtifactStore(tmp_path / "cache", remote(writable=False)).build_once(REQUEST, must_not_build)
    assert (outcome.decision, outcome.ref) == (Decision.PULLED, manifest.ref)


@pytest.mark.parametrize(
    "answer",
    [
        lambda data: partial(data, len(data) // 2),
        lambda data: partial(data, 0),
        lambda data: reply("500 Internal Server Error"),
        lambda data: reply("403 Forbidden", DENIED),
        lambda data: b"",
    ],
    ids=["half of the body", "no body", "500", "403", "cut"],
)
def test_a_file_that_does_not_come_through_is_an_error_and_no_damage(
    sent: tuple[Manifest, dict[str, bytes]],
    answer: Callable[[bytes], bytes | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served(serving(*sent, "a", answer), monkeypatch):
        store = ArtifactStore(tmp_path / "cache", remote())
        with pytest.raises(RemoteError, match=rf"^Remote {ADDRESS} (failed|refuses) to read \S*/a: .*--offline"):
            store.build_once(REQUEST, must_not_build)
        assert store.look_up(STAGE, REQUEST.key).manifest is None
        assert list((store.root / "staging").iterdir()) == []


def test_a_file_that_does_not_come_through_cannot_be_verified(
    sent: tuple[Manifest, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        served(serving(*sent, "b", lambda data: partial(data, len(data) // 2)), monkeypatch),
        pytest.raises(RemoteError, match=rf"^Remote {ADDRESS} failed to read \S*/b: "),
    ):
        remote().verify(STAGE, REQUEST.key)


def test_a_file_that_comes_through_altered_is_damage(
    sent: tuple[Manifest, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = sent
    with served(serving(manifest, files, "a", lambda data: partial(bytes(len(data)), len(data))), monkeypatch):
        outcome = ArtifactStore(tmp_path / "cache", remote(writable=False)).build_once(REQUEST, build)
    assert outcome.decision is Decision.REBUILT
    assert outcome.reason.endswith(f"/a does not match its sha256 in {ADDRESS}")


# a push that does not come through


@pytest.mark.parametrize("status", ["500 Internal Server Error", "403 Forbidden", "507 Insufficient Storage"])
def test_what_cannot_be_sent_is_kept_here_and_told(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(method: str, path: str) -> bytes:
        return reply(status, b"no") if method in ("PUT", "POST") else reply("404 Not Found")

    with served(marked(answer), monkeypatch):
        store = ArtifactStore(tmp_path / "cache", remote())
        with pytest.raises(RemoteError, match=f"^Remote {ADDRESS} (failed|refuses) to send .*{status[:3]}.*--offline"):
            store.build_once(REQUEST, build)
        assert store.build_once(REQUEST, must_not_build).decision is Decision.HIT
        with pytest.raises(RemoteError):
            store.send_unsent()
    assert ArtifactStore(tmp_path / "cache").verify(STAGE, REQUEST.key) == []


# the cause in the words of the system


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "[Rr]efused"),
        (always(None), "[Tt]ime|TimedOut"),
        (always(reply("403 Forbidden", DENIED)), "AccessDenied"),
    ],
    ids=["refused", "timed out", "denied"],
)
def test_the_cause_is_told_as_the_system_tells_it(
    answer: Answer | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        served(answer, monkeypatch) if answer else nothing_listens(monkeypatch),
        pytest.raises(RemoteError, match=words),
    ):
        remote().check()


def test_a_host_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, "http://nobody.invalid:9000")
    with pytest.raises(RemoteError, match=r"nobody\.invalid:9000"):
        remote().check()


# what is no cache


def test_a_bucket_that_does_not_exist_is_no_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, s3_server().url)
    missing = open_remote("s3://no-such-bucket/team", writable=True)
    with pytest.raises(RemoteSettingsError, match=rf"s3://no-such-bucket/team holds no covercal cache \({MARKER}"):
        ArtifactStore(tmp_path / "cache", missing).build_once(REQUEST, must_not_build)
    with pytest.raises(RemoteError, match=r"^Remote s3://no-such-bucket/team failed to set up a cache: .*not found"):
        missing.create()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for address in (str(tmp_path / "gone"), f"file://{tmp_path}/gone"):
        with pytest.raises(RemoteSettingsError, match=rf"{tmp_path}/gone is not there; is it mounted\?"):
            open_remote(address)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RemoteSettingsError, match="file is not there"):
        open_remote(str(tmp_path / "file"))


def test_a_folder_that_is_no_cache_is_refused_and_says_how_to_make_it_one(tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "shared", None)
    store = ArtifactStore(tmp_path / "cache", open_remote(str(folder), writable=True))
    with pytest.raises(RemoteSettingsError, match=f"{folder} holds no covercal cache .* --create"):
        store.build_once(REQUEST, must_not_build)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_mounted_is_no_empty_cache(tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "shared")
    shared = open_remote(str(folder))
    shutil.rmtree(folder)
    folder.mkdir()  # what is left of a mount that went away: its empty mount point
    with pytest.raises(RemoteSettingsError, match="is not mounted"):
        ArtifactStore(tmp_path / "cache", shared).build_once(REQUEST, must_not_build)


def test_a_folder_that_is_unmounted_during_a_run_is_no_empty_cache(tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "shared")
    store = ArtifactStore(tmp_path / "cache", open_remote(str(folder)))
    assert store.look_up_remote(STAGE, REQUEST.key).manifest is None
    (folder / MARKER).unlink()
    with pytest.raises(RemoteError):
        store.build_once(REQUEST, must_not_build)


@pytest.mark.parametrize("found", ["2", '"1"', "null", "[1]", "1.5"])
def test_a_cache_of_another_format_is_refused(found: str, tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "shared", f'{{"format": {found}, "more": 1}}'.encode())
    with pytest.raises(RemoteSettingsError, match=f"{folder} has format .*; this covercal reads format 1"):
        ArtifactStore(tmp_path / "cache", open_remote(str(folder))).build_once(REQUEST, must_not_build)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"1", b"{}", b"\xff\x00", b"<html>login</html>"])
def test_a_marker_that_cannot_be_read_is_an_error(text: bytes, tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "shared", text)
    with pytest.raises(RemoteError, match=f"{MARKER} of remote {folder} is not readable"):
        ArtifactStore(tmp_path / "cache", open_remote(str(folder))).build_once(REQUEST, must_not_build)


def test_a_marker_that_cannot_be_read_says_how_to_go_on(tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "shared", b"<html>login</html>")
    with pytest.raises(RemoteError, match="--offline"):
        open_remote(str(folder)).check()


def test_a_shared_folder_that_may_not_be_read_is_no_empty_cache(public_folder: Path) -> None:
    shared = open_remote(str(public_folder), writable=True)
    shared.create()
    (public_folder / "made").mkdir()
    manifest = write_artifact(public_folder / "made", {"values.bin": b"x"})
    shared.commit(manifest, public_folder / "made")
    (public_folder / "objects" / STAGE).chmod(0o700)
    with as_ordinary_user(), pytest.raises(RemoteError, match=rf"^Remote {public_folder} .*[Pp]ermission.*--offline"):
        open_remote(str(public_folder)).look_up(STAGE, manifest.key)


def test_a_shared_folder_that_may_not_be_written_is_an_error(public_folder: Path) -> None:
    open_remote(str(public_folder), writable=True).create()
    (public_folder / "made").mkdir()
    manifest = write_artifact(public_folder / "made", {"values.bin": b"x"})
    with as_ordinary_user(), pytest.raises(RemoteError, match=rf"^Remote {public_folder} .*[Pp]ermission.*--offline"):
        open_remote(str(public_folder), writable=True).commit(manifest, public_folder / "made")


# addresses


@pytest.mark.parametrize(
    "address",
    [
        "s3://user:hunter2@bucket/team",
        "s3://:hunter2@bucket/team",
        "s3://hunter2@bucket/team",
        "s3://bucket/team?X-Amz-Signature=hunter2",
        "https://bucket.s3.amazonaws.com/team?X-Amz-Signature=hunter2",
        "az://container/team?sv=2024&sig=hunter2",
        "s3://bucket/team#hunter2",
        "ftp://user:hunter2@host/team",
        "file:///tmp?sig=hunter2",
        "user:hunter2@host/team",
        "s3:/user:hunter2@bucket/team",
    ],
)
def test_an_address_with_a_secret_is_refused_without_telling_it(address: str) -> None:
    with pytest.raises(RemoteSettingsError) as caught:
        open_remote(address)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in str(caught.value.__cause__ or "")
    assert "COVERCAL_REMOTE" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/team",
        "http://host/team",
        "https://bucket.s3.amazonaws.com",
        "s4://bucket",
        "memory://x",
        "bucket:team",
    ],
)
def test_an_unknown_scheme_is_refused_with_those_that_are_known(address: str) -> None:
    with pytest.raises(RemoteSettingsError, match=r"s3://, gs://, az://, file:// or is a folder"):
        open_remote(address)


@pytest.mark.parametrize("address", ["s3://", "s3:///team", "gs://", "az://", "s3:", "s3:team"])
def test_an_address_without_a_bucket_is_refused(address: str) -> None:
    with pytest.raises(RemoteSettingsError, match="is no address"):
        open_remote(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "file://",
        "file://host/tmp",
        "s3://[bucket/team",
        "s3://bucket//team",
    ],
)
def test_an_address_that_is_malformed_is_refused(address: str) -> None:
    with pytest.raises(RemoteSettingsError):
        open_remote(address)


def test_an_address_of_a_folder_may_be_encoded(tmp_path: Path) -> None:
    folder = folder_remote(tmp_path / "of a team")
    open_remote(f"file://{tmp_path}/of%20a%20team").check()
    open_remote(str(folder)).check()


def test_an_address_in_azure_names_the_container_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    opened = open_remote("az://container/team")._objects
    assert (opened.config["container_name"], opened.prefix) == ("container", "team")


@pytest.mark.parametrize("address", ["s3://bucket/team", "s3://bucket/team/", "s3://bucket", "s3://bucket/a b/c"])
def test_the_place_is_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, closed_port())
    assert open_remote(address).place == address.rstrip("/")


def test_nothing_is_asked_when_an_address_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, closed_port())
    assert not open_remote(ADDRESS).writable


# secrets

SECRETS = (SECRET_KEY, "some%2Fsignature", "some/signature", "hunter2")


def assert_no_secret(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.parametrize(
    "status", ["403 Forbidden", "401 Unauthorized", "500 Internal Server Error", "400 Bad Request"]
)
@pytest.mark.parametrize("behind_the_marker", [False, True])
def test_no_secret_is_in_a_message_or_in_a_run_record(
    status: str, behind_the_marker: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = always(reply(status, SIGNED))
    with served(marked(broken) if behind_the_marker else broken, monkeypatch):
        store = ArtifactStore(tmp_path / "cache", remote())
        with pytest.raises(RemoteError) as caught:
            store.build_once(REQUEST, must_not_build)
    message = str(caught.value)
    assert status[:3] in message
    assert_no_secret(message)
    record = RunRecord(new_run_name(), "run", "2026-01-01", 1.0, "FAILED", {}, [], error=f"RemoteError: {message}")
    assert_no_secret(write_run(store.root, record).read_text())


def test_no_secret_is_in_what_a_traceback_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(always(reply("403 Forbidden", SIGNED)), monkeypatch), pytest.raises(RemoteError) as caught:
        remote().check()
    shown, error = [], caught.value
    while error is not None:
        shown.append(str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert_no_secret("\n".join(shown))


def test_no_secret_of_the_endpoint_is_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, closed_port().replace("//", "//user:hunter2@"))
    with pytest.raises(RemoteError) as caught:
        remote().check()
    assert_no_secret(str(caught.value))


def test_a_query_of_azure_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", "sv=2024&sp=r&sig=some%2Fsignature")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", closed_port().replace("http:", "https:"))
    with pytest.raises(RemoteError) as caught:
        open_remote("az://container/team", timeout=1).check()
    assert_no_secret(str(caught.value))


def test_no_secret_is_in_a_manifest_or_in_the_record_of_a_run_that_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = s3_server()
    use_s3(monkeypatch, server.url)
    shared = open_remote("s3://covercal-tests/secrets", writable=True)
    shared.create()
    store = ArtifactStore(tmp_path / "cache", shared)
    built = store.build_once(REQUEST, build)
    pulled = ArtifactStore(tmp_path / "other", shared).build_once(REQUEST, must_not_build)
    stages = [StageRecord("label", STAGE, REQUEST.key, each.decision, each.reason, 1.0) for each in (built, pulled)]
    text = write_run(store.root, RunRecord("a-run", "run", "2026-01-01", 1.0, "COMPLETED", {}, stages)).read_bytes()
    shared.send_record("a-run", text)
    for name in server.names("secrets/"):
        assert_no_secret(server.read(f"secrets/{name}").decode())
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert_no_secret(path.read_bytes().decode())


def test_plain_http_is_spoken_only_to_an_endpoint_that_was_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(method: str, path: str) -> bytes:
        asked.append(path)
        return reply("404 Not Found")

    with served(answer, monkeypatch), pytest.raises(RemoteError):
        remote().check()
    assert asked == [f"/bucket/team/{MARKER}"]
