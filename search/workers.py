"""Workers: the loop in which each runs trials, and their processes, which are watched and replaced."""

import copy
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from typing import cast

import optuna
import torch
from optuna import Study, Trial
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from search.config import SearchConfig
from search.objective import Objective, TrialFailed
from search.study import (
    CLAIM,
    MAX_RETRIES,
    build_pruner,
    build_sampler,
    count_done,
    drop_retried,
    find_to_retry,
    get_study_id,
    has_state,
    lock,
    open_study,
    report_storage_errors,
    summarize,
)
from skin_resnet.errors import UserError
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.tracking.store import OUTAGES
from skin_resnet.training import interrupts

_logger = logging.getLogger(__name__)
_POLL_S = 1.0
_END_S = 30.0  # for a worker to end its trial's run after an interrupt
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def work(config: SearchConfig, objective: Objective, check_alive: Callable[[], None] = lambda: None) -> None:
    """Run trials until the study has `n_trials`, and no process is still at one.

    Args:
        config: The search's.
        objective: Trains a trial.
        check_alive: Called between trials; what it raises ends the work.
    """
    study = open_study(config)
    while True:
        with ExitStack() as claim:
            claim.enter_context(lock(config.storage, CLAIM))
            check_alive()
            if requeue_killed(study):
                close_killed_runs(config, study)
            trials = study.get_trials(deepcopy=False)
            if has_state(trials, TrialState.WAITING) or len(drop_retried(trials)) < config.n_trials:
                study.sampler = build_sampler(config, len(trials))
                study.pruner = build_pruner(config)
                _run_one(study, objective, claim)
                continue
        if not has_state(trials, TrialState.RUNNING):
            return
        time.sleep(min(2.0, config.heartbeat_s / 2))  # the processes at the last trials may be killed


def _run_one(study: Study, objective: Objective, claim: ExitStack) -> None:
    """Choose a trial, release the claim, and run it."""

    def run(trial: Trial) -> float | tuple[float, ...]:
        # From here on, missing heartbeats show that it was killed; until here, that it is not marked.
        cast(RDBStorage, trial.storage).record_heartbeat(trial._trial_id)
        trial.set_user_attr("claimed", True)
        claim.close()
        return objective(trial)

    study.optimize(run, n_trials=1, catch=(TrialFailed,))


def requeue_killed(study: Study) -> int:
    """Queue each trial whose process was killed or interrupted again; return how many. Needs the claim.

    Optuna's own callback would miss the trials that were interrupted, or killed before their first heartbeat.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
        retry = RetryHeartbeatStaleTrialCallback()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "claimed" not in trial.user_attrs:
            study.tell(trial.number, state=TrialState.FAIL)
    killed = find_to_retry(study.get_trials(deepcopy=False))
    for trial in copy.deepcopy(killed):
        trial.user_attrs = {key: v for key, v in trial.user_attrs.items() if key == "baseline"}
        retry(study, trial)
    return len(killed)


def close_killed_runs(config: SearchConfig, study: Study) -> list[str]:
    """End the MLflow runs of killed trials and killed searches as KILLED; return their ids.

    While the tracking server is away, nothing is closed: every search does this again at its end.
    """
    trials = study.get_trials(deepcopy=False)

    def is_alive(run_id: str, tags: dict[str, str]) -> bool:
        if finished_runs.TRIAL in tags:
            trial = trials[int(tags[finished_runs.TRIAL])]
            return trial.state == TrialState.RUNNING and trial.user_attrs.get("run_id", run_id) == run_id
        session = name_session(tags.get("mlflow.parentRunId", run_id))
        with lock(config.storage, session, wait=False) as is_free:
            return not is_free

    try:
        return finished_runs.close_killed(get_study_id(study), is_alive)
    except OUTAGES:
        return []


def name_session(run_id: str) -> str:
    """Return the name of the lock that a search holds as long as its process lives."""
    return f"session-{run_id}"


def run_workers(config: SearchConfig, study: Study, run: TrackedRun) -> None:
    """Run the study's trials in `config.workers` processes, and log progress on the search's run.

    Raises:
        UserError: The workers ended before the study was done.
    """
    processes: dict[int, BaseProcess] = {}
    started, done_before = time.monotonic(), count_done(study.get_trials(deepcopy=False))
    logged = -1
    # A trial that kills its process each time may kill so many before it is given up.
    restarts = most = (MAX_RETRIES + 1) * config.workers
    try:
        for number in range(config.workers):
            _start(config, study, run.run_id, processes, number)
        while any(
            process.is_alive() or (_was_killed(process) and restarts) for process in processes.values()
        ):
            time.sleep(_POLL_S)
            interrupts.check()  # Python may have dropped what the signal raised
            done = count_done(study.get_trials(deepcopy=False))
            if done != logged:
                restarts = most
                pace_s = (time.monotonic() - started) / (done - done_before) if done > done_before else None
                if log_progress(config, study, run, pace_s):
                    logged = done
            for number in [number for number, each in processes.items() if _was_killed(each)][:restarts]:
                restarts -= 1
                _start(config, study, run.run_id, processes, number)
    except BaseException:
        _end([*processes.values()])
        raise
    left = config.n_trials - count_done(study.get_trials(deepcopy=False))
    if left > 0:
        raise UserError(f"all workers ended with {left} trials left; the same command continues with them")


def log_progress(config: SearchConfig, study: Study, run: TrackedRun, pace_s: float | None = None) -> bool:
    """Log a study's progress; return False if the tracking server is away: the next call makes up for it."""
    metrics = summarize(config, study)
    if pace_s is not None:
        metrics["search/eta_s"] = pace_s * max(0, config.n_trials - metrics["search/trials_done"])
    try:
        run.log_metrics(metrics, step=int(metrics["search/trials_done"]))
    except OUTAGES:
        return False
    return True


def _was_killed(process: BaseProcess) -> bool:
    return process.exitcode is not None and process.exitcode < 0


def assign_device(number: int, environment: Mapping[str, str], count: int) -> dict[str, str]:
    """Return what a worker's environment needs so that it sees one GPU only, its own if there are enough.

    Args:
        number: The worker's, from 0.
        environment: The search's own, which may name the GPUs it may use.
        count: How many GPUs the search sees.
    """
    if count == 0:
        return {}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    visible = [each.strip() for each in named.split(",")] if named else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": visible[number % count]}


def _start(
    config: SearchConfig, study: Study, parent_run_id: str, processes: dict[int, BaseProcess], number: int
) -> None:
    """Start a worker and add it to `processes`; no signal comes between the two."""
    # Spawned, not forked: a fork would share the parent's database connections and its CUDA.
    process = multiprocessing.get_context("spawn").Process(
        target=_work,
        args=(config, get_study_id(study), parent_run_id, os.getpid()),
    )
    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    # The worker inherits the blocked signals, and unblocks them when it can handle them; and its GPU, which
    # must be chosen before it imports torch.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with _changed_environment(assign_device(number, os.environ, count)):
            process.start()
        processes[number] = process
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _changed_environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    yield
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


def _work(config: SearchConfig, study_id: str, parent_run_id: str, parent: int) -> None:
    """Run in a worker process."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # or it would open the search's run as its own
    if config.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))

    def check_alive() -> None:
        interrupts.check()
        if os.getppid() != parent:
            raise KeyboardInterrupt(signal.SIGTERM)  # the search was killed, and its trials with it

    objective = Objective(config, study_id, parent_run_id, check_alive)
    try:
        with interrupts.handled(), report_storage_errors(config):
            # Ctrl-C reaches all processes; the parent decides, and ends the workers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            work(config, objective, check_alive)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGTERM) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _END_S
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()
