"""Worker processes: started, watched, replaced where one is killed, and ended with the search."""

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess

import torch
from optuna import Study

from search.config import SearchConfig
from search.objective import Objective
from search.study import work
from search.trials import MAX_RETRIES, count_done, summarize
from skin_resnet.tracking import search_runs
from skin_resnet.training import interrupts

_POLL_S = 1.0
_END_S = 30.0  # to end a trial's run in MLflow after an interrupt
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def run_workers(config: SearchConfig, study: Study, parent_run_id: str) -> None:
    """Run the study's trials in `config.workers` processes, and log progress on the parent run.

    Raises:
        RuntimeError: The workers ended before the study did.
    """
    processes: list[BaseProcess] = []
    begin, begun_with = time.monotonic(), count_done(study.get_trials(deepcopy=False))
    logged = -1
    # A trial that kills its process each time may kill so many before it is given up.
    restarts = most = (MAX_RETRIES + 1) * config.workers
    try:
        for _ in range(config.workers):
            _start(config, study, parent_run_id, processes)
        while any(process.is_alive() or (_was_killed(process) and restarts) for process in processes):
            time.sleep(_POLL_S)
            interrupts.check()  # Python may have dropped what the signal raised
            trials = study.get_trials(deepcopy=False)
            if count_done(trials) != logged:
                logged, restarts = count_done(trials), most
                figures = summarize(config, trials)
                if logged > begun_with:
                    pace_s = (time.monotonic() - begin) / (logged - begun_with)
                    figures["search/eta_s"] = pace_s * max(0, config.n_trials - logged)
                search_runs.log_progress(parent_run_id, figures, logged)
            for process in list(filter(_was_killed, processes))[:restarts]:
                restarts -= 1
                processes.remove(process)
                _start(config, study, parent_run_id, processes)
    except BaseException:
        _end(processes)
        raise
    left = config.n_trials - count_done(study.get_trials(deepcopy=False))
    if left > 0:
        raise RuntimeError(f"all workers ended with {left} trials left; the same command goes on with them")


def _was_killed(process: BaseProcess) -> bool:
    return process.exitcode is not None and process.exitcode < 0


def _start(config: SearchConfig, study: Study, parent_run_id: str, processes: list[BaseProcess]) -> None:
    """Start a worker and add it to `processes`; no signal comes between the two."""
    # Spawned, not forked: a fork would share the parent's database connections and its CUDA.
    process = multiprocessing.get_context("spawn").Process(
        target=_work,
        args=(config, study.user_attrs["id"], parent_run_id, search_runs.get_tracking_uri(), os.getpid()),
    )
    # The worker inherits what is blocked, and unblocks it when it knows what to do.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process.start()
        processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _work(config: SearchConfig, study_id: str, parent_run_id: str, tracking_uri: str, parent: int) -> None:
    """Do what a worker process is there for."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # or it would open the search's run as its own
    search_runs.set_tracking_uri(tracking_uri)
    if config.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))

    def check_alive() -> None:
        interrupts.check()
        if os.getppid() != parent:
            raise KeyboardInterrupt(signal.SIGTERM)  # the search was killed: so was this trial

    objective = Objective(config, study_id, parent_run_id, check_alive)
    try:
        with interrupts.handled():
            # Ctrl-C reaches all; the parent decides, and ends us.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            work(config, objective, check_alive)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGTERM) from None


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _END_S
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()
