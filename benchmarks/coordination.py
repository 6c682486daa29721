"""What workers lose to each other: `python -m benchmarks.coordination [STORAGE]`.

Trials that only wait, and report a value each epoch as a training does, for 1, 2, 4 and 8 workers on one
study. Without loss, any number of workers takes as long as one does for its share of the trials. The storage
is one for Optuna, `postgresql+psycopg://...` for instance; without it, a SQLite file.
"""

import multiprocessing
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from optuna import Trial, TrialPruned

from benchmarks.results import keep
from search import workers
from search.config import SearchConfig
from search.study import list_ended, open_study
from skin_resnet.evaluation.page import format_table

TRIALS = 8  # of each worker
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


def run_worker(config: SearchConfig, start: Barrier) -> None:
    """Run trials as a worker of a search does, once all workers are there."""
    workers.run_trial = wait
    open_study(config)
    start.wait()
    workers.work(config, "none")


def measure(count: int, storage: str) -> float:
    """Return the seconds that `count` workers take for `TRIALS` trials each."""
    config = SearchConfig(
        data="demo", storage=storage, study_name=f"coordination {count} {time.time()}", pruner="none",
        n_trials=TRIALS * count, epochs=EPOCHS,
    )  # fmt: skip
    study = open_study(config)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(count + 1)
    processes = [context.Process(target=run_worker, args=(config, start)) for _ in range(count)]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - began
    assert len(list_ended(study.get_trials())) == config.n_trials
    return seconds


def main() -> None:
    """Measure and keep the table."""
    with tempfile.TemporaryDirectory() as folder:
        storage = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{Path(folder)}/optuna.db"
        seconds = {count: measure(count, storage) for count in (1, 2, 4, 8)}
    rows = [
        [str(count), str(TRIALS * count), f"{taken:.1f}", f"{seconds[1] / taken:.3f}"]
        for count, taken in seconds.items()
    ]
    kind = storage.partition(":")[0]
    table = format_table(["workers", "trials", "seconds", "share of linear"], rows)
    text = f"{kind}; {EPOCHS} epochs of {EPOCH_S} s a trial\n\n{table}"
    keep("coordination", text, data=kind.partition("+")[0])


if __name__ == "__main__":
    main()
