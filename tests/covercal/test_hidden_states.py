"""Hidden states in memory and in files: what is taken out is what was put in, and where it lay changes no bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from covercal.calibration import IN_MEMORY, Memory
from covercal.decoder import DTYPES, make_decoder
from covercal.hidden_states import HiddenStates, aligned
from covercal.quantization import quantize_blocks
from covercal.quantization_settings import Quantization
from tests.covercal.walks import bits_of, comparable
from tests.tiny import WIDTH, random_tokens, tiny_model

CPU = torch.device("cpu")
SAMPLES = [*random_tokens(5, 18, 1), *random_tokens(3, 11, 2), *random_tokens(2, 7, 3)]
SHAPE = (2, 3, 5)
EACH = 2 * 3 * 5 * 4  # bytes


def value(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(limit: int | None, folder: Path | None, count: int = 4) -> HiddenStates:
    states = HiddenStates(CPU, limit, folder)
    for seed in range(count):
        states.append(value(seed))
    return states


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- where they lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "in_files"),
    [(None, 0), (4 * EACH, 0), (4 * EACH - 1, 1), (2 * EACH, 2), (EACH - 1, 4), (0, 4)],
)
def test_as_much_as_the_limit_allows_stays_in_memory(limit: int | None, in_files: int, tmp_path: Path) -> None:
    states = filled(limit, tmp_path / "states")
    assert (len(states), states.in_files) == (4, in_files)
    assert len(files(tmp_path)) == in_files


def test_the_first_ones_stay_in_memory(tmp_path: Path) -> None:
    filled(2 * EACH, tmp_path)
    assert files(tmp_path) == ["000002.safetensors", "000003.safetensors"]


def test_without_a_folder_everything_stays_in_memory() -> None:
    assert filled(0, None).in_files == 0


def test_a_folder_is_made_only_when_it_is_needed(tmp_path: Path) -> None:
    filled(None, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_what_fits_behind_a_tensor_that_does_not_fit_stays_in_memory(tmp_path: Path) -> None:
    states = HiddenStates(CPU, EACH, tmp_path)
    states.append(torch.zeros(EACH))  # four times the limit
    states.append(value(0))
    assert states.in_files == 1


# --- what is taken out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("limit", [None, EACH, 0])
def test_what_is_taken_out_is_what_was_put_in(limit: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    states = HiddenStates(CPU, limit, tmp_path)
    for seed in range(4):
        states.append(value(seed, dtype))
    assert [bits_of(found) for found in states] == [bits_of(value(seed, dtype)) for seed in range(4)]
    assert bits_of(states[2]) == bits_of(value(2, dtype))


@pytest.mark.parametrize("limit", [None, EACH, 0])
def test_what_is_put_in_place_of_another_is_taken_out(limit: int | None, tmp_path: Path) -> None:
    states = filled(limit, tmp_path)
    for index in (0, 3):
        states[index] = value(100 + index)
    assert [bits_of(found) for found in states] == [bits_of(value(seed)) for seed in (100, 1, 2, 103)]
    assert states.in_files == filled(limit, tmp_path / "other").in_files


@pytest.mark.parametrize("limit", [None, 0])
def test_a_view_with_gaps_is_kept_as_what_it_shows(limit: int | None, tmp_path: Path) -> None:
    states = filled(limit, tmp_path, 1)
    wide = value(7)
    states.append(wide.transpose(0, 2))
    states[0] = wide[:, ::2]
    assert torch.equal(states[0], wide[:, ::2])
    assert torch.equal(states[1], wide.transpose(0, 2))
    assert all(found.is_contiguous() for found in states)


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    states = filled(0, tmp_path)
    states[1] = value(9)
    assert files(tmp_path) == [f"{index:06d}.safetensors" for index in range(4)]


def test_a_snapshot_of_what_lies_in_memory_is_not_changed_by_what_comes_after(tmp_path: Path) -> None:
    states = filled(2 * EACH, tmp_path)
    snapshot = states.snapshot()
    states[0] = value(50)
    states.append(value(51))
    assert [bits_of(found) for found in snapshot] == [bits_of(value(seed)) for seed in range(4)]


def test_a_snapshot_is_as_much_in_files_as_what_it_shows(tmp_path: Path) -> None:
    assert filled(EACH, tmp_path).snapshot().in_files == 3


def test_an_aligned_tensor_has_the_same_bits_in_memory_of_its_own() -> None:
    shifted = torch.cat([torch.zeros(1), value(1).flatten()])[1:].view(SHAPE)
    found = aligned(shifted)
    assert torch.equal(found, shifted)
    assert found.data_ptr() != shifted.data_ptr()
    assert found.data_ptr() % 64 == 0


# --- the walk over blocks ------------------------------------------------------------------------------------------


def walk(method: str, memory: Memory, **fields: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Yield all of each block as it comes: what lies in files is only good until the next is asked for."""
    settings = Quantization(method=method, bits=3, group_size=16, **fields)
    for block in quantize_blocks(make_decoder(tiny_model("gemma2")), SAMPLES, settings, "bfloat16", memory=memory):
        yield comparable([block])


def bytes_of_batches() -> int:
    return sum(len(sample) for sample in SAMPLES) * WIDTH * 4


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("method", ["gptq", "coreq", "awq"])
def test_a_walk_whose_hidden_states_go_to_files_gives_the_same_bits(method: str, share: float, tmp_path: Path) -> None:
    memory = Memory(int(share * bytes_of_batches()), tmp_path)
    assert list(walk(method, memory)) == list(walk(method, IN_MEMORY))
    assert files(tmp_path)


@pytest.mark.parametrize(("method", "streams"), [("gptq", ["hidden"]), ("coreq", ["hidden", "original"])])
def test_every_stream_has_a_file_for_each_batch_when_nothing_may_lie_in_memory(
    method: str, streams: list[str], tmp_path: Path
) -> None:
    next(walk(method, Memory(0, tmp_path)))
    assert files(tmp_path) == [f"{stream}/{batch:06d}.safetensors" for stream in streams for batch in range(3)]


def test_two_streams_share_the_limit(tmp_path: Path) -> None:
    next(walk("coreq", Memory(bytes_of_batches(), tmp_path)))
    whole = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 0.4 * bytes_of_batches() < whole < 1.7 * bytes_of_batches()


def test_a_walk_within_its_limit_writes_no_file(tmp_path: Path) -> None:
    list(walk("coreq", Memory(2 * bytes_of_batches(), tmp_path / "states")))
    assert not (tmp_path / "states").exists()
