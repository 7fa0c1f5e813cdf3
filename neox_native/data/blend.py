"""GPT-NeoX's greedy blend of weighted datasets, sample by sample and yet in numpy.

Sample s comes from the dataset that lags furthest behind its share: with x = max(s, 1), the first maximum of w_i x -
c_i in float64, where c_i counts the samples dataset i has given so far. Each choice depends on all before it.

[Note: lanes] The stream is cut into *lanes* of equal length that numpy advances side by side, one sample of every
lane at a time. A lane would need the counts at its start. It guesses them (the rounded shares) and starts early, in
the lane before: two greedy streams with different counts never drift further apart and soon coincide. A lane whose
start differs from the end of the lane before it is run again from there, until all lanes meet: the result is exact
whatever the guesses were worth.
"""

from __future__ import annotations

import numpy as np

LANE_SAMPLES = 8192
WARMUP_SAMPLES = 1024
LANES_AT_ONCE = 2048
"""Keeps the working set in the cache."""


def normalised(weights: list[float]) -> np.ndarray:
    """Weights that sum to 1, float64 [datasets]; divided twice, as GPT-NeoX does, since rounding decides ties."""
    shares = np.array([weight / sum(weights) for weight in weights], np.float64)
    return shares / np.sum(shares)


class Blend:
    """For each sample of a blended stream, which dataset gives it and which of that dataset's samples it is.

    Holds one byte per sample and the counts at the start of each lane; see [Note: lanes].
    """

    def __init__(self, weights: list[float], num_samples: int) -> None:
        self.weights, self.num_samples = normalised(weights), num_samples
        num_lanes = max(1, -(-num_samples // LANE_SAMPLES))
        self._starts = np.arange(num_lanes, dtype=np.int64) * LANE_SAMPLES
        self._dataset = np.empty((num_lanes, LANE_SAMPLES), np.uint8)
        self._counts = self._guess()
        self._ends = np.empty_like(self._counts)
        lanes = np.arange(num_lanes)
        while len(lanes):
            for block in np.array_split(lanes, -(-len(lanes) // LANES_AT_ONCE)):
                counts, chosen = advance(self.weights, self._counts[block], self._starts[block], LANE_SAMPLES)
                self._ends[block], self._dataset[block] = counts, chosen.T
            lanes = 1 + np.flatnonzero((self._ends[:-1] != self._counts[1:]).any(axis=1))
            self._counts[lanes] = self._ends[lanes - 1]

    def _guess(self) -> np.ndarray:
        """Counts at the start of each lane, right for the first and probable for the others, int64 [lanes, datasets]."""
        early = np.maximum(self._starts - WARMUP_SAMPLES, 0)
        blocks = np.array_split(np.arange(len(early)), -(-len(early) // LANES_AT_ONCE))
        counts = rounded_shares(self.weights, early)
        counts = np.concatenate([advance(self.weights, counts[lanes], early[lanes], WARMUP_SAMPLES)[0] for lanes in blocks])
        counts[0] = 0
        return counts

    def locate(self, sample: int) -> tuple[int, int]:
        """Dataset and sample of that dataset for sample `sample` of the stream."""
        assert 0 <= sample < self.num_samples, (sample, self.num_samples)
        lane, position = divmod(sample, LANE_SAMPLES)
        dataset = int(self._dataset[lane, position])
        before = np.count_nonzero(self._dataset[lane, :position] == dataset)
        return dataset, int(self._counts[lane, dataset]) + int(before)

    def stream_sample(self, dataset: int, sample: int) -> int:
        """The inverse of `locate`: where in the stream sample `sample` of a dataset stands."""
        lane = int(self._counts[:, dataset].searchsorted(sample, side="right")) - 1
        position = np.flatnonzero(self._dataset[lane] == dataset)[sample - self._counts[lane, dataset]]
        return lane * LANE_SAMPLES + int(position)

    def counts(self) -> np.ndarray:
        """Samples that each dataset gives in all, int64 [datasets]."""
        lane, position = divmod(self.num_samples, LANE_SAMPLES)
        if lane == len(self._dataset):
            return self._ends[-1].copy()
        return self._counts[lane] + np.bincount(self._dataset[lane, :position], minlength=len(self.weights))


def rounded_shares(weights: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Whole numbers near weights x total that sum to each total, largest remainders first, int64 [totals, datasets]."""
    exact = weights * totals[:, None]
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1, kind="stable")
    return counts + (rank < (totals - counts.sum(axis=1))[:, None])


def advance(weights: np.ndarray, counts: np.ndarray, first: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `steps` samples in every lane: the counts afterwards, int64 [lanes, datasets], and the choices, u8
    [steps, lanes].

    `counts` [lanes, datasets] are those before sample `first` [lanes] of the stream.
    """
    given = counts.astype(np.float64)
    chosen = np.empty((steps, len(counts)), np.uint8)
    lanes, lag = np.arange(len(counts)), np.empty_like(given)
    for step in range(steps):
        np.multiply(np.maximum(first + step, 1.0)[:, None], weights, out=lag)
        np.subtract(lag, given, out=lag)
        choice = lag.argmax(axis=1)
        given[lanes, choice] += 1.0
        chosen[step] = choice
    return given.astype(np.int64), chosen
