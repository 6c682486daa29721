"""Which epoch is the best, and when to stop early."""

import numpy as np

from skin_resnet.training.engine import EpochResult


class BestEpoch:
    """Keeps the best epoch by a val metric, and tells when to stop for lack of improvement.

    Args:
        metric: `balanced_accuracy`, `macro_auc` (higher is better) or `loss` (lower is).
        patience: Epochs to wait for an improvement; 0: for ever.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self._metric = metric
        self._patience = patience
        self._best: EpochResult | None = None
        self._last_epoch = 0

    @property
    def epoch(self) -> EpochResult:
        """The best epoch so far; there must have been one."""
        assert self._best is not None, "no epoch has finished yet"
        return self._best

    def update(self, result: EpochResult) -> bool:
        """Add an epoch; return whether it is the best so far. The first of equals stays."""
        self._last_epoch = result.epoch
        if self._best is not None and self._score(result) <= self._score(self._best):
            return False
        self._best = result
        return True

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self._patience > 0 and self._last_epoch - self.epoch.epoch >= self._patience

    def _score(self, result: EpochResult) -> float:
        value: float = getattr(result.val, self._metric)
        if np.isnan(value):
            return -np.inf
        return -value if self._metric == "loss" else value
