"""Puts epochs on the MLflow run: none is lost when the tracking store is away, none is there twice."""

import time
from collections.abc import Iterable

import mlflow
import pandas as pd
from mlflow.entities import Metric

from skin_resnet.evaluation.metrics import EpochResult
from skin_resnet.tracking.run import OUTAGES

_WAIT_S = 60.0
_RETRY_S = 2.0


class EpochLog:
    """Writes each epoch's figures to a run, at the step of its number.

    What the store does not take is kept, and written before the next epoch is. A killed process loses
    nothing by that: the history in its checkpoint is given to the next one, which writes all of it again.
    The same value with the same step and timestamp is the same metric to MLflow, so it is there once.

    Args:
        run_id: The run.
        history: Epochs that may be written or not.
    """

    def __init__(self, run_id: str, history: Iterable[EpochResult] = ()) -> None:
        self._run_id = run_id
        self._unwritten = list(history)
        self._is_away = False

    def write(self, result: EpochResult) -> None:
        """Write an epoch, and those before that were not taken."""
        self._unwritten.append(result)
        self._try_to_write()

    def finish(self) -> None:
        """Write all that is left; wait a minute for a store that is away.

        Raises:
            mlflow.MlflowException: It stays away.
        """
        deadline = time.monotonic() + _WAIT_S
        while not self._try_to_write():
            if time.monotonic() > deadline:
                self._write_all()
            time.sleep(_RETRY_S)

    def _try_to_write(self) -> bool:
        try:
            self._write_all()
        except OUTAGES as error:
            if not self._is_away:
                reason = str(error).splitlines()[0][:120]
                print(f"tracking is away ({reason}): epochs are kept, and written later")
            self._is_away = True
            return False
        if self._is_away:
            print("tracking is back: all epochs are written")
        self._is_away = False
        return True

    def _write_all(self) -> None:
        client = mlflow.MlflowClient()
        while self._unwritten:
            result = self._unwritten[0]
            figures = to_figures(result).items()
            metrics = [Metric(name, value, result.timestamp_ms, result.epoch) for name, value in figures]
            client.log_batch(self._run_id, metrics=metrics)
            del self._unwritten[0]


def to_figures(result: EpochResult) -> dict[str, float]:
    """Name an epoch's figures as MLflow shows them."""
    return {
        **result.train.to_dict("train"),
        **result.val.to_dict("val"),
        "val/gap": result.gap,
        "lr": result.lr,
        "speed/epoch_s": result.seconds,
        "speed/images_per_s": result.images_per_s,
    }


def to_frame(history: Iterable[EpochResult]) -> pd.DataFrame:
    """Return the history as a table, indexed by epoch, with a column per MLflow key."""
    rows = {result.epoch: to_figures(result) for result in history}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch")


def log_best(result: EpochResult) -> None:
    """Log the best epoch's figures on the open run, by a name of their own to sort run tables by."""
    run = mlflow.active_run()
    assert run is not None, "figures are logged on an open run"
    val = {name.replace("val/", "best/val_"): value for name, value in result.val.to_dict("val").items()}
    figures = {"best/epoch": float(result.epoch), "best/gap": result.gap, **val}
    metrics = [Metric(name, value, result.timestamp_ms, 0) for name, value in figures.items()]
    mlflow.MlflowClient().log_batch(run.info.run_id, metrics=metrics)
