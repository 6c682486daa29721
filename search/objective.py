"""A trial: one training in a child run, judged on val, and stopped early if it is not promising."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from optuna import Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError

from search.config import SearchConfig
from search.space import BASELINES, build_space, suggest
from search.study import get_study_id
from skin_resnet.errors import UserError
from skin_resnet.tracking.history import STUDY, TRIAL
from skin_resnet.tracking.run import TrackedRun, open_run
from skin_resnet.tracking.store import OUTAGES, describe_uri
from skin_resnet.training import interrupts
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.run import run_training

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_RETRY_S = 3.0
_ENDED = (TrialPruned, UpdateFinishedTrialError)  # the trial, not by a failure
_OUTAGE_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


class TrialFailed(Exception):  # noqa: N818 (like TrialPruned)
    """A trial's training failed: the trial counts, and the search continues."""


def run_trial(trial: Trial, config: SearchConfig, parent_run_id: str) -> tuple[float, ...]:
    """Train with what a trial suggests, in a child of the search's run; return its objectives.

    Raises:
        TrialPruned: The pruner stopped it.
        UpdateFinishedTrialError: Its heartbeats did not arrive: others count it as killed, and run it again.
        TrialFailed: The training failed, or its best epoch has no finite values.
        UserError: Its run could not be opened: the trial does not count, and is run again.
    """
    try:
        best = _train(trial, config, parent_run_id)
        values = tuple(read_objective(name, best) for name in config.objective_names)
        if not all(map(math.isfinite, values)):
            raise UserError(f"the best epoch has the objectives {values}, which are not finite")
    except _ENDED:
        raise
    except Exception as error:
        if "run_id" not in trial.user_attrs:
            raise
        # A trial that failed without a reason was killed, and is run again.
        trial.set_user_attr("failure", f"{type(error).__name__}: {error}"[:2000])
        raise TrialFailed from error
    trial.set_user_attr("val/balanced_accuracy", best.val.balanced_accuracy)
    trial.set_user_attr("best_epoch", best.epoch)
    trial.set_user_attr("gap", best.gap)
    if config.max_gap > 0:
        trial.set_constraint("gap", best.gap - config.max_gap)
    return values


def _train(trial: Trial, config: SearchConfig, parent_run_id: str) -> EpochResult:
    baseline = trial.user_attrs.get("baseline")
    changes = suggest(build_space(config), trial)
    # A baseline trains with exactly its options; what it suggests is its nearest place in the space.
    recipe = config.training.with_changes(**(BASELINES[baseline] if baseline else changes))
    trial.set_user_attr("config", recipe.model_dump_json())
    name = f"trial {trial.number} · {baseline or f'{recipe.optimizer} {recipe.lr:.2g}'}"
    tags = {STUDY: get_study_id(trial.study), TRIAL: str(trial.number)}
    with ExitStack() as stack:
        run = enter_child(stack, name, parent_run_id=parent_run_id, tags=tags, pruned=_ENDED)
        trial.set_user_attr("run_id", run.run_id)
        on_epoch = partial(_report, trial, config)
        return run_training(recipe, tracker=PatientTracker(run), on_epoch=on_epoch).best


def _report(trial: Trial, config: SearchConfig, result: EpochResult) -> None:
    """Report an epoch to Optuna, which may prune the trial."""
    interrupts.check()
    trial.set_user_attr("epochs", result.epoch)
    first, *others = config.objective_names
    value = read_objective(first, result)
    if others or not math.isfinite(value):
        return
    trial.report(value, result.epoch)
    # The baselines are what all else is compared with: they always run to their end.
    can_be_pruned = first != "gap" and "baseline" not in trial.user_attrs
    if can_be_pruned and result.epoch < config.epochs and trial.should_prune():
        raise TrialPruned(f"pruned after epoch {result.epoch} of {config.epochs}")


def read_objective(name: str, result: EpochResult) -> float:
    """Return an epoch's value of an objective."""
    value: float = result.gap if name == "gap" else getattr(result.val, name.removeprefix("val_"))
    return value


def enter_child(stack: ExitStack, name: str, **options: Any) -> TrackedRun:
    """Open a child run, with the options of `open_run`, as soon as the tracking server is there."""
    return wait_for_server(lambda: stack.enter_context(open_run(name, **options)))


class PatientTracker:
    """Tracks a training in a run, and waits at its start and end for a tracking server that is away."""

    def __init__(self, run: TrackedRun) -> None:
        self.run_id = run.run_id
        self.on_epoch = run.on_epoch  # while the server is away, the run buffers the epoch
        self.on_start = lambda start: wait_for_server(lambda: run.on_start(start))
        self.on_end = lambda result: wait_for_server(lambda: run.on_end(result))


def wait_for_server(call: Callable[[], T]) -> T:
    """Return what a call to MLflow returns; while the tracking server is away, wait and call again."""
    is_logged = False
    while True:
        try:
            return call()
        except (UserError, *OUTAGES) as error:
            if not is_outage(error):
                raise
            if not is_logged:
                _logger.warning("MLflow unreachable at %s; retrying", describe_uri())
            is_logged = True
        interrupts.check()
        time.sleep(_RETRY_S)


def is_outage(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, says that the tracking server is away for now."""
    if isinstance(error, OUTAGES):
        # MLflow's own errors have a code; one about the request itself would only come again.
        return getattr(error, "error_code", _OUTAGE_CODES[0]) in _OUTAGE_CODES
    return error is not None and is_outage(error.__context__)
