"""What a study's trials say: how many are over, which one leads, which were killed."""

from collections.abc import Iterable, Sequence

from optuna.trial import FrozenTrial, TrialState

from search.config import DIRECTIONS, SearchConfig

MAX_RETRIES = 3  # of a trial whose process was killed: it may be the trial that kills it


def was_killed(trial: FrozenTrial) -> bool:
    """Say whether a trial ended without an end of its own: no values, and no reason why not."""
    return trial.state == TrialState.FAIL and "failure" not in trial.user_attrs


def get_history(trial: FrozenTrial) -> list[int]:
    """Give the numbers of the killed trials whose place a trial has taken, under Optuna's name for them."""
    return list(trial.system_attrs.get("retry_history", []))


def find_retried(trials: Iterable[FrozenTrial]) -> set[int]:
    """Give the numbers of the trials that another one has taken the place of."""
    return {number for trial in trials for number in get_history(trial)}


def find_to_retry(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Give the trials that were killed and are not queued again yet, though they may be."""
    retried = find_retried(trials)
    return [
        trial
        for trial in trials
        if was_killed(trial) and trial.number not in retried and len(get_history(trial)) < MAX_RETRIES
    ]


def drop_retried(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Give each trial once, however often it was run again."""
    retried = find_retried(trials)
    return [trial for trial in trials if trial.number not in retried]


def count_done(trials: Sequence[FrozenTrial]) -> int:
    """Count the trials that are over for good, each once."""
    over = sum(trial.state.is_finished() for trial in drop_retried(trials))
    return over - len(find_to_retry(trials))


def has_state(trials: Iterable[FrozenTrial], state: TrialState) -> bool:
    """Say whether any trial is in a state."""
    return any(trial.state == state for trial in trials)


def choose_best(config: SearchConfig, trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Choose the best finished trial: within `max_gap` before any that is not, then by objective.

    Of several objectives the first decides, so the choice lies on the Pareto front.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(
        complete, key=lambda trial: (_get_excess(config, trial), *_get_costs(config, trial)), default=None
    )


def find_front(config: SearchConfig, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Give the finished trials within `max_gap` that no other one dominates, by the first objective."""
    costs = {
        trial.number: _get_costs(config, trial)
        for trial in trials
        if trial.state == TrialState.COMPLETE and is_within_gap(config, trial)
    }

    def is_dominated(own: tuple[float, ...]) -> bool:
        return any(
            other != own and all(o <= s for o, s in zip(other, own, strict=True)) for other in costs.values()
        )

    front = [trial for trial in trials if trial.number in costs and not is_dominated(costs[trial.number])]
    return sorted(front, key=lambda trial: costs[trial.number])


def is_within_gap(config: SearchConfig, trial: FrozenTrial) -> bool:
    """Say whether a finished trial keeps to `max_gap`."""
    return _get_excess(config, trial) == 0


def _get_excess(config: SearchConfig, trial: FrozenTrial) -> float:
    """Give by how much a trial's gap exceeds the limit."""
    return max(0.0, trial.user_attrs["gap"] - config.max_gap) if config.max_gap > 0 else 0.0


def _get_costs(config: SearchConfig, trial: FrozenTrial) -> tuple[float, ...]:
    """Give a trial's values, turned so that less is better."""
    named = zip(config.objective_names, trial.values, strict=True)
    return tuple(-value if DIRECTIONS[name] == "maximize" else value for name, value in named)


def find_baseline(trials: Sequence[FrozenTrial], name: str) -> FrozenTrial | None:
    """Find a baseline's finished trial."""
    named = [trial for trial in trials if trial.user_attrs.get("baseline") == name]
    return next((trial for trial in named if trial.state == TrialState.COMPLETE), None)


def summarize(config: SearchConfig, trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Give a study's progress as MLflow shows it."""
    counted = drop_retried(trials)
    figures = {
        "search/trials_done": count_done(trials),
        "search/trials_pruned": sum(trial.state == TrialState.PRUNED for trial in counted),
        "search/trials_failed": sum(trial.state == TrialState.FAIL for trial in counted)
        - len(find_to_retry(trials)),
        "search/trials_run_again": len(trials) - len(counted),
    }
    best = choose_best(config, counted)
    if best is not None:
        figures |= {f"search/best_{n}": v for n, v in zip(config.objective_names, best.values, strict=True)}
        figures["search/best_trial"] = best.number
    return {name: float(value) for name, value in figures.items()}
