"""The study: its trials, who may begin one, and what becomes of those whose process was killed."""

import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import optuna
from optuna import Study, Trial
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from search.config import DIRECTIONS, SearchConfig
from search.objective import Objective
from search.space import BASELINES, build_space
from search.storage import lock, open_storage, try_lock
from search.trials import drop_retried, find_to_retry, get_history, has_state
from skin_resnet.errors import UserError
from skin_resnet.tracking import search_runs

CLAIM = "claim"  # the lock that is held while a trial is chosen
# Options that a resumed study may be given anew: they change where and how much is trained, not what.
_MAY_CHANGE = {
    "n_trials", "workers", "seeds", "storage", "sampler", "pruner", "heartbeat_s", "model_name", "test",
    "device", "precision", "checkpoint_dir", "checkpoint_minutes", "cache_dir",
}  # fmt: skip


def open_study(config: SearchConfig) -> tuple[Study, RDBStorage]:
    """Open the study of a config, or begin it with its two baselines queued.

    Raises:
        UserError: The storage cannot be used, or a study of this name asks for something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = build_space(config)
    storage = open_storage(config.storage, config.heartbeat_s)
    with lock(config.storage, CLAIM):
        study = optuna.create_study(
            storage=storage,
            study_name=config.study_name,
            directions=[DIRECTIONS[name] for name in config.objective_names],
            load_if_exists=True,
        )
        asked = {name: text for name, text in config.to_params().items() if name not in _MAY_CHANGE}
        before = study.user_attrs.get("asked", asked)
        for name, text in asked.items():
            if before.get(name, text) != text:
                raise UserError(
                    f"study_name: {config.study_name!r} was begun with {name}={before[name]}, but got "
                    f"{name}={text}; give another name, or the same options."
                )
        if "id" not in study.user_attrs:
            study.set_user_attr("asked", asked)
            study.set_user_attr("id", uuid.uuid4().hex)
        known = {trial.user_attrs.get("baseline") for trial in study.get_trials(deepcopy=False)}
        for name, changes in BASELINES.items():
            if name not in known:
                place = space.locate(config.training.with_changes(**changes))
                study.enqueue_trial(place, user_attrs={"baseline": name})
    return study, storage


def work(config: SearchConfig, objective: Objective, check_alive: Callable[[], None] = lambda: None) -> None:
    """Run trials until the study has `n_trials` and none is left unfinished by anyone.

    Args:
        config: The search's.
        objective: Trains a trial.
        check_alive: What it raises ends the work.
    """
    study, storage = open_study(config)
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
                _run_one(study, storage, objective, claim)
                continue
        if not has_state(trials, TrialState.RUNNING):
            return
        time.sleep(min(2.0, config.heartbeat_s / 2))  # whoever runs the last ones may be killed


def _run_one(study: Study, storage: RDBStorage, objective: Objective, claim: ExitStack) -> None:
    """Choose a trial, let go of the claim, and run it."""

    def run(trial: Trial) -> float | tuple[float, ...]:
        # From here on, a missing heartbeat tells that it was killed; before, the missing mark does.
        storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("claimed", True)
        claim.close()
        return objective(trial)

    study.optimize(run, n_trials=1, catch=(Exception,))


def requeue_killed(study: Study) -> int:
    """Queue each trial whose process was killed or interrupted once more; give how many. Needs the claim."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "claimed" not in trial.user_attrs:
            study.tell(trial.number, state=TrialState.FAIL)
    killed = find_to_retry(study.get_trials(deepcopy=False))
    for trial in killed:
        history = [*get_history(trial), trial.number]
        study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={k: v for k, v in trial.user_attrs.items() if k == "baseline"},
                # As Optuna's own retry callback names them.
                system_attrs={**trial.system_attrs, "failed_trial": history[0], "retry_history": history},
            )
        )
    return len(killed)


def close_killed_runs(config: SearchConfig, study: Study) -> list[str]:
    """End the MLflow runs of killed trials and of killed searches as KILLED; give their ids."""
    trials = study.get_trials(deepcopy=False)

    def is_alive(run_id: str, tags: dict[str, str]) -> bool:
        if search_runs.TRIAL in tags:
            trial = trials[int(tags[search_runs.TRIAL])]
            return trial.state == TrialState.RUNNING and trial.user_attrs.get("run_id", run_id) == run_id
        with try_lock(config.storage, name_session(tags.get("mlflow.parentRunId", run_id))) as is_free:
            return not is_free

    return search_runs.close_killed(study.user_attrs["id"], is_alive)


def name_session(run_id: str) -> str:
    """Name the lock that a search holds for as long as its process lives."""
    return f"session-{run_id}"


def build_sampler(config: SearchConfig, trials_so_far: int) -> BaseSampler:
    """Build the sampler for one trial: its seed counts trials, so that a resumed study replays no draws."""
    seed = int(np.random.SeedSequence((config.seed, trials_so_far)).generate_state(1)[0])
    # Optuna's 10, but never more than a third of a short study at random.
    startup = min(10, max(3, config.n_trials // 3))
    if config.sampler == "random":
        return RandomSampler(seed=seed)
    if config.sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup)
    return TPESampler(seed=seed, n_startup_trials=startup)


def build_pruner(config: SearchConfig) -> BasePruner:
    """Build the pruner; none stops a trial in its first epoch."""
    first = max(2, config.epochs // 8)
    if config.pruner == "median":
        return MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, config.epochs // 4))
    if config.pruner == "hyperband":
        return HyperbandPruner(min_resource=first, max_resource=max(first, config.epochs))
    if config.pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=first)
    return NopPruner()
