"""Perplexity, divergence of the original to the quantised model, and top-token agreement."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from covercal.decoder import Decoder, final_hidden, head_logits, token_tensor

HEAD_TOKENS = 256  # tokens whose logits over the whole vocabulary are held at once
COMPARED_TOKENS = 16  # of these, whose logits are gone through together: they stay in the processor's cache
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Reference:
    """The original model's view of one text.

    Attributes
    ----------
    losses
        float32 (sequences, length - 1): negative log-likelihood of each next token, nats.
    hidden
        float32 (sequences * length, width): what enters the language-model head; the logits follow from it exactly, and
        it is smaller than they are by the ratio of vocabulary to width. None when only losses were asked for.
    """

    losses: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class SequenceScores:
    """One sequence under the quantised model.

    Attributes
    ----------
    tokens
        Predicted tokens.
    loss
        Mean negative log-likelihood, nats per token.
    divergence
        Mean KL(original || quantised), nats per token; NaN when not asked for.
    agreement
        Share of tokens whose most likely next token is the same; NaN when not asked for.
    """

    tokens: int
    loss: float
    divergence: float = math.nan
    agreement: float = math.nan


@torch.inference_mode()
def reference_outputs(
    decoder: Decoder, sequences: Sequence[Tokens], *, keep_hidden: bool, advance: Callable[[int], None] = lambda n: None
) -> Reference:
    """Run the original model once over sequences of one length."""
    losses, hidden_states = [], []
    for sequence in sequences:
        tokens = token_tensor([sequence], decoder.device)
        hidden = final_hidden(decoder, tokens)
        losses.append(np.concatenate(list(_losses(decoder, hidden, tokens))))
        if keep_hidden:
            hidden_states.append(hidden[0].float().cpu().numpy())
        advance(1)
    return Reference(np.stack(losses), np.concatenate(hidden_states) if keep_hidden else None)


@torch.inference_mode()
def mean_losses(
    decoder: Decoder, sequences: Sequence[Tokens], *, advance: Callable[[int], None] = lambda n: None
) -> npt.NDArray[np.float64]:
    """Return the mean negative log-likelihood per predicted token of every sequence, (sequences,), in nats."""
    found = np.empty(len(sequences), dtype=np.float64)
    for index, sequence in enumerate(sequences):
        tokens = token_tensor([sequence], decoder.device)
        losses = np.concatenate(list(_losses(decoder, final_hidden(decoder, tokens), tokens)))
        found[index] = losses.mean(dtype=np.float64)
        advance(1)
    return found


@torch.inference_mode()
def score(
    quantized: Decoder,
    original: Decoder | None,
    sequences: Sequence[Tokens],
    hidden: npt.NDArray[np.float32] | None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[SequenceScores]:
    """Score the quantised model on sequences of one length.

    Parameters
    ----------
    quantized, original
        The two models; of the original only the head runs. None where `hidden` is.
    sequences
        Token ids, int32 (length,) each.
    hidden
        `Reference.hidden` of the same sequences, or None for losses only.
    """
    scores = []
    for index, sequence in enumerate(sequences):
        tokens = token_tensor([sequence], quantized.device)
        states = final_hidden(quantized, tokens)
        if hidden is None:
            loss = np.concatenate(list(_losses(quantized, states, tokens)))
            scores.append(SequenceScores(loss.size, float(loss.mean(dtype=np.float64))))
        elif original is None:
            raise ValueError("a divergence needs the original, whose head makes logits of hidden states")
        else:
            rows = hidden[index * sequence.size : (index + 1) * sequence.size]
            reference = torch.from_numpy(rows).to(original.device, original.model.dtype)[None]
            scores.append(_compare(quantized, original, states, reference, tokens))
        advance(1)
    return scores


def kl_divergence(original: Tensor, quantized: Tensor) -> Tensor:
    """Return KL(original || quantised), nats, float64 (tokens,), of float32 (tokens, vocabulary) log-probabilities."""
    return (original.exp() * (original - quantized)).sum(dim=-1, dtype=torch.float64)


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, float32 (tokens,), nats."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def perplexity(scores: Iterable[SequenceScores]) -> float:
    """Return exp of the mean loss per token."""
    listed = list(scores)
    return math.exp(sum(s.loss * s.tokens for s in listed) / sum(s.tokens for s in listed))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over sequences and its standard error (NaN for a single one)."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return float(array.mean()), error


def _predicting(tokens: Tensor) -> Iterable[tuple[slice, Tensor]]:
    """Yield (positions, next tokens) in pieces; the last position predicts nothing."""
    last = tokens.shape[1] - 1
    for start in range(0, last, HEAD_TOKENS):
        positions = slice(start, min(start + HEAD_TOKENS, last))
        yield positions, tokens[0, positions.start + 1 : positions.stop + 1]


def _losses(decoder: Decoder, hidden: Tensor, tokens: Tensor) -> Iterable[npt.NDArray[np.float32]]:
    for positions, targets in _predicting(tokens):
        logits = head_logits(decoder, hidden[:, positions])[0]
        yield next_token_losses(logits, targets).cpu().numpy()


def _compare(
    quantized: Decoder, original: Decoder, states: Tensor, reference: Tensor, tokens: Tensor
) -> SequenceScores:
    found: list[tuple[Tensor, ...]] = []
    for positions, targets in _predicting(tokens):
        whole = head_logits(original, reference[:, positions])[0], head_logits(quantized, states[:, positions])[0]
        for *logits, wanted in zip(*(torch.split(each, COMPARED_TOKENS) for each in (*whole, targets)), strict=True):
            p, q = (torch.log_softmax(each, dim=-1) for each in logits)
            loss = torch.nn.functional.nll_loss(q, wanted, reduction="none")
            found.append((kl_divergence(p, q), loss, p.argmax(dim=-1) == q.argmax(dim=-1)))
    divergences, losses, agreements = (torch.cat(each).double() for each in zip(*found, strict=True))
    return SequenceScores(len(losses), *(float(each.mean()) for each in (losses, divergences, agreements)))
