"""Worker processes: started, watched, replaced where one is killed, and ended with the search."""

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NoReturn

import torch
from optuna import Study

from search.config import SearchConfig
from search.objective import Objective
from search.study import work
from search.trials import MAX_RETRIES, count_done, summarize
from skin_resnet.tracking import search_runs

_POLL_S = 1.0
_END_S = 30.0  # to end a trial's run in MLflow after an interrupt


def run_workers(config: SearchConfig, study: Study, parent_run_id: str) -> None:
    """Run the study's trials in `config.workers` processes, and log progress on the parent run.

    Raises:
        RuntimeError: The workers ended before the study did.
    """
    processes = [_start(config, study, parent_run_id) for _ in range(config.workers)]
    restarts = MAX_RETRIES * config.workers
    begin, begun_with = time.monotonic(), count_done(study.get_trials(deepcopy=False))
    logged = -1
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL_S)
            for place, process in enumerate(processes):
                if process.exitcode is not None and process.exitcode < 0 and restarts:
                    restarts -= 1
                    processes[place] = _start(config, study, parent_run_id)
            trials = study.get_trials(deepcopy=False)
            if count_done(trials) != logged:
                logged = count_done(trials)
                pace_s = (time.monotonic() - begin) / max(1, logged - begun_with)
                figures = summarize(config, trials) | {"search/eta_s": pace_s * (config.n_trials - logged)}
                search_runs.log_progress(parent_run_id, figures, logged)
    except BaseException:
        _end(processes)
        raise
    left = config.n_trials - count_done(study.get_trials(deepcopy=False))
    if left > 0:
        raise RuntimeError(f"all workers ended with {left} trials left; the same command goes on with them")


def _start(config: SearchConfig, study: Study, parent_run_id: str) -> BaseProcess:
    # Spawned, not forked: a fork would share the parent's database connections and its CUDA.
    process = multiprocessing.get_context("spawn").Process(
        target=_work,
        args=(config, study.user_attrs["id"], parent_run_id, search_runs.get_tracking_uri(), os.getpid()),
    )
    process.start()
    return process


def _work(config: SearchConfig, study_id: str, parent_run_id: str, tracking_uri: str, parent: int) -> None:
    """Do what a worker process is there for."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # or it would open the search's run as its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides, and ends us
    signal.signal(signal.SIGTERM, _interrupt)
    search_runs.set_tracking_uri(tracking_uri)
    if config.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))

    def check_alive() -> None:
        if os.getppid() != parent:
            raise KeyboardInterrupt(signal.SIGTERM)  # the search was killed: so was this trial

    objective = Objective(config, study_id, parent_run_id, check_alive)
    try:
        work(config, objective, check_alive)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGTERM) from None


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the ending of the run
    raise KeyboardInterrupt(number)


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _END_S
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
