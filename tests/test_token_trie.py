import random

import pytest

from drllm_fast.search.token_trie import TokenTrie


def test_the_example_of_the_docstring():
    trie = TokenTrie([[7, 8, 9, 1, 2], [7, 8, 9, 3]])
    assert trie.ids == [7, 8, 9, 1, 2, 3] and trie.positions == [0, 1, 2, 3, 4, 3]
    assert trie.lengths == [5, 1] and trie.held == [5, 4] and trie.starts == [0, 5]
    assert trie.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert trie.nodes == [[0, 1, 2, 3, 4], [0, 1, 2, 5]]


@pytest.mark.parametrize("seed", range(200))
def test_every_token_sees_its_own_sequence(seed):
    """Against what attention means: the queries of a segment are the last of its keys."""
    rng = random.Random(seed)
    sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 8))]
    trie = TokenTrie(sequences)
    assert len(trie) == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})
    assert sum(trie.lengths) == len(trie)
    sees = {}
    at, token = 0, 0
    for new, held in zip(trie.lengths, trie.held, strict=True):
        keys = trie.keys[at : at + held].tolist()
        at += held
        for back in range(new):
            sees[token] = keys[: held - new + back + 1]
            assert sees[token][-1] == token
            token += 1
    assert at == len(trie.keys)
    for sequence, nodes in zip(sequences, trie.nodes, strict=True):
        assert [trie.ids[node] for node in nodes] == sequence
        assert [trie.positions[node] for node in nodes] == list(range(len(sequence)))
        assert sees[nodes[-1]] == nodes


def test_a_sequence_needs_a_token():
    for sequences in ([], [[1], []]):
        with pytest.raises(ValueError, match="needs a token"):
            TokenTrie(sequences)
