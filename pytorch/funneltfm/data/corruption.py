"""Corrupting token sequences, for objectives that learn to undo it. All randomness comes from the generator given."""

import numpy as np

from funneltfm.errors import InputError


def masked(
    ids: np.ndarray,
    selectable: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    actions: tuple[float, float, float],
    *,
    mask_id: int,
    ordinary: np.ndarray,
    words: np.ndarray | None = None,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Select tokens and mask, replace or leave them (Devlin et al. 2019, section 3.1).

    ids: (T,). selectable: (T,) bool, False for special tokens. actions: probabilities that a selected token becomes
    mask_id, one of `ordinary` (ids, uniformly), or stays; drawn for each token. words: (T,) word ids; all pieces of a
    word are selected or none. exact: select max(1, round(p * n)) of the n tokens (words), not each with probability p.

    Returns the corrupted ids and which tokens were selected, both (T,). Every token's chance of being selected is
    `probability` (exact: the rounded count's share).
    """
    if abs(sum(actions) - 1) > 1e-6:
        raise InputError(f"the probabilities of masking, replacing and leaving must add to 1; got {actions}.")
    chosen = select(selectable, rng, probability, words, exact)
    action = rng.random(len(ids))
    corrupt = ids.copy()
    corrupt[chosen & (action < actions[0])] = mask_id
    replace = chosen & (action >= actions[0]) & (action < actions[0] + actions[1])
    corrupt[replace] = rng.choice(ordinary, int(replace.sum()))
    return corrupt, chosen


def select(
    selectable: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    words: np.ndarray | None = None,
    exact: bool = False,
) -> np.ndarray:
    """Which tokens are selected, (T,) bool; the arguments are those of `masked`."""
    places = np.flatnonzero(selectable)
    group = np.arange(len(places)) if words is None else np.unique(words[places], return_inverse=True)[1]
    n = int(group.max(initial=-1)) + 1
    if exact:
        drawn = np.zeros(n, bool)
        drawn[rng.permutation(n)[: max(1, round(probability * n))]] = True
    else:
        drawn = rng.random(n) < probability
    chosen = np.zeros(len(selectable), bool)
    chosen[places] = drawn[group]
    return chosen


def replaced(ids: np.ndarray, chosen: np.ndarray, rng: np.random.Generator, ordinary: np.ndarray) -> np.ndarray:
    """ids (T,) with every chosen token, one of `ordinary`, replaced by another of `ordinary` (sorted), uniformly."""
    corrupt, places = ids.copy(), np.searchsorted(ordinary, ids[chosen])
    drawn = rng.integers(len(ordinary) - 1, size=len(places))
    corrupt[chosen] = ordinary[drawn + (drawn >= places)]
    return corrupt


# ---- text infilling and sentence permutation (Lewis et al. 2020, section 2.2)


def _units(places: np.ndarray, words: np.ndarray, whole: bool) -> np.ndarray:
    """The number of the unit of each of the tokens at `places`, from 0: a token, or with `whole` a word."""
    if not whole:
        return np.arange(len(places))
    same = (np.diff(places) == 1) & (np.diff(words[places]) == 0)
    return np.concatenate([[0], np.cumsum(~same)]) if len(places) else places


def infilled(
    ids: np.ndarray,
    selectable: np.ndarray,
    words: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    mean_length: float,
    *,
    mask_id: int,
    longest: int,
    max_spans: int | None = None,
    whole_words: bool = False,
) -> np.ndarray:
    """ids (T,) with spans of them replaced by one mask each.

    Exactly round(p * n) of the n selectable tokens go. Lengths of spans are drawn from Poisson(mean_length) until they
    add to that, the last one cut; one of length 0 is a mask more, put before a word. Spans do not overlap; they start
    at words where one is free that has room for them, and are split where none has. words: (T,) word ids.
    whole_words: count in words, so that none is cut in pieces. max_spans: stop after so many, though fewer tokens go.
    longest: masks of length 0 are left out where the result would have more tokens than this.
    """
    places = np.flatnonzero(selectable)
    unit = _units(places, words, whole_words)
    first = np.flatnonzero(np.diff(unit, prepend=-1))  # of `places`, for each unit
    n = len(first)
    begin = places[first]
    adjoins = np.zeros(n, bool)  # the next unit follows it
    if n:
        last = places[np.append(first[1:], len(places)) - 1]
        adjoins[:-1] = begin[1:] == last[:-1] + 1
    fresh = np.ones(n, bool)  # it starts a word
    fresh[1:] = (words[begin[1:]] != words[begin[1:] - 1]) | ~adjoins[:-1]

    lengths: list[int] = []
    left = round(probability * n)
    while left and (max_spans is None or len(lengths) < max_spans):
        lengths.append(min(int(rng.poisson(mean_length)), left))
        left -= lengths[-1]
    empty = lengths.count(0)
    free, head = np.ones(n, bool), np.zeros(n, bool)
    todo = sorted(length for length in lengths if length)
    while todo:
        length = todo.pop()
        ends = np.flatnonzero(free & ~(adjoins & np.append(free[1:], False)))
        start = np.flatnonzero(free)
        run = ends[np.searchsorted(ends, start)] - start + 1
        room = fresh[start] & (run >= length)
        if not room.any():
            among = fresh[start] if fresh[start].any() else np.ones(len(start), bool)
            most = int(run[among].max())
            room = among & (run >= min(length, most))
            if length > most:
                if max_spans is None or head.sum() + len(todo) + 1 + empty < max_spans:
                    todo.append(length - most)
                length = most
        at = int(rng.choice(start[room]))
        free[at : at + length], head[at] = False, True

    keep = ~selectable
    keep[places] = free[unit]
    masks = np.zeros(len(ids), np.int64)  # before each token
    masks[begin[head]] = 1
    empty = max(0, min(empty, longest - int(keep.sum() + masks.sum())))
    if empty:
        spots = np.flatnonzero((free | head) & fresh)
        np.add.at(masks, begin[rng.choice(spots if len(spots) else np.flatnonzero(free | head), empty)], 1)
    ends = np.cumsum(masks + keep)
    out = np.full(ends[-1] if len(ids) else 0, mask_id, ids.dtype)
    out[ends[keep] - 1] = ids[keep]
    return out


def permuted(ends: np.ndarray, fixed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order (T,) of T tokens, as indices, in which sentences are shuffled.

    ends: (T,) bool, the last tokens of sentences. fixed: (T,) bool, tokens that stay where they are; sentences are
    shuffled between one and the next.
    """
    order = np.arange(len(ends))
    borders = np.flatnonzero(fixed)
    for a, b in zip(np.append(-1, borders) + 1, np.append(borders, len(ends)), strict=True):
        sentences = np.split(np.arange(a, b), np.flatnonzero(ends[a : b - 1]) + 1) if b > a else []
        if len(sentences) > 1:
            order[a:b] = np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])
    return order


# ---- span corruption (Raffel et al. 2020, sections 3.1.4 and 3.3.4)


def n_noise(n: int, density: float, mean_length: float, max_spans: int) -> tuple[int, int]:
    """How many of n tokens (words) are noise, in how many spans."""
    if n < 2:
        return 0, 0
    noise = min(max(round(n * density), 1), n - 1)
    return noise, min(max(1, round(noise / mean_length)), max_spans, noise, n - noise)


def unspanned_length(length: int, density: float, mean_length: float, max_spans: int) -> int:
    """The most tokens that make an input of at most `length` tokens, without special ones at its ends.

    >>> unspanned_length(511, 0.15, 3.0, 100)  # and one for the end of the text: 512
    568
    """
    n = length
    while True:
        noise, spans = n_noise(n + 1, density, mean_length, max_spans)
        if n + 1 - noise + spans > length:
            return n
        n += 1


def noise_spans(
    n: int,
    rng: np.random.Generator,
    density: float,
    mean_length: float,
    max_spans: int,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Which of n tokens are noise, (n,) bool: spans of other tokens and of noise by turns, the last one is noise. Their
    lengths are drawn uniformly from all that add to what `n_noise` says. words: (n,) word ids; count and cut by words.
    """
    unit = np.arange(n) if words is None else _units(np.arange(n), words, True)
    total = int(unit.max(initial=-1)) + 1
    noise, spans = n_noise(total, density, mean_length, max_spans)
    if not spans:
        return np.zeros(n, bool)
    lengths = np.stack([_composition(total - noise, spans, rng), _composition(noise, spans, rng)], axis=1)
    return np.repeat(np.tile([False, True], spans), lengths.ravel())[unit]


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` as a sum of positive numbers, (parts,), uniformly among all ways."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def spanned(ids: np.ndarray, noise: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids (n,) with each span of noise replaced by a sentinel; and the spans themselves, each after its sentinel."""
    if not noise.any():
        return ids, ids[:0]
    starts = np.diff(noise.astype(np.int8), prepend=0) == 1
    marks = sentinels[np.cumsum(starts) - 1]
    inputs = np.where(starts, marks, ids)[~noise | starts]
    targets = np.stack([marks, ids], axis=1)[np.stack([starts, noise], axis=1)]
    return inputs, targets
