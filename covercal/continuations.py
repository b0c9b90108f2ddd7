"""Log-likelihoods of continuations given contexts; what contexts begin with together is computed once.

The choices of a question share its whole context, the questions of a subject share their examples. Each shared
beginning runs once, and everything that follows it goes on from its keys and values. Logits are made only where a
continuation is predicted, never over a whole sequence.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from covercal.decoder import Decoder, head_logits
from covercal.errors import EvaluationError

MIN_HEAD = 32  # a shorter common beginning is not worth a pass of its own
HEAD_SHARE = 0.5  # of a context that its cluster's beginning has to be
PASS_TOKENS = 2048  # tokens computed in one pass, where more than one row is
CACHED_TOKENS = 8192  # tokens whose keys and values are held for one pass, where more than one row is
MIN_SAVED = 64  # tokens that going on from a context's cache has to save
FILLED_SHARE = 0.125  # of a row that may be filled up behind its tokens
LOGIT_TOKENS = 256  # tokens whose logits over the whole vocabulary are held at once
PROBE_TOKENS = (8, 4)  # before and after the cut
PROBE_TOLERANCE = 0.1  # rounding stays far below it, a cache that is not continued goes far beyond it

T = TypeVar("T")
Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  # context, continuation
Answer = tuple[float, bool]  # log-likelihood in nats, whether every token was the most likely one


@dataclass(frozen=True, slots=True)
class Prompt:
    """A context and everything that is tried after it."""

    context: Tokens
    continuations: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Prompts whose contexts begin with the tokens of `head`, and go on after it; an empty head is no cache at all."""

    head: Tokens
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one row of a pass, and which of them predict what.

    Attributes
    ----------
    tokens
        What follows the head.
    wanted
        For each pair: the first position in the row that predicts a token of its continuation.
    """

    tokens: Tokens
    wanted: tuple[tuple[Pair, int], ...]


def truncated(context: Tokens, continuation: Tokens, max_length: int) -> Pair:
    """Return a pair that fits a model's context: the last `max_length` tokens before the last one, as lm-eval does.

    Raises
    ------
    EvaluationError
        When the continuation alone does not fit.
    """
    if not continuation or len(continuation) > max_length:
        raise EvaluationError(
            f"A continuation of {len(continuation)} tokens cannot be scored by a model of {max_length} tokens."
        )
    whole = (context + continuation)[-(max_length + 1) :]
    return whole[: -len(continuation)], continuation


def score_continuations(
    decoder: Decoder, pairs: Sequence[Pair], *, advance: Callable[[int], None] = lambda n: None
) -> list[Answer]:
    """Return log p(continuation | context), and whether it is the greedy one, of every pair.

    Parameters
    ----------
    decoder
        A model that is loaded whole, and whose cache can be shared: see `unshareable`.
    pairs
        Contexts and continuations, at least one token each, that fit the model together.
    advance
        Is told of newly scored pairs.
    """
    repeats: dict[Pair, int] = {}
    for pair in pairs:
        repeats[pair] = repeats.get(pair, 0) + 1
    found: dict[Pair, Answer] = {}
    with torch.inference_mode():
        for cluster in clustered(prompts_of(repeats)):
            for answers in _score_cluster(decoder, cluster):
                found |= answers
                advance(sum(repeats[pair] for pair in answers))
    return [found[pair] for pair in pairs]


def prompts_of(pairs: Iterable[Pair]) -> list[Prompt]:
    """Return distinct contexts with their distinct continuations, contexts that begin alike side by side."""
    continuations: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in pairs:
        continuations.setdefault(context, {})[continuation] = None
    return [Prompt(context, tuple(continuations[context])) for context in sorted(continuations)]


def clustered(prompts: Sequence[Prompt]) -> list[Cluster]:
    """Return sorted prompts as runs that share at least `MIN_HEAD` tokens and half of each context, and all others."""
    runs: list[Cluster] = []
    for prompt in prompts:
        shared = _common(runs[-1].head, prompt.context[:-1]) if runs else ()
        if len(shared) >= max(MIN_HEAD, HEAD_SHARE * len(prompt.context)):
            runs[-1] = Cluster(shared, (*runs[-1].prompts, prompt))
        else:
            runs.append(Cluster(prompt.context[:-1], (prompt,)))
    alone = tuple(run.prompts[0] for run in runs if len(run.prompts) == 1)
    return [*([Cluster((), alone)] if alone else []), *(run for run in runs if len(run.prompts) > 1)]


def unshareable(decoder: Decoder) -> str:
    """Return why what a model remembers of a context cannot be gone on from; empty when it can.

    Tried out: a few tokens at once, against the same tokens cut in two with the second part in two rows.
    """
    before, after = PROBE_TOKENS
    vocabulary = decoder.model.config.get_text_config().vocab_size
    tokens = torch.arange(before + after, device=decoder.device)[None] % vocabulary
    try:
        with torch.inference_mode():
            whole = decoder.body(input_ids=tokens, use_cache=False)[0][:, before:]
            cache = _new_cache(decoder)
            _run(decoder, tokens[:, :before], cache)
            cache.batch_repeat_interleave(2)
            parts = _run(decoder, tokens[:, before:].expand(2, -1), cache)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as cause:
        return f"the cache of {type(decoder.model).__name__} cannot be shared: {str(cause).splitlines()[0]}"
    distance = float((parts - whole).abs().mean() / whole.abs().mean())
    if not distance < PROBE_TOLERANCE:
        return f"{type(decoder.model).__name__} gives other outputs when it goes on from its cache"
    return ""


# --- clusters ------------------------------------------------------------------------------------------------------


def _common(a: Tokens, b: Tokens) -> Tokens:
    """Return what two token sequences begin with together."""
    if a == b[: len(a)]:
        return a
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))]


def _score_cluster(decoder: Decoder, cluster: Cluster) -> Iterator[dict[Pair, Answer]]:
    head = _new_cache(decoder) if cluster.head else None
    if head is not None:
        _run(decoder, _tensor([cluster.head], decoder), head)
    skip = len(cluster.head)
    forked = [prompt for prompt in cluster.prompts if _is_forked(prompt, skip)]
    rows = [row for prompt in cluster.prompts if not _is_forked(prompt, skip) for row in _rows(prompt, skip)]
    for batch in _batches(rows, lambda row: len(row.tokens), skip):
        yield _score_rows(decoder, batch, head)
    by_length: dict[int, list[Prompt]] = {}
    for prompt in forked:
        by_length.setdefault(len(prompt.context), []).append(prompt)
    for group in by_length.values():
        for prompts in _batches(group, lambda prompt: len(prompt.context) - skip, skip):
            yield _score_forks(decoder, prompts, skip, head)


def _is_forked(prompt: Prompt, skip: int) -> bool:
    """Return whether a context runs first and then every continuation from its cache: a pass more, with less in it."""
    saved = (len(prompt.continuations) - 1) * (len(prompt.context) - skip)
    return saved >= MIN_SAVED and any(len(each) > 1 for each in prompt.continuations)


def _rows(prompt: Prompt, skip: int) -> list[Row]:
    """Return a row for each continuation, or a single one when all are of one token."""
    tail = prompt.context[skip:]
    wanted = [((prompt.context, each), len(tail) - 1) for each in prompt.continuations]
    if all(len(each) == 1 for each in prompt.continuations):
        return [Row(tail, tuple(wanted))]
    return [Row(tail + each[0][1][:-1], (each,)) for each in wanted]


def _batches(items: Sequence[T], length: Callable[[T], int], skip: int) -> Iterator[list[T]]:
    """Yield items of similar length together, the longest first: as many as a pass holds, and little to fill up."""
    waiting = sorted(items, key=length, reverse=True)
    start = 0
    while start < len(waiting):
        longest = length(waiting[start])
        most = start + max(1, min(PASS_TOKENS // longest, CACHED_TOKENS // (longest + skip)))
        stop = start + 1
        while stop < min(most, len(waiting)) and longest - length(waiting[stop]) <= FILLED_SHARE * longest + 1:
            stop += 1
        yield waiting[start:stop]
        start = stop


# --- passes --------------------------------------------------------------------------------------------------------


def _score_rows(decoder: Decoder, rows: Sequence[Row], head: DynamicCache | None) -> dict[Pair, Answer]:
    """Return the answers of rows of any lengths: what pads a row comes behind all that it predicts."""
    cache = None if head is None else _grown(head, len(rows))
    hidden = _run(decoder, _tensor([row.tokens for row in rows], decoder), cache)
    states = [
        (pair, hidden[index, first : first + len(pair[1])])
        for index, row in enumerate(rows)
        for pair, first in row.wanted
    ]
    return _answers(decoder, states)


def _score_forks(
    decoder: Decoder, prompts: Sequence[Prompt], skip: int, head: DynamicCache | None
) -> dict[Pair, Answer]:
    """Return the answers of contexts of one length, each run once and then gone on from for every continuation."""
    cache = _new_cache(decoder) if head is None else _grown(head, len(prompts))
    last = _run(decoder, _tensor([prompt.context[skip:] for prompt in prompts], decoder), cache)[:, -1:]
    forks = [(index, each) for index, prompt in enumerate(prompts) for each in prompt.continuations]
    states: list[tuple[Pair, Tensor]] = [((prompts[i].context, each), last[i]) for i, each in forks if len(each) == 1]
    longer = [fork for fork in forks if len(fork[1]) > 1]
    pieces = list(_batches(longer, lambda fork: len(fork[1]) - 1, len(prompts[0].context)))
    for piece in pieces:
        branch = cache if piece is pieces[-1] else copy.deepcopy(cache)
        branch.batch_select_indices(torch.tensor([index for index, _ in piece], device=decoder.device))
        hidden = _run(decoder, _tensor([each[:-1] for _, each in piece], decoder), branch)
        states += [
            ((prompts[index].context, each), torch.cat([last[index], hidden[row, : len(each) - 1]]))
            for row, (index, each) in enumerate(piece)
        ]
    return _answers(decoder, states)


def _answers(decoder: Decoder, states: Sequence[tuple[Pair, Tensor]]) -> dict[Pair, Answer]:
    """Return the answers of pairs, given what enters the head (tokens of the continuation, width) for each."""
    hidden = torch.cat([state for _, state in states])
    targets = torch.tensor([token for pair, _ in states for token in pair[1]], device=hidden.device)
    chances, greedy = [], []
    for start in range(0, len(targets), LOGIT_TOKENS):
        piece = slice(start, start + LOGIT_TOKENS)
        logits = torch.log_softmax(head_logits(decoder, hidden[None, piece])[0], dim=-1)
        chances.append(logits.gather(1, targets[piece, None])[:, 0])
        greedy.append(logits.argmax(dim=-1) == targets[piece])
    lengths = [len(pair[1]) for pair, _ in states]
    split = zip(states, _split(chances, lengths), _split(greedy, lengths), strict=True)
    return {
        pair: (float(chance.sum(dtype=torch.float64)), bool(most_likely.all()))
        for (pair, _), chance, most_likely in split
    }


def _split(pieces: Sequence[Tensor], lengths: Sequence[int]) -> Sequence[Tensor]:
    bounds = list(itertools.accumulate(lengths))[:-1]
    return torch.cat(list(pieces)).tensor_split(bounds)


def _run(decoder: Decoder, tokens: Tensor, cache: DynamicCache | None) -> Tensor:
    """Return what enters the head, (rows, length, width); `cache` is gone on from and holds these tokens afterwards."""
    output = decoder.body(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
    hidden: Tensor = output[0]
    return hidden


def _new_cache(decoder: Decoder) -> DynamicCache:
    return DynamicCache(config=decoder.model.config)


def _grown(head: DynamicCache, rows: int) -> DynamicCache:
    """Return a copy of a head's cache with a row for each of `rows`."""
    grown = copy.deepcopy(head)
    grown.batch_repeat_interleave(rows)
    return grown


def _tensor(rows: Sequence[Tokens], decoder: Decoder) -> Tensor:
    """Return rows as int64 (rows, longest), shorter ones filled with token 0 behind."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=decoder.device)
