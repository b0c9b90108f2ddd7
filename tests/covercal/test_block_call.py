"""What a block leaves to later blocks goes with the hidden states, and comes out of them as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from covercal.block_call import BlockArguments, run_and_tell, run_block
from covercal.errors import InputError

SEQUENCES, LENGTH, WIDTH = 2, 5, 6


class Leaving(nn.Module):
    """Notes what it finds, leaves something, and returns hidden states plus one."""

    def __init__(self, leaves: dict[str, Any]) -> None:
        super().__init__()
        self.leaves = leaves
        self.found: dict[str, Any] = {}

    def forward(self, hidden: Tensor, shared: dict[str, Any]) -> Tensor:
        self.found = dict(shared)
        shared.update(self.leaves)
        return hidden + 1


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def keys_and_values() -> dict[str, Any]:
    """Return tensors whose numbers for one token, 16 + 7, are not a multiple of what lies side by side."""
    pair = tensor(SEQUENCES, 2, LENGTH, 3), tensor(SEQUENCES, 2, LENGTH, 5)
    return {"pair": pair, "alone": tensor(SEQUENCES, 1, LENGTH, 7)}


def run_two(before: tuple[int, ...]) -> tuple[Leaving, Tensor, Tensor, BlockArguments]:
    hidden = tensor(*before, SEQUENCES, LENGTH, WIDTH)
    given: dict[str, Any] = {"of the model": tensor(1, 1)}
    beside = hidden.shape[:-3].numel()
    arguments = BlockArguments((), {"shared": given}, WIDTH, beside=beside)
    leaving, left = run_and_tell(Leaving(keys_and_values()), hidden, arguments)
    assert list(given) == ["of the model"]
    behind = BlockArguments((), {"shared": given}, WIDTH, left, beside)
    assert leaving.shape == (*before, SEQUENCES, LENGTH, behind.stream_width)
    second = Leaving({})
    return second, hidden, run_block(second, leaving, behind), behind


@pytest.mark.parametrize("before", [(), (1,), (3,), (4,)])
def test_a_later_block_finds_what_an_earlier_one_left(before: tuple[int, ...]) -> None:
    second, hidden, leaving, arguments = run_two(before)
    expected = keys_and_values()
    assert second.found.keys() == {"of the model", *expected}
    assert torch.equal(second.found["alone"], expected["alone"])
    assert all(map(torch.equal, second.found["pair"], expected["pair"]))
    assert torch.equal(leaving[..., :WIDTH], hidden + 1 + 1)
    assert leaving.shape[-1] == arguments.stream_width  # it goes on to the blocks behind


def test_a_block_that_leaves_nothing_returns_its_hidden_states() -> None:
    hidden = tensor(SEQUENCES, LENGTH, WIDTH)
    leaving, left = run_and_tell(Leaving({}), hidden, BlockArguments((), {"shared": {}}, WIDTH))
    assert torch.equal(leaving, hidden + 1)
    assert left == ()


@pytest.mark.parametrize(
    "left",
    [
        tensor(SEQUENCES, LENGTH, WIDTH),
        tensor(SEQUENCES, 2, LENGTH + 1, 3),
        tensor(SEQUENCES + 1, 2, LENGTH, 3),
        tensor(SEQUENCES, 2, LENGTH, 3).double(),
        "text",
    ],
    ids=["three dimensions", "more tokens", "more sequences", "another dtype", "no tensor"],
)
def test_what_is_no_keys_or_values_is_refused(left: Any) -> None:
    arguments = BlockArguments((), {"shared": {}}, WIDTH)
    with pytest.raises(InputError, match=r"^A Leaving leaves more than keys and values.*in `shared` for later blocks"):
        run_block(Leaving({"left": left}), tensor(SEQUENCES, LENGTH, WIDTH), arguments)
