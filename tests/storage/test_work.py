"""A part of a build is whole or not there, and is gone on from only under the conditions that it was made under."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.work import CONDITIONS, PART, WorkFolder
from tests.storage.faults import output_of, snapshot, start_python

HERE = {"libraries": {"torch": "2.6"}, "device": "cpu"}
FILES = {"shard": bytes(range(200)), "nested/reports": b"[1, 2]"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the parts of a build lie; not there yet."""
    return tmp_path / "work" / "key"


@pytest.fixture
def work(folder: Path) -> WorkFolder:
    return WorkFolder(folder, HERE)


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def finish(work: WorkFolder, name: str = "block-0") -> None:
    """Make a part of all `FILES`."""
    with work.part(name) as part:
        write(part)


# parts


def test_a_part_that_was_never_made_is_not_there(work: WorkFolder) -> None:
    assert work.whole("block-0", []) is None


def test_asking_makes_nothing(work: WorkFolder, folder: Path) -> None:
    work.whole("block-0", [])
    assert not folder.parent.exists()


def test_a_finished_part_is_whole(work: WorkFolder) -> None:
    finish(work)
    part = work.whole("block-0", list(FILES))
    assert part is not None
    assert {name: (part / name).read_bytes() for name in FILES} == FILES


def test_the_next_build_finds_a_finished_part(work: WorkFolder, folder: Path) -> None:
    finish(work)
    assert WorkFolder(folder, HERE).whole("block-0", list(FILES)) == folder / "block-0"


def test_parts_are_told_apart_by_their_names(work: WorkFolder) -> None:
    finish(work, "block-0")
    assert work.whole("block-1", []) is None
    finish(work, "block-1")
    assert work.whole("block-0", list(FILES)) != work.whole("block-1", list(FILES))


def test_a_part_begins_as_an_empty_folder(work: WorkFolder) -> None:
    finish(work)
    with work.part("block-0") as part:
        assert list(part.iterdir()) == []


def test_a_part_is_not_there_before_its_end(work: WorkFolder) -> None:
    with work.part("block-0") as part:
        write(part)
        assert work.whole("block-0", []) is None


def test_a_part_is_not_kept_when_what_it_was_made_from_has_changed(folder: Path) -> None:
    def changed() -> None:
        raise ZeroDivisionError

    finish(WorkFolder(folder, HERE), "block-0")
    with pytest.raises(ZeroDivisionError):
        finish(WorkFolder(folder, HERE, changed), "block-1")
    work = WorkFolder(folder, HERE)
    assert (work.whole("block-0", list(FILES)), work.whole("block-1", [])) == (folder / "block-0", None)


def test_a_part_that_is_made_again_is_replaced_whole(work: WorkFolder) -> None:
    finish(work)
    with work.part("block-0") as part:
        (part / "shard").write_bytes(b"new")
    found = work.whole("block-0", ["shard"])
    assert found is not None
    assert (found / "shard").read_bytes() == b"new"
    assert work.whole("block-0", list(FILES)) is None


def test_a_finished_part_leaves_nothing_else(work: WorkFolder, folder: Path) -> None:
    finish(work)
    assert sorted(each.name for each in folder.iterdir()) == [CONDITIONS, "block-0"]


# errors and kills


def fail_inside(work: WorkFolder, error: type[BaseException]) -> None:
    with work.part("block-0") as part:
        (part / "shard").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError, KeyboardInterrupt])
def test_an_error_inside_a_part_leaves_nothing_of_it(
    work: WorkFolder, folder: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        fail_inside(work, error)
    assert work.whole("block-0", []) is None
    assert [each.name for each in folder.iterdir()] == [CONDITIONS]


def test_an_error_leaves_the_part_that_was_finished_before(work: WorkFolder) -> None:
    finish(work)
    with pytest.raises(ZeroDivisionError):
        fail_inside(work, ZeroDivisionError)
    found = work.whole("block-0", list(FILES))
    assert found is not None
    assert (found / "shard").read_bytes() == FILES["shard"]


def test_a_symbolic_link_is_no_part(work: WorkFolder, folder: Path) -> None:
    with pytest.raises(ValueError, match="link is a symbolic link"), work.part("block-0") as part:
        (part / "link").symlink_to("/etc/hostname")
    assert [each.name for each in folder.iterdir()] == [CONDITIONS]


KILLED_INSIDE = """
import json, os, signal, sys
from pathlib import Path
from storage.work import WorkFolder
work = WorkFolder(Path(sys.argv[1]), json.loads(sys.argv[2]))
with work.part("block-0") as part:
    (part / "shard").write_bytes(b"whole")
child = os.fork()
if child == 0:
    with work.part(sys.argv[3]) as part:
        (part / "shard").write_bytes(b"half of wha")
        os.kill(os.getpid(), signal.SIGKILL)
assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def test_a_build_that_is_killed_inside_a_part_keeps_the_parts_before_it(folder: Path) -> None:
    output_of(start_python(KILLED_INSIDE, folder, json.dumps(HERE), "block-1"))
    work = WorkFolder(folder, HERE)
    assert work.whole("block-0", ["shard"]) == folder / "block-0"
    assert work.whole("block-1", []) is None


def test_a_build_that_is_killed_while_it_makes_a_part_again_keeps_the_part(folder: Path) -> None:
    output_of(start_python(KILLED_INSIDE, folder, json.dumps(HERE), "block-0"))
    assert (folder / "block-0" / "shard").read_bytes() == b"whole"
    assert WorkFolder(folder, HERE).whole("block-0", ["shard"]) == folder / "block-0"


def test_what_a_killed_build_left_half_is_no_part(folder: Path) -> None:
    output_of(start_python(KILLED_INSIDE, folder, json.dumps(HERE), "block-1"))
    (left,) = folder.glob(".partial-*")
    assert (left / "shard").read_bytes() == b"half of wha"
    assert WorkFolder(folder, HERE).whole(left.name, []) is None


def test_a_part_is_finished_beside_what_a_killed_build_left(folder: Path) -> None:
    output_of(start_python(KILLED_INSIDE, folder, json.dumps(HERE), "block-1"))
    work = WorkFolder(folder, HERE)
    finish(work, "block-1")
    assert work.whole("block-1", list(FILES)) == folder / "block-1"


def test_conditions_that_were_cut_short_do_not_count(work: WorkFolder, folder: Path) -> None:
    finish(work)
    (folder / CONDITIONS).write_bytes((folder / CONDITIONS).read_bytes()[:-1])
    assert WorkFolder(folder, HERE).whole("block-0", []) is None


# damage


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def delete(path: Path) -> None:
    path.unlink()


def make_folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [flip, cut, empty, lengthen, delete, make_folder_of]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_part_with_a_damaged_file_is_not_there(
    work: WorkFolder, folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    finish(work)
    damage(folder / "block-0" / name)
    assert work.whole("block-0", list(FILES)) is None


@pytest.mark.parametrize("damage", [flip, cut, empty, delete, make_folder_of])
def test_a_part_whose_hashes_are_damaged_is_not_there(
    work: WorkFolder, folder: Path, damage: Callable[[Path], None]
) -> None:
    finish(work)
    damage(folder / "block-0" / PART)
    assert work.whole("block-0", list(FILES)) is None


@pytest.mark.parametrize("text", ["[]", "3", "null", '"shard"', '{"shard": 3, "nested/reports": null}', "\x00"])
def test_hashes_that_are_none_are_no_part(work: WorkFolder, folder: Path, text: str) -> None:
    finish(work)
    (folder / "block-0" / PART).write_text(text)
    assert work.whole("block-0", list(FILES)) is None


def test_damage_of_one_part_leaves_the_others_whole(work: WorkFolder, folder: Path) -> None:
    finish(work, "block-0")
    finish(work, "block-1")
    cut(folder / "block-0" / "shard")
    assert work.whole("block-1", list(FILES)) == folder / "block-1"


def test_a_file_that_nobody_asks_for_may_be_gone(work: WorkFolder, folder: Path) -> None:
    finish(work)
    delete(folder / "block-0" / "shard")
    assert work.whole("block-0", ["nested/reports"]) == folder / "block-0"


def test_a_file_that_was_put_into_a_part_later_is_not_of_it(work: WorkFolder, folder: Path) -> None:
    finish(work)
    (folder / "block-0" / "stray").write_bytes(b"")
    assert work.whole("block-0", ["stray"]) is None


def test_a_damaged_part_can_be_made_again(work: WorkFolder, folder: Path) -> None:
    finish(work)
    cut(folder / "block-0" / "shard")
    finish(work)
    assert work.whole("block-0", list(FILES)) == folder / "block-0"


# conditions


@pytest.mark.parametrize(
    "other",
    [{**HERE, "device": "cuda"}, {**HERE, "libraries": {"torch": "2.7"}}, {**HERE, "more": None}, {}],
    ids=["device", "version", "more", "none"],
)
def test_parts_that_were_made_under_other_conditions_are_thrown_away(
    work: WorkFolder, folder: Path, other: dict[str, Any]
) -> None:
    finish(work)
    assert WorkFolder(folder, other).whole("block-0", []) is None
    assert WorkFolder(folder, HERE).whole("block-0", []) is None
    assert not folder.exists()


def test_the_order_of_conditions_does_not_matter(work: WorkFolder, folder: Path) -> None:
    finish(work)
    assert WorkFolder(folder, dict(reversed(HERE.items()))).whole("block-0", list(FILES)) is not None


def test_parts_without_conditions_are_thrown_away(work: WorkFolder, folder: Path) -> None:
    finish(work)
    (folder / CONDITIONS).unlink()
    assert WorkFolder(folder, HERE).whole("block-0", []) is None


def test_parts_under_new_conditions_are_kept(work: WorkFolder, folder: Path) -> None:
    finish(work)
    other = WorkFolder(folder, {"device": "cuda"})
    finish(other)
    assert WorkFolder(folder, {"device": "cuda"}).whole("block-0", list(FILES)) == folder / "block-0"


def test_opening_under_the_same_conditions_changes_nothing(work: WorkFolder, folder: Path) -> None:
    finish(work)
    before = snapshot(folder)
    WorkFolder(folder, HERE).whole("block-0", list(FILES))
    assert snapshot(folder) == before


def test_the_conditions_are_there_before_the_first_part_is(work: WorkFolder, folder: Path) -> None:
    with work.part("block-0"):
        assert json.loads((folder / CONDITIONS).read_bytes()) == HERE
