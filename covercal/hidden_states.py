"""Hidden states on their way through the blocks: in memory, and beyond a limit in files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "hidden"


class HiddenStates:
    """What enters the next block, one tensor for each batch of sequences.

    Parameters
    ----------
    device
        Where tensors are wanted.
    limit
        Bytes that may lie in memory; None: any number.
    folder
        Where files go when they may not; made when it is needed.
    """

    def __init__(self, device: torch.device, limit: int | None = None, folder: Path | None = None) -> None:
        self._device, self._limit, self._folder = device, limit, folder
        self._places: list[Tensor | Path] = []
        self._used = 0

    def __len__(self) -> int:
        return len(self._places)

    def append(self, value: Tensor) -> None:
        """Take in one more tensor; the first ones, as far as the limit goes, stay in memory."""
        size = value.numel() * value.element_size()
        if self._limit is None or self._folder is None or self._used + size <= self._limit:
            self._used += size
            self._places.append(value.contiguous())
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(self._places):06d}.safetensors"
        self._places.append(path)
        _write(path, value)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        place = self._places[index]
        return place if isinstance(place, Tensor) else aligned(load_file(place, device=str(self._device))[NAME])

    def __setitem__(self, index: int, value: Tensor) -> None:
        place = self._places[index]
        if isinstance(place, Tensor):
            self._places[index] = value.contiguous()
        else:
            _write(place, value)

    def snapshot(self) -> "HiddenStates":
        """Return the tensors as they are now; those in files are only good until they are written again."""
        copied = HiddenStates(self._device, self._limit, self._folder)
        copied._places, copied._used = list(self._places), self._used
        return copied

    @property
    def in_files(self) -> int:
        """Return how many tensors lie in files."""
        return sum(isinstance(place, Path) for place in self._places)


def aligned(value: Tensor) -> Tensor:
    """Return a copy that lies in memory as a computed tensor does; kernels may round differently for another."""
    return torch.empty_like(value).copy_(value)


def _write(path: Path, value: Tensor) -> None:
    partial = path.with_suffix(".partial")
    save_file({NAME: value.detach().cpu().contiguous()}, partial)
    partial.replace(path)
