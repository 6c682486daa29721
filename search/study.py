"""The study: its storage and locks, its sampler and pruner, and what its trials say."""

import contextlib
import copy
import uuid
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
from alembic.util import CommandError
from filelock import FileLock, Timeout
from optuna import Study
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from search.config import DIRECTIONS, SearchConfig
from search.space import BASELINES, build_space, locate
from skin_resnet.errors import UserError, hide_password

CLAIM = "claim"  # the lock that is held while a trial is chosen
MAX_RETRIES = 3  # of a trial whose process was killed: it may be the trial that kills it
_MARK = "skin-resnet search"  # the user attribute that tells our studies from others
_GRACE = 4  # heartbeats that a trial may miss before it counts as killed
_LOCKED_S = 60.0  # how long to wait for a SQLite file that another process has locked
# Options that a resumed study may change: where and how much is trained, not what.
_MAY_CHANGE = {
    "n_trials", "workers", "seeds", "retrain", "study_name", "storage", "sampler", "pruner", "heartbeat_s",
    "register_as", "test", "device", "precision", "checkpoint_dir", "checkpoint_minutes", "cache_dir",
}  # fmt: skip


def open_study(config: SearchConfig) -> Study:
    """Open the study of a config, or create it with its two baselines queued.

    Raises:
        UserError: The storage cannot be used, or a study of this name is another one.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = build_space(config)
    is_sqlite = config.storage.startswith("sqlite")
    engine = {"connect_args": {"timeout": _LOCKED_S}} if is_sqlite else {"pool_pre_ping": True}
    with report_storage_errors(config, OSError, ImportError, KeyError, RuntimeError, CommandError):
        # Several processes that create the tables at once would fail.
        with lock(config.storage, "schema"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = RDBStorage(
                config.storage,
                engine_kwargs=engine,
                heartbeat_interval=config.heartbeat_s,
                grace_period=_GRACE * config.heartbeat_s,
            )
        with lock(config.storage, CLAIM):
            study = optuna.create_study(
                storage=storage,
                study_name=config.study,
                directions=[DIRECTIONS[name] for name in config.objective_names],
                load_if_exists=True,
            )
            _check_study(config, study)
            known = {trial.user_attrs.get("baseline") for trial in study.get_trials(deepcopy=False)}
            for name, changes in BASELINES.items():
                if name not in known:
                    params = locate(space, config.training.with_changes(**changes))
                    study.enqueue_trial(params, user_attrs={"baseline": name})
    return study


@contextlib.contextmanager
def report_storage_errors(config: SearchConfig, *more: type[Exception]) -> Iterator[None]:
    """Turn errors of the storage in this block, and `more`, into a `UserError`."""
    errors: tuple[type[Exception], ...] = (StorageInternalError, SQLAlchemyError, *more)
    try:
        yield
    except errors as error:
        # Optuna hides the database's own words in the cause.
        reason = " ".join(str(error.__cause__ or error).split("\n[SQL")[0].split())[:300]
        raise UserError(
            f"storage: cannot use {hide_password(config.storage)} ({reason}); check storage, then repeat "
            "the command to continue"
        ) from None


def _check_study(config: SearchConfig, study: Study) -> None:
    """Mark a new study as ours; compare an old one's options with the config's."""
    options = {name: text for name, text in config.to_params().items() if name not in _MAY_CHANGE}
    directions = [direction.name.lower() for direction in study.directions]
    is_new = not study.user_attrs and not study.get_trials(deepcopy=False)
    if is_new and directions == [DIRECTIONS[name] for name in config.objective_names]:
        study.set_user_attr(_MARK, {"id": uuid.uuid4().hex, "options": options})
    elif _MARK not in study.user_attrs:
        raise UserError(
            f"study_name: {config.study!r} in {hide_password(config.storage)} was not created by "
            "skin-resnet search; choose another study_name"
        )
    before = study.user_attrs[_MARK]["options"]
    for name, text in options.items():
        if before.get(name, text) != text:
            raise UserError(
                f"study_name: {config.study!r} was started with {name}={before[name]}, not {text}; "
                "choose another study_name, or the same options"
            )


def get_study_id(study: Study) -> str:
    """Return the id that a study's runs are tagged with."""
    return str(study.user_attrs[_MARK]["id"])


@contextlib.contextmanager
def lock(url: str, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that all processes with this storage share; yield whether it is held.

    Without `wait` it is held only if it is free. The operating system, or PostgreSQL, releases it when the
    process dies, however it dies.
    """
    if url.startswith("sqlite"):
        folder = Path(f"{make_url(url).database}.locks")
        folder.mkdir(exist_ok=True)
        file_lock = FileLock(folder / name, blocking=wait)
        with contextlib.suppress(Timeout):
            file_lock.acquire()
        try:
            yield file_lock.is_locked
        finally:
            file_lock.release()
        return
    key = zlib.crc32(f"skin-resnet search {name}".encode())
    acquire = sqlalchemy.func.pg_advisory_lock if wait else sqlalchemy.func.pg_try_advisory_lock
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        is_held = connection.scalar(sqlalchemy.select(acquire(key)))
        yield wait or bool(is_held)  # after waiting, PostgreSQL returns nothing


def build_sampler(config: SearchConfig, trials_so_far: int) -> BaseSampler:
    """Build the sampler for one trial; its seed counts trials, so that a resumed study repeats no draws."""
    seed = int(np.random.SeedSequence((config.seed, trials_so_far)).generate_state(1)[0])
    if config.sampler == "random":
        return RandomSampler(seed=seed)
    sampler = GPSampler if config.sampler == "gp" else TPESampler
    # Optuna's 10 trials at random, but at most a third of a short study.
    return sampler(seed=seed, n_startup_trials=min(10, max(3, config.n_trials // 3)))


class PatientMedianPruner(MedianPruner):
    """Prunes a trial that is below the median in two epochs in a row: one bad epoch may be jitter.

    Optuna's `PatientPruner` waits until a trial stops improving, which under a falling learning rate it never
    does.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether to prune the trial at its last step."""
        before = sorted(trial.intermediate_values)[:-1]
        if not before or not super().prune(study, trial):
            return False
        earlier = copy.copy(trial)
        earlier.intermediate_values = {step: trial.intermediate_values[step] for step in before}
        return super().prune(study, earlier)


def build_pruner(config: SearchConfig) -> BasePruner:
    """Build the pruner; none stops a trial in its first epoch."""
    first = max(2, config.epochs // 8)
    # Earlier, a high learning rate hides what a recipe will reach: see docs/experiments.md.
    # Rounded up, so that halving's second cut, after four times as many epochs, is never reached.
    quarter = max(3, -(-config.epochs // 4))
    pruners: dict[str, BasePruner] = {
        "halving": SuccessiveHalvingPruner(min_resource=quarter),
        "median": PatientMedianPruner(n_startup_trials=4, n_warmup_steps=max(1, config.epochs // 2)),
        "hyperband": HyperbandPruner(min_resource=first, max_resource=max(first, config.epochs)),
        "none": NopPruner(),
    }
    return pruners[config.pruner]


def drop_retried(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return each trial once, however often it was run again."""
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    return [trial for trial in trials if trial.number not in retried]


def find_to_retry(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials to run again: killed, or ended before they began to train.

    Baselines always; others unless they were killed in training more than `MAX_RETRIES` times.
    """

    def count_kills(trial: FrozenTrial) -> int:
        attempts = [*trial.system_attrs.get("retry_history", []), trial.number]
        return sum("run_id" in trials[number].user_attrs for number in attempts)

    return [
        trial
        for trial in drop_retried(trials)
        if trial.state == TrialState.FAIL
        and "failure" not in trial.user_attrs  # a trial that failed by itself says why
        and ("baseline" in trial.user_attrs or count_kills(trial) <= MAX_RETRIES)
    ]


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
    killed = find_to_retry(study.get_trials())
    for trial in killed:
        trial.user_attrs = {key: v for key, v in trial.user_attrs.items() if key == "baseline"}
        retry(study, trial)
    return len(killed)


def list_ended(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that have ended for good, each once."""
    killed = {trial.number for trial in find_to_retry(trials)}
    return [t for t in drop_retried(trials) if t.state.is_finished() and t.number not in killed]


def find_front(config: SearchConfig, study: Study) -> list[FrozenTrial]:
    """Return the Pareto front within `max_gap`, the best by the first objective first.

    Of a single objective that is the best trial, and those that equal it.
    """
    signs = [-1 if DIRECTIONS[name] == "maximize" else 1 for name in config.objective_names]
    return sorted(
        study.best_trials,
        key=lambda trial: (*(s * v for s, v in zip(signs, trial.values, strict=True)), trial.number),
    )


def choose_best(config: SearchConfig, study: Study) -> FrozenTrial | None:
    """Return the first trial of the front, or the one nearest to `max_gap` where none keeps to it."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    nearest = min(complete, key=lambda trial: trial.user_attrs["gap"], default=None)
    return next(iter(find_front(config, study)), nearest)
