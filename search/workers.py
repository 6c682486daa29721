"""Workers: the loop in which each runs trials, and their processes, which are watched and replaced."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout, suppress
from multiprocessing.process import BaseProcess
from typing import cast

import torch
from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from search.config import SearchConfig
from search.objective import TrialFailed, run_trial
from search.report import TrialProgress, describe_progress
from search.study import (
    CLAIM,
    MAX_RETRIES,
    build_pruner,
    build_sampler,
    choose_best,
    drop_retried,
    get_study_id,
    list_ended,
    lock,
    open_study,
    report_storage_errors,
    requeue_killed,
)
from skin_resnet.errors import UserError
from skin_resnet.tracking.history import TRIAL, close_abandoned, close_killed
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.tracking.store import OUTAGES
from skin_resnet.training import interrupts
from skin_resnet.training.checkpoint import clean_up_killed

_POLL_S = 1.0
_END_S = 30.0  # for a worker to end its trial's run after an interrupt


def run_workers(config: SearchConfig, study: Study, run: TrackedRun) -> None:
    """Run `config.workers` processes until the study is done; replace those that are killed.

    Raises:
        UserError: The workers ended before the study was done.
    """
    processes: list[BaseProcess] = []
    done = -1
    progress = TrialProgress(config, study)
    # Enough for a trial that kills its process at each attempt until it is given up.
    restarts = most = (MAX_RETRIES + 1) * config.workers
    try:
        with interrupts.deferred():  # no signal comes between the start of a worker and its place in the list
            for number in range(config.workers):
                processes.append(_start(config, run.run_id, number))
            while any(process.is_alive() for process in processes):
                time.sleep(_POLL_S)
                interrupts.check()
                if (ended := progress.show()) > done:
                    done, restarts = ended, most
                    with suppress(*OUTAGES):  # the next time makes up for it
                        log_progress(config, study, run, progress.estimate_left_s())
                for number, process in enumerate(processes):
                    if (process.exitcode or 0) < 0 and restarts:  # it was killed
                        restarts -= 1
                        processes[number] = _start(config, run.run_id, number)
    finally:
        _end(processes)
    if (left := config.n_trials - progress.show()) > 0:
        trials = f"{left} trial{'s' * (left > 1)}"
        raise UserError(f"all workers exited with {trials} left; repeat the command to run them")


def log_progress(config: SearchConfig, study: Study, run: TrackedRun, left_s: float) -> None:
    """Log a study's progress on the search's run: metrics by number of ended trials, a description."""
    metrics = {"search_eta_s": left_s}
    if best := choose_best(config, study):
        for name, value in zip(config.objective_names, best.values, strict=True):
            metrics[f"search_best_{name}"] = value  # no slash: MLflow shows it after the curves of the trials
    run.log_metrics(metrics, step=len(list_ended(study.get_trials(deepcopy=False))))
    run.describe(describe_progress(config, study, run.run_id, left_s))


def _start(config: SearchConfig, parent_run_id: str, number: int) -> BaseProcess:
    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    device = assign_device(number, os.environ, count)
    # Spawned, not forked: a fork would share the parent's database connections and its CUDA.
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(config, parent_run_id, device))
    # Ctrl-C and Slurm's signals reach all processes; the search decides, and ends its workers, which inherit
    # the block, as does multiprocessing's resource tracker, which they would kill.
    blocked = set(interrupts.NUMBERS) - {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    return process


def assign_device(number: int, environment: Mapping[str, str], count: int) -> dict[str, str]:
    """Return what a worker's environment needs so that it sees one of `count` GPUs, its own if possible."""
    if count == 0:
        return {}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    visible = [each.strip() for each in named.split(",")] if named else [str(i) for i in range(count)]
    return {"CUDA_VISIBLE_DEVICES": visible[number % count]}


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _END_S
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.join()


def _work(config: SearchConfig, parent_run_id: str, environment: Mapping[str, str]) -> None:
    """Run in a worker process."""
    os.environ.update(environment)  # CUDA reads it when it is first used
    os.environ.pop("MLFLOW_RUN_ID", None)  # or it would open the search's run as its own
    if config.workers > 1:
        os.environ["TQDM_DISABLE"] = "1"  # the bars of several would overwrite each other
    if config.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    try:
        # The search itself shows how far the trials are.
        with (
            open(os.devnull, "w") as null,
            redirect_stdout(null),
            interrupts.handled(repeats_after_s=_END_S),
            report_storage_errors(config),
        ):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            threading.Thread(target=_end_with_search, daemon=True).start()
            work(config, parent_run_id)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGTERM) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _end_with_search() -> None:
    search = multiprocessing.parent_process()
    assert search is not None, "this is a worker"
    search.join()
    os.kill(os.getpid(), signal.SIGTERM)


def work(config: SearchConfig, parent_run_id: str) -> None:
    """Run trials until the study has `n_trials`, and no process is still at one."""
    study = open_study(config)
    gc.freeze()  # or the collection after each trial would visit all that was imported, for half a second
    while True:
        with ExitStack() as claim:
            claim.enter_context(lock(config.storage, CLAIM))
            interrupts.check()
            if requeue_killed(study):
                close_killed_runs(config, study)
            trials = study.get_trials(deepcopy=False)
            states = {trial.state for trial in trials}
            if TrialState.WAITING in states or len(drop_retried(trials)) < config.n_trials:
                study.sampler = build_sampler(config, len(trials))
                study.pruner = build_pruner(config)
                _run_one(study, claim, config, parent_run_id)
                continue
        if TrialState.RUNNING not in states:
            return
        time.sleep(0.5)  # the processes at the last trials may be killed


def _run_one(study: Study, claim: ExitStack, config: SearchConfig, parent_run_id: str) -> None:
    """Choose a trial, release the claim, and run it."""
    taken = False

    def run(trial: Trial) -> tuple[float, ...]:
        # From here on, missing heartbeats show that it was killed; until here, that it is not marked.
        cast(RDBStorage, trial.storage).record_heartbeat(trial._trial_id)
        trial.set_user_attr("claimed", True)
        claim.close()
        try:
            return run_trial(trial, config, parent_run_id)
        except UpdateFinishedTrialError:
            nonlocal taken
            taken = True
            raise

    try:
        # What a failed trial leaves in the GPU's memory is collected before the next one.
        study.optimize(run, n_trials=1, catch=(TrialFailed,), gc_after_trial=True)
    except ValueError:  # Optuna's, where it tries to end that trial
        if not taken:
            raise


def close_killed_runs(config: SearchConfig, study: Study) -> list[str]:
    """End the MLflow runs of killed trials and killed searches as KILLED, without weights; return their ids.

    While the tracking server is away, nothing is closed: every search does this again at its end.
    """
    trials = study.get_trials(deepcopy=False)

    def is_alive(run_id: str, tags: dict[str, str]) -> bool:
        if TRIAL in tags:
            trial = trials[int(tags[TRIAL])]
            return trial.state == TrialState.RUNNING and trial.user_attrs.get("run_id", run_id) == run_id
        session = name_session(tags.get("mlflow.parentRunId", run_id))
        with lock(config.storage, session, wait=False) as is_free:
            return not is_free

    try:
        closed = close_killed(get_study_id(study), is_alive)
    except OUTAGES:
        return []
    clean_up_killed(config.checkpoint_dir.expanduser(), close_abandoned)
    return closed


def name_session(run_id: str) -> str:
    """Return the name of the lock that a search holds as long as its process lives."""
    return f"session-{run_id}"
