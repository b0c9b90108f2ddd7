"""Lineage says what was made from what, both ways, as going through every path by hand does."""

from hypothesis import given
from hypothesis import strategies as st

from storage.lineage import ancestors, readers

KEYS = "abcdefgh"
NOT_HERE = "xyz"
graphs = st.dictionaries(st.sampled_from(KEYS), st.lists(st.sampled_from(KEYS + NOT_HERE), unique=True), max_size=8)
starts = st.lists(st.sampled_from(KEYS + NOT_HERE), max_size=4)
Graph = dict[str, list[str]]


def paths_reach(graph: Graph, start: str, end: str) -> bool:
    """Return whether some chain of one or more reads leads from `start` to `end`, by trying chain after chain."""
    chains = [[start]]
    for _ in range(len(graph) + 1):
        chains = [[*chain, read] for chain in chains for read in graph.get(chain[-1], []) if read not in chain[1:]]
        if any(chain[-1] == end for chain in chains):
            return True
    return False


@given(graphs, starts)
def test_an_ancestor_is_what_a_chain_of_reads_leads_to(graph: Graph, keys: list[str]) -> None:
    expected = {end for end in KEYS + NOT_HERE if any(paths_reach(graph, key, end) for key in keys)}
    assert ancestors(keys, graph) == expected


@given(graphs, starts, starts)
def test_ancestors_of_several_are_those_of_each(graph: Graph, some: list[str], others: list[str]) -> None:
    assert ancestors([*some, *others], graph) == ancestors(some, graph) | ancestors(others, graph)


@given(graphs)
def test_a_key_is_read_by_those_that_list_it_in_their_order(graph: Graph) -> None:
    expected = {key: [each for each, reads in graph.items() if key in reads] for key in KEYS + NOT_HERE}
    assert readers(graph) == {key: found for key, found in expected.items() if found}


@given(graphs, st.sampled_from(KEYS), st.sampled_from(KEYS + NOT_HERE))
def test_descendants_are_ancestors_the_other_way(graph: Graph, young: str, old: str) -> None:
    assert (old in ancestors([young], graph)) == (young in ancestors([old], readers(graph)))


def test_what_reads_nothing_has_no_ancestors() -> None:
    assert ancestors(["a", "x"], {"a": [], "b": ["a"]}) == frozenset()


def test_a_key_is_its_own_ancestor_only_in_a_circle() -> None:
    assert ancestors(["a"], {"a": ["b"], "b": []}) == {"b"}
    assert ancestors(["a"], {"a": ["b"], "b": ["a"]}) == {"a", "b"}
    assert ancestors(["a"], {"a": ["a"]}) == {"a"}


def test_a_long_line_of_artifacts_is_walked_to_its_end() -> None:
    line = {str(number): [str(number + 1)] for number in range(5000)}
    assert len(ancestors(["0"], line)) == 5000
    assert len(ancestors(["5000"], readers(line))) == 5000
