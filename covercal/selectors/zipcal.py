"""ZipCal: greedy cover of the pool's vocabulary (arXiv 2603.16105).

Needs no model: words are the lower-cased runs of letters, digits and underscores of the text. Scripts that write no
spaces give whole phrases as words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from covercal.selectors.checked import fitting, words_of_every_sample
from covercal.selectors.registry import Evidence, Order

Int64 = npt.NDArray[np.int64]
WORD = re.compile(r"\w+")


class ZipCalSelector:
    """Chooses the samples with the most words that no chosen sample has."""

    reads: frozenset[str] = frozenset()
    seeded = False
    nested = True

    def order(self, evidence: Evidence, extent: int, seed: int) -> Order:
        """Return the greedy order; the seed has no effect.

        Ties go to the sample with the most words, then to the lowest index. When no sample left has a new word, all
        words count as new again and the next round begins; samples without words come last, by index. A gain is the
        number of new words.
        """
        extent = fitting(extent, evidence)
        return _greedy(vocabulary(words_of_every_sample(evidence.texts, evidence, "the texts")), extent)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which sample has which word.

    Attributes
    ----------
    words
        Of every sample, the numbers of its words, each once.
    samples, starts
        int64: the samples that have word w are samples[starts[w] : starts[w + 1]].
    """

    words: Sequence[Int64]
    samples: Int64
    starts: Int64

    def having(self, words: Int64) -> Int64:
        """Return how many of `words` each sample has, int64 (samples,)."""
        ranges = [self.samples[self.starts[word] : self.starts[word + 1]] for word in words]
        return np.bincount(np.concatenate(ranges), minlength=len(self.words)).astype(np.int64)


def vocabulary(texts: Sequence[str]) -> Vocabulary:
    """Return which text has which word."""
    numbers: dict[str, int] = {}
    words = [
        np.array([numbers.setdefault(word, len(numbers)) for word in dict.fromkeys(WORD.findall(text.lower()))], int)
        for text in texts
    ]
    flat = np.concatenate([*words, np.empty(0, dtype=np.int64)])
    owners = np.repeat(np.arange(len(words)), [each.size for each in words])
    starts = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=len(numbers)))])
    return Vocabulary(words, owners[np.argsort(flat, kind="stable")], starts.astype(np.int64))


def _greedy(vocabulary: Vocabulary, extent: int) -> Order:
    sizes = np.array([each.size for each in vocabulary.words], dtype=np.int64)
    scale = int(sizes.max(initial=0)) + 1  # a key is (new words) * scale + (words): one number compares both
    left = np.ones(sizes.size, dtype=bool)
    covered = np.zeros(vocabulary.starts.size - 1, dtype=bool)
    key = sizes * scale + sizes
    order: list[int] = []
    gains: list[int] = []
    rounds: list[int] = []
    current = 0
    while len(order) < extent:
        best = int(np.argmax(key))
        if key[best] < scale:  # nothing new
            if not covered.any():
                break
            covered[:] = False
            current += 1
            key = np.where(left, sizes * scale + sizes, -1)
            continue
        new = vocabulary.words[best]
        new = new[~covered[new]]
        order.append(best)
        gains.append(new.size)
        rounds.append(current)
        covered[new] = True
        left[best] = False
        key -= scale * vocabulary.having(new)
        key[best] = -1
    silent = np.flatnonzero(left)[: extent - len(order)]
    return Order(
        np.concatenate([np.array(order, dtype=np.int64), silent]),
        np.concatenate([np.array(gains, dtype=np.float64), np.zeros(silent.size)]),
        np.concatenate([np.array(rounds, dtype=np.int64), np.full(silent.size, current)]),
    )
