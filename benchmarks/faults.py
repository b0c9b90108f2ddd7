"""Injects faults into real runs on a small model and says what held; its table is in `docs/reliability.md`.

`python -m benchmarks.faults [--kills 100] [--rounds 20] [--every 1] [--output FILE] [--markdown FILE]`; as root it
fills a small tmpfs, else it limits the size of files.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_runs import (
    BLOCKS,
    PHASES,
    Kill,
    Place,
    Ran,
    faults_of,
    finished_blocks,
    in_child,
    make_recipe,
    run,
)
from benchmarks.real_model import report
from benchmarks.s3 import bucket_address, s3_server
from storage.artifacts import ArtifactStore
from storage.manifest import MANIFEST, Request

DISK_SIZES = (0.15, 0.35, 0.55, 0.75, 0.95)  # of what a run writes


@dataclass(frozen=True, slots=True)
class Finding:
    """What one kind of fault did.

    Attributes
    ----------
    fault, holds
        The fault, and what must hold.
    times
        How often it was injected.
    broken
        One line for each time that it did not hold.
    detail
        What was counted besides.
    """

    fault: str
    holds: str
    times: int
    broken: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all faults share: a recipe, an empty folder to work in, a run that nothing disturbed, an S3 endpoint."""

    recipe: Path
    folder: Path
    undisturbed: Ran
    s3: str

    def place(self, *, remote: bool = False) -> Place:
        """Return a fresh cache folder, with a fresh remote cache on request."""
        root = Path(tempfile.mkdtemp(dir=self.folder, prefix="cache-"))
        return Place(root, new_remote(self.s3) if remote else "")


def new_remote(server: str) -> str:
    """Set up an empty cache in a new bucket and return its address."""
    address = bucket_address(server)

    def create() -> dict[str, Any]:
        from storage.remote import open_remote

        return {"created": open_remote(address, writable=True).create()}

    assert in_child(create) == {"created": True}
    return address


@contextmanager
def prepared(folder: Path) -> Iterator[Bench]:
    """Make the recipe, start an S3 endpoint on loopback and run once undisturbed."""
    with s3_server() as server:
        recipe = make_recipe(folder)
        bench = Bench(recipe, folder, Ran(), server)
        undisturbed = run(recipe, bench.place(remote=True))
        assert not undisturbed.error, undisturbed.error
        yield Bench(recipe, folder, undisturbed, server)


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def killed_runs(bench: Bench, times: int, seed: int = 0) -> Finding:
    """Kill a run at a random moment of each phase in turn; run again; compare."""
    generator = random.Random(seed)
    broken: list[str] = []
    redone = saved = 0
    for number in range(times):
        phase = PHASES[number % len(PHASES)]
        passes = bench.undisturbed.phases[phase]
        index = generator.randrange(len(passes))
        kill = Kill(phase, index, generator.random() * passes[index])
        place = bench.place(remote=True)
        name = f"{phase}, pass {index}, after {kill.delay * 1000:.1f} ms"
        first = run(bench.recipe, place, kill)
        if first.signal != signal.SIGKILL:
            broken.append(f"{name}: was not killed ({first.error or first.signal})")
            continue
        state = in_child(lambda place=place: _state(place))
        again = run(bench.recipe, place)
        broken += [f"{name}: {fault}" for fault in _after_kill(bench, state, again)]
        after = in_child(lambda place=place: _state(place))
        broken += [f"{name}: after the next run: {fault}" for fault in after["faults"]]
        if set(after["remote"]) != set(bench.undisturbed.digests):
            broken.append(f"{name}: the remote does not have all artifacts after the next run")
        redone += again.blocks
        saved += sum(state["blocks"].values())
        shutil.rmtree(place.root)
    return Finding(
        "SIGKILL at a random moment of capture, quantisation, commit, push",
        "the next run finishes; bit-equal results; nothing half-written is read; finished shards and blocks stay",
        times,
        tuple(broken),
        f"{saved} finished blocks were gone on from, {redone} quantised after the kills",
    )


def _state(place: Place) -> dict[str, Any]:
    """Return what lies in a cache and its remote."""
    store = place.store()
    remote = [key for _, key in store.remote.folders()] if store.remote is not None else []
    here = {key: store.look_up(stage, key).manifest for stage, key in store.folders()}
    return {
        "here": {key: manifest.digest for key, manifest in here.items() if manifest is not None},
        "remote": remote,
        "blocks": finished_blocks(place.root),
        "faults": faults_of(store),
    }


def _after_kill(bench: Bench, state: dict[str, Any], again: Ran) -> Iterator[str]:
    """Yield what does not hold of the run that follows a kill."""
    if again.error or again.signal:
        yield f"the next run failed: {again.error or again.signal}"
        return
    yield from state["faults"]
    if again.digests != bench.undisturbed.digests:
        yield "the results differ from those of an undisturbed run"
    lost = [row for row in again.decisions if row[1] in state["here"] and row[2] != "hit"]
    if lost:
        yield f"{len(lost)} finished artifacts were made again"
    missing = [stage for stage, key, *_ in again.decisions if stage == "checkpoint" and key not in state["here"]]
    expected = BLOCKS * len(missing) - sum(n for key, n in state["blocks"].items() if key not in state["here"])
    if again.blocks != expected:
        yield f"{again.blocks} blocks were quantised, {expected} were not finished"


# --- many at once ----------------------------------------------------------------------------------------------------

WANTED = Request("statistics", 1, {"asked": "at once"})


def asked_at_once(bench: Bench, times: int, processes: int = 8) -> Finding:
    """Let processes ask for one key at once; in every second round the one that builds is killed."""
    broken = []
    for number in range(times):
        root = bench.place().root
        killed = number % 2 == 1
        children = [_ask(root, first_is_killed=killed) for _ in range(processes)]
        if killed:
            os.kill(_builder(root), signal.SIGKILL)
        outcomes = [_answer(*child) for child in children]
        counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
        counts["waited"] = counts.get("waited", 0) + counts.pop(
            "hit", 0
        )  # on a busy machine one comes when all is done
        expected = {"built": 1, "waited": processes - 1 - killed} | ({"killed": 1} if killed else {})
        if counts != expected:
            broken.append(f"round {number}: {counts}, not {expected}")
        shutil.rmtree(root)
    return Finding(
        f"{processes} processes ask for one key at once",
        "one build, the others hit after waiting; a killed holder blocks nobody",
        times,
        tuple(broken),
        f"the holder was killed in {times // 2} of the rounds",
    )


def _ask(root: Path, *, first_is_killed: bool) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader

    def build(folder: Path) -> None:
        waits_for_its_end = first_is_killed and not any(root.glob("builder-*"))
        (root / f"builder-{time.monotonic_ns()}").write_text(str(os.getpid()))
        time.sleep(600 if waits_for_its_end else 0.3)
        (folder / "file").write_text("content")

    try:
        os.write(writer, str(ArtifactStore(root).build_once(WANTED, build).decision).encode())
    finally:
        os._exit(0)


def _builder(root: Path) -> int:
    while not (found := sorted(root.glob("builder-*"))) or not found[0].read_text():
        time.sleep(0.005)
    return int(found[0].read_text())


def _answer(child: int, reader: int) -> str:
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else text


def pushed_at_once(bench: Bench, times: int) -> Finding:
    """Let two users build one key with different bytes and send it at once."""
    broken = []
    for number in range(times):
        address = new_remote(bench.s3)
        roots = [bench.place().root for _ in range(2)]
        children = [_push(Place(root, address), str(index) * 50_000) for index, root in enumerate(roots)]
        digests = {_answer(*child) for child in children}

        def pulled(address: str = address) -> dict[str, Any]:
            store = bench.place().store()
            third = Place(store.root, address).store()
            outcome = third.build_once(WANTED, _never)
            folder = third.path(outcome.ref)
            letters = {(folder / name).read_text()[:1] for name in ("a", "b", "c")}
            return {"digest": outcome.ref.digest, "letters": sorted(letters), "faults": faults_of(third)}

        found = in_child(pulled)
        if digests != {found.get("digest")} or len(found.get("letters", ())) != 1 or found.get("faults"):
            broken.append(f"round {number}: users have {digests}, the remote {found}")
        for root in roots:
            shutil.rmtree(root)
    return Finding("two users push the same key", "one winner, no mixture; both go on with it", times, tuple(broken))


def _push(place: Place, text: str) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader

    def build(folder: Path) -> None:
        for name in ("a", "b", "c"):
            (folder / name).write_text(text)
        time.sleep(0.1)

    try:
        os.write(writer, place.store().build_once(WANTED, build).ref.digest.encode())
    except Exception as error:
        os.write(writer, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


def _never(folder: Path) -> None:
    raise AssertionError("built what the remote has")


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    """Cut a file short by its second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {"one bit flipped": flip, "cut short": cut, "deleted": Path.unlink}


def damaged_files(bench: Bench, *, every: int = 1) -> Iterator[Finding]:
    """Damage every file of every artifact in each way; verify; run; compare. `every` n-th file only, if above 1."""
    place = bench.place()
    assert not run(bench.recipe, place).error
    files = sorted(p for p in (place.root / "objects").rglob("*") if p.is_file() and p.stat().st_size)[::every]
    for name, damage in DAMAGES.items():
        broken = []
        for path in files:
            stage, key, file = _parts(place.root, path)
            short = f"{stage}/{key[:12]}/{file}"
            damage(path)
            named = [fault for each in ArtifactStore(place.root).folders() for fault in place.store().verify(*each)]
            again = run(bench.recipe, place)
            row = next((r for r in again.decisions if r[1] == key), ["", "", "nothing", again.error])
            if not any(short in fault for fault in named) or len(named) != 1:
                broken.append(f"{short}: verify says {named}")
            if row[2] != "rebuilt" or short not in row[3]:
                broken.append(f"{short}: {row[2]}, {row[3]}")
            if len(again.decided("hit")) != len(again.decisions) - 1:
                broken.append(f"{short}: {len(again.decided('hit'))} hits of {len(again.decisions)}")
            if again.digests != bench.undisturbed.digests:
                broken.append(f"{short}: rebuilt with other bytes")
        yield Finding(
            f"every file of every artifact: {name}",
            "`verify` names it; `run` rebuilds it alone, says why, and gets the same bytes",
            len(files),
            tuple(broken),
        )


def _parts(root: Path, path: Path) -> tuple[str, str, str]:
    stage, _, key, *file = path.relative_to(root / "objects").parts
    return stage, key, "/".join(file)


def damaged_remote(bench: Bench, *, every: int = 1) -> Finding:
    """Flip a bit in every file of a remote cache (a shared folder); pull into an empty cache; compare."""
    shared = Path(tempfile.mkdtemp(dir=bench.folder, prefix="shared-"))

    def create() -> dict[str, Any]:
        from storage.remote import open_remote

        return {"created": open_remote(str(shared), writable=True).create()}

    in_child(create)
    first = Place(bench.place().root, str(shared))
    assert not run(bench.recipe, first).error
    files = sorted(p for p in (shared / "objects").rglob("*") if p.is_file() and p.stat().st_size)[::every]
    broken = []
    for path in files:
        _, _, key, *file = path.relative_to(shared / "objects").parts
        name = file[-1] if file[-1] == MANIFEST else "/".join(file[1:])
        flip(path)
        place = Place(bench.place().root, str(shared))
        again = run(bench.recipe, place)
        row = next((r for r in again.decisions if r[1] == key), ["", "", "nothing", again.error])
        if row[2] != "rebuilt" or name not in row[3]:
            broken.append(f"{name}: {row[2]}, {row[3]}")
        if len(again.decided("pulled")) != len(again.decisions) - 1:
            broken.append(f"{name}: {len(again.decided('pulled'))} pulled of {len(again.decisions)}")
        if again.digests != bench.undisturbed.digests:
            broken.append(f"{name}: other bytes")
        state = in_child(lambda place=place: _state(place))
        broken += [f"{name}: afterwards {fault}" for fault in state.get("faults", [str(state)])]
        shutil.rmtree(place.root)
    return Finding(
        "every file of a remote cache: one bit flipped",
        "refused, named, rebuilt; the rest is pulled; the remote is whole afterwards",
        len(files),
        tuple(broken),
    )


# --- disk full, read-only, moved -------------------------------------------------------------------------------------


def full_disks(bench: Bench) -> Finding:
    """Run on a small tmpfs (or, without the right to mount, with a limit on file sizes), then with room."""
    size = sum(p.stat().st_size for p in run_folder(bench).rglob("*") if p.is_file())
    broken = []
    mounted = can_mount(bench.folder)
    for share in DISK_SIZES:
        if mounted:
            with small_disk(bench.folder, int(size * share)) as disk:
                first = run(bench.recipe, Place(disk / "cache"))
                subprocess.run(["mount", "-o", f"remount,size={size * 8}", disk], check=True)
                again = run(bench.recipe, Place(disk / "cache"))
        else:
            place = bench.place()
            first = run(bench.recipe, place, largest_file=int(share * 40_000))
            again = run(bench.recipe, place)
        if first.kind != "StorageError" or "MB" not in first.error or "need" not in first.error:
            broken.append(f"{share:.0%}: {first.kind or 'no error'}: {first.error}")
        if again.error or again.digests != bench.undisturbed.digests:
            broken.append(f"{share:.0%}: with room: {again.error or 'other bytes'}")
    return Finding(
        "disk full in the middle of a write" + ("" if mounted else " (a limit on file sizes)"),
        "an error with the space needed and free; completes once there is room",
        len(DISK_SIZES),
        tuple(broken),
    )


def run_folder(bench: Bench) -> Path:
    """Return the objects of one undisturbed run."""
    place = bench.place()
    run(bench.recipe, place)
    return place.root / "objects"


def can_mount(folder: Path) -> bool:
    """Return whether this user may mount a tmpfs."""
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes for a while."""
    disk = Path(tempfile.mkdtemp(dir=folder, prefix="disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def moved_stores(bench: Bench) -> Finding:
    """Make a store read-only, move it, and put its artifacts on another file system."""
    broken = []
    place = bench.place()
    run(bench.recipe, place)
    moved = place.root.rename(place.root.with_name("moved"))
    again = run(bench.recipe, Place(moved))
    if again.error or len(again.decided("hit")) != len(again.decisions):
        broken.append(f"moved: {again.error or again.decisions}")
    other = Path(tempfile.mkdtemp(dir="/dev/shm"))
    place = bench.place()
    (place.root / "objects").symlink_to(other)
    assert other.stat().st_dev != place.root.stat().st_dev
    across = run(bench.recipe, place)
    if across.error or across.digests != bench.undisturbed.digests or faults_of(ArtifactStore(place.root)):
        broken.append(f"objects on another mount: {across.error or 'other bytes'}")
    shutil.rmtree(other)
    for row in (read_only(bench, moved, "hit"), read_only(bench, bench.place().root, "error")):
        broken += [row] if row else []
    return Finding(
        "store moved; its objects on another mount; read-only with everything in it; read-only and empty",
        "still hits; still commits; still hits; an error that names the folder",
        4,
        tuple(broken),
    )


def read_only(bench: Bench, root: Path, expected: str) -> str:
    """Run in a store as a user who cannot write it; returns what is wrong."""
    for path in (root, *root.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222 | 0o555 if path.is_dir() else 0o444)

    def work() -> dict[str, Any]:
        if os.geteuid() == 0:
            os.seteuid(65534)
        return asdict(run(bench.recipe, Place(root)))

    for path in (bench.folder, bench.recipe, *(bench.folder / "model").rglob("*"), bench.folder / "model"):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    found = Ran(**in_child(work))
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if expected == "hit":
        hits = not found.error and len(found.decided("hit")) == len(found.decisions)
        return "" if hits else f"read-only: {found.error or found.decisions}"
    named = found.kind == "UnwritableStoreError" and str(root) in found.error
    return "" if named else f"read-only and empty: {found.kind}: {found.error}"


# --- the remote ------------------------------------------------------------------------------------------------------


def remote_faults(bench: Bench) -> Finding:
    """Run against a remote that is down, silent, or refusing; then without it."""
    broken = []
    place = bench.place()
    assert not run(bench.recipe, place).error
    with silent_server() as silent, refusing_server() as refusing:
        for name, endpoint in (("down", "http://127.0.0.1:9"), ("slow", silent), ("refusing", refusing)):
            empty = bench.place()
            with environment(AWS_ENDPOINT_URL=endpoint, COVERCAL_REMOTE_TIMEOUT="1"):
                found = run_with_timeout(bench, Place(empty.root, "s3://team/cache"))
            if found.kind != "RemoteError" or "s3://team/cache" not in found.error or "--offline" not in found.error:
                broken.append(f"{name}: {found.kind or 'no error'}: {found.error}")
            if found.decisions or any((empty.root / "objects").rglob("*")):
                broken.append(f"{name}: something was computed")
    offline = run(bench.recipe, place)
    if offline.error or len(offline.decided("hit")) != len(offline.decisions):
        broken.append(f"offline: {offline.error or offline.decisions}")
    return Finding(
        "remote down, slow (never answers), refusing (403)",
        "an error that says so, nothing computed; offline, everything hits in the local cache",
        3,
        tuple(broken),
    )


def run_with_timeout(bench: Bench, place: Place) -> Ran:
    """Run with a request timeout of one second."""
    import storage.remote

    before = storage.remote.TIMEOUT_SECONDS
    storage.remote.open_remote.__kwdefaults__["timeout"] = 1.0
    try:
        return run(bench.recipe, place)
    finally:
        storage.remote.open_remote.__kwdefaults__["timeout"] = before


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def silent_server() -> Iterator[str]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def refusing_server() -> Iterator[str]:
    """Answer every request with 403."""
    script = (
        "import http.server as h\n"
        "class R(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_error(403)\n"
        "    do_PUT = do_HEAD = do_POST = do_GET\n"
        "    def log_message(self, *_): pass\n"
        "s = h.ThreadingHTTPServer(('127.0.0.1', 0), R); print(s.server_port, flush=True); s.serve_forever()"
    )
    import sys

    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.wait()


def findings(bench: Bench, kills: int, rounds: int, every: int = 1) -> Iterator[Finding]:
    """Inject every fault."""
    yield killed_runs(bench, kills)
    yield asked_at_once(bench, rounds)
    yield from damaged_files(bench, every=every)
    yield damaged_remote(bench, every=every)
    yield full_disks(bench)
    yield moved_stores(bench)
    yield remote_faults(bench)
    yield pushed_at_once(bench, rounds)


def markdown(found: list[Finding]) -> str:
    """Return the table of `docs/reliability.md`."""
    lines = ["| fault | times | must hold | held |", "|---|---:|---|---:|"]
    for each in found:
        detail = f" ({each.detail})" if each.detail else ""
        lines.append(f"| {each.fault}{detail} | {each.times} | {each.holds} | {each.times - len(each.broken)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="damage every n-th file only")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path)
    wanted = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder)) as bench:
        started = time.perf_counter()
        for finding in findings(bench, wanted.kills, wanted.rounds, wanted.every):
            seconds = time.perf_counter() - started
            print(f"{seconds:6.0f} s  {finding.fault}: {finding.times} times, {len(finding.broken)} broken", flush=True)
            for line in finding.broken:
                print(f"          {line}", flush=True)
            found.append(finding)
    rows = [[f.fault, f.times, f.times - len(f.broken), f.detail] for f in found]
    report("faults", ["fault", "times", "held", ""], rows, {"findings": [asdict(f) for f in found]}, wanted.output)
    if wanted.markdown is not None:
        wanted.markdown.write_text(markdown(found), encoding="utf-8")
    if any(f.broken for f in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
