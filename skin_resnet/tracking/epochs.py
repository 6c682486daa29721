"""Epochs on their way to MLflow: buffered while the tracking store is away, never logged twice."""

import time
from collections.abc import Iterable

import mlflow
from mlflow.entities import Metric

from skin_resnet.tracking.store import OUTAGES, hide_password
from skin_resnet.training.engine import EpochResult

_WAIT_S = 60.0
_RETRY_S = 2.0


class EpochLog:
    """Logs each epoch's metrics on a run, at the step of its number.

    What the store does not accept is buffered, and logged before the next epoch is. A killed process loses
    nothing: the next one is given the history in the checkpoint and logs all of it again. To MLflow, the same
    value with the same step and timestamp is the same metric.

    Args:
        run_id: The run.
        history: Epochs that may or may not have been logged.
    """

    def __init__(self, run_id: str, history: Iterable[EpochResult] = ()) -> None:
        self._run_id = run_id
        self._pending = list(history)
        self._is_away = False

    def write(self, result: EpochResult) -> None:
        """Log an epoch after those still pending, or buffer it."""
        self._pending.append(result)
        self._try_to_flush()

    def finish(self) -> None:
        """Log all that is pending; wait up to a minute for a store that is away.

        Raises:
            mlflow.MlflowException: It stays away.
        """
        deadline = time.monotonic() + _WAIT_S
        while not self._try_to_flush():
            if time.monotonic() > deadline:
                self._flush()
            time.sleep(_RETRY_S)

    def _try_to_flush(self) -> bool:
        try:
            self._flush()
        except OUTAGES:
            if not self._is_away:
                print(f"MLflow unreachable at {hide_password(mlflow.get_tracking_uri())}; buffering metrics")
            self._is_away = True
            return False
        if self._is_away:
            print("MLflow reachable again; all buffered metrics are logged")
        self._is_away = False
        return True

    def _flush(self) -> None:
        client = mlflow.MlflowClient()
        while self._pending:
            result = self._pending[0]
            values = result.to_metrics().items()
            metrics = [Metric(name, value, result.timestamp_ms, result.epoch) for name, value in values]
            client.log_batch(self._run_id, metrics=metrics)
            del self._pending[0]


def log_best(run_id: str, result: EpochResult) -> None:
    """Log the best epoch's metrics under names of their own, `best/...`, for sorting tables of runs."""
    val = {name.replace("val/", "best/val_"): value for name, value in result.val.to_dict("val").items()}
    values = {"best/epoch": float(result.epoch), "best/gap": result.gap, **val}
    metrics = [Metric(name, value, result.timestamp_ms, 0) for name, value in values.items()]
    mlflow.MlflowClient().log_batch(run_id, metrics=metrics)
