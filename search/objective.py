"""A trial: one training in a child run, judged on val, and stopped early if it is not promising."""

import gc
import math
from collections.abc import Callable

import torch
from optuna import Trial, TrialPruned

from search.config import SearchConfig
from search.outages import NotTrackedError, open_child
from search.space import BASELINES, build_space
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.tracking.history import STUDY, TRIAL
from skin_resnet.training.device import is_out_of_memory
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.run import TrainResult, run_training

Train = Callable[..., TrainResult]  # `run_training`, or what tests put in its place


class TrialFailed(Exception):  # noqa: N818 (like TrialPruned)
    """A trial's training failed: the trial counts, and the search continues."""


class Objective:
    """What Optuna calls for each trial.

    Args:
        config: The search's.
        study_id: Tag of the child runs.
        parent_run_id: The search's run.
        check_alive: Called after each epoch; what it raises interrupts the trial, which is then run again.
        train: Trains a config.
    """

    def __init__(
        self,
        config: SearchConfig,
        study_id: str,
        parent_run_id: str,
        check_alive: Callable[[], None] = lambda: None,
        train: Train = run_training,
    ) -> None:
        self._config = config
        self._training = config.training
        self._space = build_space(config)
        self._study_id = study_id
        self._parent_run_id = parent_run_id
        self._check_alive = check_alive
        self._train = train

    def __call__(self, trial: Trial) -> float | tuple[float, ...]:
        """Train with what the trial suggests; return its values.

        Raises:
            TrialPruned: The pruner stopped it.
            TrialFailed: The training failed, or its best epoch has no finite values.
            NotTrackedError: Its run could not be opened; the trial does not count.
        """
        try:
            best = self._train_with_less_memory(trial, self._choose(trial))
            values = tuple(read_objective(name, best) for name in self._config.objective_names)
            if not all(map(math.isfinite, values)):
                raise UserError(f"the best epoch has the objectives {values}, which are not finite")
        except (TrialPruned, NotTrackedError):
            raise
        except Exception as error:
            # A trial that failed without a reason was killed, and is run again.
            trial.set_user_attr("failure", f"{type(error).__name__}: {error}"[:2000])
            raise TrialFailed from error
        trial.set_user_attr("val/balanced_accuracy", best.val.balanced_accuracy)
        trial.set_user_attr("best_epoch", best.epoch)
        trial.set_user_attr("gap", best.gap)
        if self._config.max_gap > 0:
            trial.set_constraint("gap", best.gap - self._config.max_gap)
        return values if len(values) > 1 else values[0]

    def _choose(self, trial: Trial) -> TrainConfig:
        changes = self._space.suggest(trial)
        # A baseline trains with exactly its options; what it suggests is its nearest place in the space.
        baseline = trial.user_attrs.get("baseline")
        config = self._training.with_changes(**(changes if baseline is None else BASELINES[baseline]))
        trial.set_user_attr("config", config.model_dump_json())
        return config

    def _train_with_less_memory(self, trial: Trial, config: TrainConfig) -> EpochResult:
        """Train; if memory runs out, once more with half the batch size, in a child run of its own."""
        on_epoch = self._build_on_epoch(trial)
        try:
            return self._train_in_child(trial, config, on_epoch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or config.batch_size < 4:
                raise
        # Here and not above: while an exception is handled, its frames keep the network alive.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = config.with_changes(batch_size=config.batch_size // 2)
        trial.set_user_attr("config", smaller.model_dump_json())
        return self._train_in_child(trial, smaller, on_epoch)

    def _train_in_child(
        self, trial: Trial, config: TrainConfig, on_epoch: Callable[[EpochResult], None]
    ) -> EpochResult:
        name = ", ".join(filter(None, (f"trial {trial.number}", trial.user_attrs.get("baseline"))))
        tags = {STUDY: self._study_id, TRIAL: str(trial.number)}
        with open_child(
            name, self._parent_run_id, tags, pruned=(TrialPruned,), check_alive=self._check_alive
        ) as (run, tracker):
            trial.set_user_attr("run_id", run.run_id)
            return self._train(config, tracker=tracker, on_epoch=on_epoch).best

    def _build_on_epoch(self, trial: Trial) -> Callable[[EpochResult], None]:
        names = self._config.objective_names
        # The baselines are what all else is compared with: they always run to their end.
        can_be_pruned = len(names) == 1 and names[0] != "gap" and "baseline" not in trial.user_attrs
        reported: set[int] = set()

        def report(result: EpochResult) -> None:
            self._check_alive()
            trial.set_user_attr("epochs", result.epoch)
            if len(names) > 1 or result.epoch in reported:
                return
            value = read_objective(names[0], result)
            if math.isfinite(value):
                reported.add(result.epoch)
                trial.report(value, result.epoch)
            if can_be_pruned and result.epoch < self._training.epochs and trial.should_prune():
                raise TrialPruned(f"pruned after epoch {result.epoch} of {self._training.epochs}")

        return report


def read_objective(name: str, result: EpochResult) -> float:
    """Return an epoch's value of an objective."""
    value: float = result.gap if name == "gap" else getattr(result.val, name.removeprefix("val_"))
    return value
