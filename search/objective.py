"""A trial: one training in a child run, judged on val, and stopped early if it is not promising."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from optuna import Trial, TrialPruned

from search.config import SearchConfig
from search.space import BASELINES, build_space, suggest
from skin_resnet.errors import UserError
from skin_resnet.tracking.history import STUDY, TRIAL
from skin_resnet.tracking.run import TrackedRun, open_run
from skin_resnet.tracking.store import OUTAGES, describe_uri
from skin_resnet.training import interrupts
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.run import TrainResult, TrainStart, run_training

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_RETRY_S = 3.0
_OUTAGE_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


class TrialFailed(Exception):  # noqa: N818 (like TrialPruned)
    """A trial's training failed: the trial counts, and the search continues."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What Optuna calls for each trial.

    Attributes:
        study_id: Tag of the child runs.
        parent_run_id: The search's run.
        train: `run_training`, or what tests put in its place.
    """

    config: SearchConfig
    study_id: str
    parent_run_id: str
    train: Callable[..., TrainResult] = run_training

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        """Train with what the trial suggests; return its values.

        Raises:
            TrialPruned: The pruner stopped it.
            TrialFailed: The training failed, or its best epoch has no finite values.
            UserError: Its run could not be opened: the trial does not count, and is run again.
        """
        try:
            best = self._train(trial)
            values = tuple(read_objective(name, best) for name in self.config.objective_names)
            if not all(map(math.isfinite, values)):
                raise UserError(f"the best epoch has the objectives {values}, which are not finite")
        except TrialPruned:
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
        if self.config.max_gap > 0:
            trial.set_constraint("gap", best.gap - self.config.max_gap)
        return values

    def _train(self, trial: Trial) -> EpochResult:
        baseline = trial.user_attrs.get("baseline")
        changes = suggest(build_space(self.config), trial)
        # A baseline trains with exactly its options; what it suggests is its nearest place in the space.
        config = self.config.training.with_changes(**(BASELINES[baseline] if baseline else changes))
        trial.set_user_attr("config", config.model_dump_json())
        name = f"trial {trial.number} · {baseline or f'{config.optimizer} {config.lr:.2g}'}"
        tags = {STUDY: self.study_id, TRIAL: str(trial.number)}
        with open_child(name, self.parent_run_id, tags) as run:
            trial.set_user_attr("run_id", run.run_id)
            on_epoch = partial(self._report, trial)
            return self.train(config, tracker=PatientTracker(run), on_epoch=on_epoch).best

    def _report(self, trial: Trial, result: EpochResult) -> None:
        """Report an epoch to Optuna, which may prune the trial."""
        interrupts.check()
        trial.set_user_attr("epochs", result.epoch)
        first, *others = self.config.objective_names
        value = read_objective(first, result)
        if others or not math.isfinite(value):
            return
        trial.report(value, result.epoch)
        # The baselines are what all else is compared with: they always run to their end.
        can_be_pruned = first != "gap" and "baseline" not in trial.user_attrs
        if can_be_pruned and result.epoch < self.config.epochs and trial.should_prune():
            raise TrialPruned(f"pruned after epoch {result.epoch} of {self.config.epochs}")


def read_objective(name: str, result: EpochResult) -> float:
    """Return an epoch's value of an objective."""
    value: float = result.gap if name == "gap" else getattr(result.val, name.removeprefix("val_"))
    return value


@contextmanager
def open_child(
    name: str, parent_run_id: str, tags: Mapping[str, str], run_id: str | None = None
) -> Iterator[TrackedRun]:
    """Open a child run, or resume one, as `open_run` does, as soon as the tracking server is there."""
    with ExitStack() as stack:

        def enter() -> TrackedRun:
            child = open_run(
                name, run_id=run_id, parent_run_id=parent_run_id, tags=tags, pruned=(TrialPruned,)
            )
            return stack.enter_context(child)

        yield wait_for_server(enter)


class PatientTracker:
    """Tracks a training in a run, and waits at its start and end for a tracking server that is away."""

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.run_id = run, run.run_id

    def on_start(self, start: TrainStart) -> None:
        """Record the start."""
        wait_for_server(lambda: self.run.on_start(start))

    def on_epoch(self, result: EpochResult) -> None:
        """Record an epoch; the run buffers it while the server is away."""
        self.run.on_epoch(result)

    def on_end(self, result: TrainResult) -> None:
        """Record the best epoch."""
        wait_for_server(lambda: self.run.on_end(result))


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
