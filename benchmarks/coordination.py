"""What workers lose to each other: `python -m benchmarks.coordination [STORAGE]`.

Trials that only wait, and report a value each epoch as a training does, for 1, 2, 4 and 8 workers on one
study. Without loss, any number of workers takes as long as one does for its share of the trials. Then trials
that train on the demo's images, each on one thread, for one worker and for one per core.
The storage is one for Optuna, `postgresql+psycopg://...` for instance; without it, a SQLite file.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import mlflow
import psutil
import torch
from optuna import Trial, TrialPruned
from optuna.trial import TrialState

from benchmarks.results import keep
from search import workers
from search.config import SearchConfig
from search.study import list_ended, open_study
from skin_resnet.evaluation.page import format_table
from skin_resnet.tracking.run import open_run

TRIALS = 8  # of each worker; in all, where they train
EPOCHS = 10
EPOCH_S = 0.5


def wait(trial: Trial, config: SearchConfig, parent_run_id: str) -> tuple[float, ...]:
    """Do what a trial does, without its training."""
    trial.set_user_attr("run_id", "none")
    for epoch in range(1, EPOCHS + 1):
        time.sleep(EPOCH_S)
        trial.report(1 / epoch, epoch)
        if trial.should_prune():
            raise TrialPruned
    trial.set_user_attr("gap", 0.0)
    return (1 / EPOCHS,)


def run_worker(config: SearchConfig, start: Barrier, parent_run_id: str) -> None:
    """Run trials as a worker of a search does, once all workers are there; without a run, they only wait."""
    torch.set_num_threads(1)
    if not parent_run_id:
        workers.run_trial = wait
    open_study(config)
    start.wait()
    workers.work(config, parent_run_id)


def measure(count: int, config: SearchConfig, parent_run_id: str = "") -> float:
    """Return the seconds that `count` workers take for a study of this config."""
    config = config.model_copy(update={"study_name": f"coordination {count} {time.time()}"})
    study = open_study(config)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(count + 1)
    processes = [
        context.Process(target=run_worker, args=(config, start, parent_run_id)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - began
    ended = list_ended(study.get_trials())
    assert [trial.state for trial in ended] == [TrialState.COMPLETE] * config.n_trials
    return seconds


def measure_waiting(storage: str) -> list[list[str]]:
    """Return the rows of the table of trials that only wait."""
    seconds = {}
    for count in (1, 2, 4, 8):
        config = SearchConfig(
            data="demo", storage=storage, pruner="none", n_trials=TRIALS * count, epochs=EPOCHS
        )
        seconds[count] = measure(count, config)
    return [
        [str(count), str(TRIALS * count), f"{taken:.1f}", f"{seconds[1] / taken:.3f}"]
        for count, taken in seconds.items()
    ]


def measure_training(storage: str, folder: Path) -> list[list[str]]:
    """Return the rows of the table of trials that train; all workers do the same trials."""
    mlflow.set_tracking_uri(uri := f"sqlite:///{folder}/mlflow.db")
    os.environ["MLFLOW_TRACKING_URI"] = uri  # for the workers
    config = SearchConfig(
        data="demo", storage=storage, pruner="none", sampler="random", n_trials=TRIALS, epochs=2,
        image_size=64, checkpoint_dir=folder,
    )  # fmt: skip
    cores = psutil.cpu_count(logical=False) or 1
    with open_run("coordination") as run:
        seconds = {count: measure(count, config, run.run_id) for count in (1, cores)}
    return [
        [str(count), str(TRIALS), f"{taken:.1f}", f"{seconds[1] / taken / count:.3f}"]
        for count, taken in seconds.items()
    ]


def main() -> None:
    """Measure and keep the tables."""
    with tempfile.TemporaryDirectory() as folder:
        storage = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{Path(folder)}/optuna.db"
        tables = [
            format_table(["workers", "trials", "seconds", "share of linear"], rows)
            for rows in (measure_waiting(storage), measure_training(storage, Path(folder)))
        ]
    kind = storage.partition(":")[0]
    text = (
        f"{kind}; trials that wait, {EPOCHS} epochs of {EPOCH_S} s each\n\n{tables[0]}\n\n"
        f"trials that train, 2 epochs at 64 px, each on one thread\n\n{tables[1]}"
    )
    keep("coordination", text, data=kind.partition("+")[0])


if __name__ == "__main__":
    main()
