"""Which prompts are one and the same but for the wording around their content.

A router that has met "What is the capital of Peru? please" remembers the outcome of "What is the
capital of Peru". `same_prompt` takes case and white space for nothing; here punctuation at the
ends of words goes too, and two prompts are near copies when both of this holds:

- the cosine of their letter trigrams, weighted by tf-idf, is at least `NEAR`. The idf is that of
  the prompts themselves: what half of them have (a template, an appended "please") counts little,
  what few have counts much. A trigram that only one prompt has counts half: no copy shares it, and
  what was appended to a single copy should not hide it.
- nothing is exchanged: one of the two lacks at most `MISSING` trigrams of the other, about one
  slip of the pen, and its numbers, signs and single letters are those of the other, or some of
  them in the same order. So "... of France" and "... of Spain", "2 + 3" and "2 - 3", and questions
  on one passage stay apart, however long what they share.

Groups are the connected components. Only pairs that can reach the cosine are looked at: those that
share a trigram among the rarest ones, which make up 1 - NEAR² of a squared length (prefix
filtering: Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", WWW 2007).

Not found: a paraphrase, and what outweighs a short prompt, such as a number of its own appended to
every copy.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from router_models.training_data import same_prompt

NEAR = 0.85
"""Smallest cosine. The bundled questions, all different, reach 0.82 with each other, at most."""
MISSING = 4
"""Letters that change places touch four trigrams; another word of four letters or more, more."""
ONLY_ONCE = 0.5
"""Weight of a trigram that a single prompt has."""
PAIRS = 1_000_000
"""Pairs, and trigrams of pairs, looked at in one go: some 100 MB."""

# Around words, not in them: "2.5", "don't" and "5!" keep theirs.
PUNCTUATION = re.compile(r"(?<!\w)[.,;:?\"'’“”…]+|[.,;:?\"'’“”…]+(?!\w)|(?<!\d)!+")
# Numbers, signs and single letters: one that differs makes another question.
STRICT = re.compile(r"\w*\d\w*|\b\w\b|[^\w\s.,;:?\"'’“”…!()\[\]{}]")


def near_copy_groups(prompts: Sequence[str]) -> np.ndarray:
    """Return (n,) group numbers, counted from 0 in the order of the groups' first prompts.

    Prompts that are equal by `same_prompt` are always in one group. The groups do not depend on
    the order of the prompts. Memory is bounded; time grows with the pairs that share rare text.

    >>> near_copy_groups(["Who wrote Emma", "who  wrote Emma?", "Who wrote Ulysses"]).tolist()
    [0, 0, 1]
    """
    if not len(prompts):
        return np.zeros(0, dtype=np.int64)
    distinct, text = np.unique([_bare(prompt) for prompt in prompts], return_inverse=True)
    texts = [str(one) for one in distinct]
    linked = _Linked(len(texts))
    counts = _trigrams(texts)
    weighted = _weighted(counts)
    present = sparse.csr_array((np.ones(counts.nnz), counts.indices, counts.indptr), counts.shape)
    size = np.diff(present.indptr)
    strict = [STRICT.findall(one) for one in texts]
    for a, b in _candidates(weighted):
        new = linked.group[a] != linked.group[b]
        a, b = a[new], b[new]
        near = _dot(weighted, a, b) >= NEAR
        a, b = a[near], b[near]
        unexchanged = size[a] - _dot(present, a, b) <= MISSING
        for one, other in zip(a[unexchanged].tolist(), b[unexchanged].tolist(), strict=True):
            if _in_order(strict[one], strict[other]):
                linked.join(one, other)
    _, first, group = np.unique(linked.group[text], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


class _Linked:
    """The groups so far: ``group`` holds the number of each text's group."""

    def __init__(self, texts: int) -> None:
        self.group = np.arange(texts)
        self._members = {number: [number] for number in range(texts)}

    def join(self, one: int, other: int) -> None:
        """Make the groups of two texts one; the smaller group takes the larger one's number."""
        kept, gone = int(self.group[one]), int(self.group[other])
        if kept == gone:
            return
        if len(self._members[kept]) < len(self._members[gone]):
            kept, gone = gone, kept
        self.group[self._members[gone]] = kept
        self._members[kept] += self._members.pop(gone)


def _bare(prompt: str) -> str:
    """Return the prompt without case, extra white space and punctuation around words."""
    normal = same_prompt(prompt)
    return " ".join(PUNCTUATION.sub(" ", normal).split()) or normal


def _trigrams(texts: Sequence[str]) -> sparse.csr_array:
    """Return (n, m) counts of the letter trigrams of each text, the rarest ones first."""
    padded = [f" {text} " if len(text) > 1 else f" {text}  " for text in texts]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    letters = letters.astype(np.uint64)
    row = np.repeat(np.arange(len(padded)), [len(text) for text in padded])
    key = (letters[:-2] << np.uint64(42)) | (letters[1:-1] << np.uint64(21)) | letters[2:]
    within = row[:-2] == row[2:]
    found, column = np.unique(key[within], return_inverse=True)
    shape = (len(texts), len(found))
    counts = sparse.csr_array((np.ones(len(column)), (row[:-2][within], column)), shape=shape)
    counts.sum_duplicates()
    holders = np.bincount(counts.indices, minlength=len(found))
    rank = np.empty(len(found), dtype=np.int64)
    rank[np.argsort(holders, kind="stable")] = np.arange(len(found))
    ranked = sparse.csr_array((counts.data, rank[counts.indices], counts.indptr), shape=shape)
    ranked.sort_indices()
    return ranked


def _weighted(counts: sparse.csr_array) -> sparse.csr_array:
    """Return the tf-idf weights of the counts, rows of length 1."""
    holders = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log((counts.shape[0] + 1) / holders) * np.where(holders == 1, ONLY_ONCE, 1.0)
    data = (1 + np.log(counts.data)) * idf[counts.indices]
    squares = np.add.reduceat(data**2, counts.indptr[:-1])
    data = data / np.sqrt(np.repeat(squares, np.diff(counts.indptr)))
    return sparse.csr_array((data, counts.indices, counts.indptr), counts.shape)


def _candidates(weighted: sparse.csr_array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of rows in blocks: all whose cosine can reach `NEAR` with nothing exchanged.

    The first row of a pair is the one that lacks no more than `MISSING` trigrams in the second.
    """
    squares = np.cumsum(weighted.data**2)
    before = squares - weighted.data**2
    sizes = np.diff(weighted.indptr)
    kept = before - np.repeat(before[weighted.indptr[:-1]], sizes) <= 1 - NEAR**2 + 1e-9
    row = np.repeat(np.arange(len(sizes)), sizes)[kept]
    column = weighted.indices[kept]
    rarest = sparse.csr_array((np.ones(len(row), np.int32), (row, column)), weighted.shape)
    needed = np.maximum(np.diff(rarest.indptr) - MISSING, 1)
    ones = np.ones(weighted.nnz, np.int32)
    columns = sparse.csr_array((ones, weighted.indices, weighted.indptr), weighted.shape).T.tocsr()
    holders = np.diff(columns.indptr)
    work = np.cumsum(np.bincount(row, holders[column], minlength=len(sizes)))
    # A row has the work of its trigrams' holders; a block of rows, of about PAIRS.
    bounds = np.flatnonzero(np.diff(work // PAIRS, prepend=-1))
    step = max(1, PAIRS // int(sizes.mean() + 1))
    for start, stop in zip(bounds, [*bounds[1:], len(sizes)], strict=True):
        shared = (rarest[start:stop] @ columns).tocoo()
        first, second = shared.row + start, shared.col
        enough = (first != second) & (shared.data >= needed[first])
        first, second = first[enough], second[enough]
        for at in range(0, len(first), step):
            yield first[at : at + step], second[at : at + step]


def _dot(rows: sparse.csr_array, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the inner products of rows ``a`` with rows ``b``, pair by pair."""
    if not len(a):
        return np.zeros(0)
    return np.asarray(rows[a].multiply(rows[b]).sum(axis=1)).ravel()


def _in_order(one: Sequence[str], other: Sequence[str]) -> bool:
    """Tell whether the shorter list is what remains of the longer one without some entries."""
    short, long = sorted((one, other), key=len)
    rest = iter(long)
    return all(entry in rest for entry in short)
