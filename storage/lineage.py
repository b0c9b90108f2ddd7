"""Which artifacts were made from which: a graph of keys, walked both ways."""

from collections.abc import Collection, Iterable, Mapping

Reads = Mapping[str, Collection[str]]


def ancestors(keys: Iterable[str], reads: Reads) -> frozenset[str]:
    """Return every key that `keys` were made from, directly or not, without `keys` that nothing else here reads.

    Parameters
    ----------
    keys
        Where to begin.
    reads
        For each artifact, the keys it reads; a key that is not in it reads nothing.
    """
    found: set[str] = set()
    open_ends = [each for key in keys for each in reads.get(key, ())]
    while open_ends:
        key = open_ends.pop()
        if key not in found:
            found.add(key)
            open_ends.extend(reads.get(key, ()))
    return frozenset(found)


def readers(reads: Reads) -> dict[str, list[str]]:
    """Return, for each key that is read, the keys that read it, in the order of `reads`."""
    found: dict[str, list[str]] = {}
    for key, inputs in reads.items():
        for each in inputs:
            found.setdefault(each, []).append(key)
    return found
