"""The study's books, in real storage and a real tracking store: every trial is counted once, and ends.

What trains here is a function that makes epochs up; whole trainings are in test_search_end_to_end.py.
"""

import contextlib
import io
import itertools
import random
import signal
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlflow
import optuna
import pytest
import torch
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from search import objective
from search.config import SearchConfig
from search.objective import wait_for_server
from search.run import search
from search.space import BASELINE_RECIPE, BASELINES
from search.study import (
    MAX_RETRIES,
    build_pruner,
    build_sampler,
    choose_best,
    drop_retried,
    find_front,
    get_study_id,
    list_ended,
    lock,
    open_study,
)
from search.workers import close_killed_runs, log_progress, name_session, work
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Metrics
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.training import interrupts
from skin_resnet.training.engine import EpochResult

State = TrialState
Train = Callable[[TrainConfig], Iterable[EpochResult]]


@pytest.fixture(scope="module", autouse=True)
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("search")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    yield mlflow.create_experiment("search", artifact_location=str(folder / "artifacts"))
    mlflow.set_tracking_uri(None)


@pytest.fixture
def parent(experiment: str) -> str:
    with mlflow.start_run(experiment_id=experiment) as run:
        return run.info.run_id


def make_config(tmp_path: Path, **options: object) -> SearchConfig:
    defaults = {"storage": f"sqlite:///{tmp_path}/study.db", "n_trials": 4, "epochs": 3, "sampler": "random"}
    return SearchConfig(**{**defaults, **options})


def make_epoch(epoch: int, score: float, train_score: float = 0.9) -> EpochResult:
    train, val = (
        Metrics(loss=1 - each, accuracy=each, balanced_accuracy=each, macro_auc=each)
        for each in (train_score, score)
    )
    return EpochResult(epoch=epoch, lr=0.1, seconds=1, images_per_s=1, train=train, val=val)


def train_well(config: TrainConfig) -> list[EpochResult]:
    """Score better the smaller lr is, and the later the epoch."""
    return [make_epoch(epoch, 0.5 - config.lr + epoch / 100) for epoch in range(1, config.epochs + 1)]


def run(config: SearchConfig, parent: str, train: Train = train_well) -> list[FrozenTrial]:
    def train_epochs(config: TrainConfig, tracker: object, on_epoch: Callable[[EpochResult], None]) -> object:
        for result in train(config):
            on_epoch(result)
        return SimpleNamespace(best=result)

    with mock.patch.object(objective, "run_training", train_epochs):
        work(config, parent)
    return open_study(config).get_trials()


def begin_trial(config: SearchConfig) -> optuna.Trial:
    open_study(config)
    return optuna.load_study(study_name=config.study, storage=config.storage).ask()  # no heartbeat


def read_children(parent: str) -> dict[str, list[Run]]:
    children: dict[str, list[Run]] = {}
    for child in mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`mlflow.parentRunId` = '{parent}'",
        order_by=["attributes.start_time"],
        output_format="list",
    ):
        children.setdefault(child.data.tags["search.trial"], []).append(child)
    return children


def test_n_trials_is_the_total_also_of_a_resumed_study(tmp_path: Path, parent: str) -> None:
    config = make_config(tmp_path)
    assert [trial.state for trial in run(config, parent)] == [State.COMPLETE] * 4
    assert len(run(config, parent)) == 4
    trials = run(config.with_changes(n_trials=6), parent)
    assert [trial.state for trial in trials] == [State.COMPLETE] * 6
    children = read_children(parent)
    assert {run.info.status for (run,) in children.values()} == {"FINISHED"}
    # Without them, nobody can tell what a reproduction differs in.
    assert all("version.torch" in run.data.tags for (run,) in children.values())
    assert {trial.user_attrs["run_id"] for trial in trials} == {r.info.run_id for (r,) in children.values()}


def test_a_study_is_named_after_its_data_and_resumed_by_that_name(tmp_path: Path) -> None:
    begin_trial(make_config(tmp_path, data="/somewhere/ham10000"))
    for name in ("auto", "ham10000"):
        study = open_study(make_config(tmp_path, data="/somewhere/ham10000", study_name=name))
        assert (study.study_name, study.trials[0].state) == ("ham10000", State.RUNNING)
    assert open_study(make_config(tmp_path)).study_name == "demo"


def test_trials_0_and_1_are_the_baseline_recipe_and_the_options_as_given(tmp_path: Path, parent: str) -> None:
    config = make_config(tmp_path, lr=3e-4, fix="augment=strong")
    trials = run(config, parent)
    configs = [TrainConfig.model_validate_json(trial.user_attrs["config"]) for trial in trials]
    assert configs[0] == config.training.with_changes(**BASELINE_RECIPE)
    assert configs[1] == config.training
    assert [trial.user_attrs.get("baseline") for trial in trials[:3]] == [*BASELINES, None]
    assert {each.augment for each in configs[2:]} == {"strong"}


@pytest.mark.parametrize("sampler", ["random", "tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_resumed_study_replays_no_draws(tmp_path: Path, parent: str, sampler: str) -> None:
    config = make_config(tmp_path, sampler=sampler, n_trials=3)
    run(config, parent)
    trials = run(config.with_changes(n_trials=4), parent)
    drawn = [tuple(trial.params.values()) for trial in trials]
    assert len(set(drawn)) == 4
    again = run(make_config(tmp_path, study_name="again", sampler=sampler, n_trials=4), parent)
    assert [trial.params for trial in again] == [trial.params for trial in trials], "same seed, same study"


def test_a_pruned_trial_ends_killed_and_baselines_are_never_pruned(tmp_path: Path, parent: str) -> None:
    numbers = itertools.count()

    def train_ever_worse(config: TrainConfig) -> list[EpochResult]:
        return train_well(config.with_changes(lr=0.01 * (1 + next(numbers))))

    config = make_config(tmp_path, n_trials=7, epochs=6)
    trials = run(config, parent, train_ever_worse)
    assert [trial.state for trial in trials] == [State.COMPLETE] * 3 + [State.PRUNED] * 4
    children = read_children(parent)
    for trial in trials[4:]:
        (child,) = children[str(trial.number)]
        assert child.info.status == "KILLED"
        assert trial.user_attrs["epochs"] == max(trial.intermediate_values) < 6


def test_a_failed_trial_ends_failed_with_its_reason_and_counts(tmp_path: Path, parent: str) -> None:
    def fail(config: TrainConfig) -> list[EpochResult]:
        raise UserError("the loss must stay finite")

    trials = run(make_config(tmp_path), parent, fail)
    assert [trial.state for trial in trials] == [State.FAIL] * 4
    assert "must stay finite" in trials[2].user_attrs["failure"]
    for (child,) in read_children(parent).values():
        assert child.info.status == "FAILED"
        assert "must stay finite" in child.data.tags["failure"]


def test_an_interrupted_trial_is_run_again_and_counted_once(tmp_path: Path, parent: str) -> None:
    calls = itertools.count()

    def interrupt_third(config: TrainConfig) -> Iterator[EpochResult]:
        yield from train_well(config)
        if next(calls) == 2:
            raise KeyboardInterrupt

    config = make_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(config, parent, interrupt_third)
    assert read_children(parent)["2"][0].info.status == "KILLED"
    trials = run(config, parent, interrupt_third)
    assert [trial.state for trial in trials] == [State.COMPLETE] * 2 + [State.FAIL] + [State.COMPLETE] * 2
    assert trials[3].params == trials[2].params
    assert len(list_ended(trials)) == len(drop_retried(trials)) == 4
    assert trials[3].system_attrs["failed_trial"] == 2


def test_a_trial_whose_heartbeats_were_lost_is_run_again_and_its_worker_goes_on(
    tmp_path: Path, parent: str
) -> None:
    config, calls = make_config(tmp_path), itertools.count()

    def lose_third(recipe: TrainConfig) -> Iterator[EpochResult]:
        is_third = next(calls) == 2
        for result in train_well(recipe):
            if is_third and result.epoch == 2:
                open_study(config).tell(2, state=State.FAIL)  # as another worker does
            yield result

    trials = run(config, parent, lose_third)
    assert [trial.state for trial in trials] == [State.COMPLETE] * 2 + [State.FAIL] + [State.COMPLETE] * 2
    assert trials[3].params == trials[2].params
    assert "failure" not in trials[2].user_attrs
    assert read_children(parent)["2"][0].info.status == "KILLED"


@pytest.mark.parametrize("is_baseline", [False, True])
def test_a_trial_that_always_kills_its_process_is_given_up_unless_it_is_a_baseline(
    tmp_path: Path, parent: str, is_baseline: bool
) -> None:
    def die(config: TrainConfig) -> list[EpochResult]:
        if config.patience == 0 if is_baseline else config.augment == "strong":
            raise KeyboardInterrupt
        return train_well(config)

    config = make_config(tmp_path, patience=3, fix="augment=strong", n_trials=3)
    for _ in range(MAX_RETRIES + 1):
        with pytest.raises(KeyboardInterrupt):
            run(config, parent, die)
    if is_baseline:
        with pytest.raises(KeyboardInterrupt):
            run(config, parent, die)
        assert len(list_ended(open_study(config).trials)) == 1, "the defaults"
        return
    trials = run(config, parent, die)
    assert len(list_ended(trials)) == 3
    assert [trial.state for trial in drop_retried(trials)].count(State.COMPLETE) == 2
    assert [trial.state for trial in list_ended(open_study(config).trials)].count(State.FAIL) == 1


def test_a_process_killed_before_its_first_heartbeat_loses_no_trial(tmp_path: Path, parent: str) -> None:
    config = make_config(tmp_path)
    begin_trial(config)  # and no more was heard of it
    trials = run(config, parent)
    assert trials[0].state == State.FAIL
    assert [trial.state for trial in drop_retried(trials)] == [State.COMPLETE] * 4
    kept = [trial.user_attrs.get("baseline") for trial in drop_retried(trials)]
    assert kept == ["defaults", "baseline recipe", None, None]


def test_runs_that_nobody_works_on_are_closed_and_others_are_not(tmp_path: Path, experiment: str) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    tags = {"search.study_id": get_study_id(study)}
    client = mlflow.MlflowClient()
    dead, alive, other = (
        client.create_run(experiment, tags=each).info.run_id
        for each in (tags, tags, {"search.study_id": "x"})
    )
    dead_trial, alive_trial = (
        client.create_run(experiment, tags={**tags, "search.trial": str(number)}).info.run_id
        for number in (0, 1)
    )
    for run_id in (dead_trial, alive_trial):
        begin_trial(config).set_user_attr("run_id", run_id)
    study.tell(0, state=State.FAIL)
    with lock(config.storage, name_session(alive)):
        assert set(close_killed_runs(config, study)) == {dead, dead_trial}
        assert close_killed_runs(config, study) == []
    statuses = [
        client.get_run(run_id).info.status for run_id in (dead, dead_trial, alive, alive_trial, other)
    ]
    assert statuses == ["KILLED", "KILLED", "RUNNING", "RUNNING", "RUNNING"]


def test_a_gap_beyond_the_limit_is_no_winner(tmp_path: Path, parent: str) -> None:
    def overfit_when_fast(config: TrainConfig) -> list[EpochResult]:
        return [make_epoch(1, 0.7, 0.95) if config.grad_clip == 0 else make_epoch(1, 0.6, 0.65)]

    config = make_config(tmp_path, max_gap=0.1)
    trials = run(config, parent, overfit_when_fast)
    assert trials[0].constraints == {"gap": pytest.approx(0.15)}
    assert trials[1].constraints == {"gap": pytest.approx(-0.05)}
    assert choose_best(config, open_study(config)).number == 1
    impossible = make_config(tmp_path, max_gap=0.01, study_name="impossible")
    run(impossible, parent, overfit_when_fast)
    assert choose_best(impossible, open_study(impossible)).number == 1, "the nearest"


def test_several_objectives_give_a_pareto_front_that_holds_the_winner(tmp_path: Path, parent: str) -> None:
    numbers = itertools.count()
    scores = [(0.5, 0.9), (0.6, 0.9), (0.55, 0.6), (0.5, 0.5), (0.45, 0.5), (0.6, 0.95)]

    config = make_config(tmp_path, objectives="val_balanced_accuracy,gap", n_trials=6)
    trials = run(config, parent, lambda config: [make_epoch(1, *scores[next(numbers)])])
    assert [trial.state for trial in trials] == [State.COMPLETE] * 6
    front = [trial.number for trial in find_front(config, open_study(config))]
    assert front == [1, 2, 3]
    assert choose_best(config, open_study(config)).number == 1
    log_progress(config, open_study(config), TrackedRun(parent), 7.0)
    assert mlflow.get_run(parent).data.metrics == {
        "search_best_val_balanced_accuracy": 0.6, "search_best_gap": pytest.approx(0.3), "search_eta_s": 7,
    }  # fmt: skip


def test_a_study_is_not_continued_with_other_options_and_the_run_says_why(tmp_path: Path) -> None:
    open_study(make_config(tmp_path))
    open_study(make_config(tmp_path, n_trials=9, workers=2, pruner="none", device="cpu"))
    with pytest.raises(UserError, match=r"^study_name: [^\n]+$"):
        search(make_config(tmp_path, lr=0.1))
    refused = mlflow.search_runs(experiment_ids=["0"], output_format="list")[0]
    assert refused.info.status == "FAILED"
    assert "lr=0.0005, not 0.1" in refused.data.tags["failure"]
    assert refused.data.params["lr"] == "0.1"


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("UPDATE alembic_version SET version_num = 'v9.9.9'", "optuna"),
        ("DELETE FROM alembic_version; UPDATE version_info SET schema_version = 1", "optuna"),
        ("ALTER TABLE studies RENAME COLUMN study_name TO name", "study_name"),
        ("BEGIN EXCLUSIVE", "locked"),
        ("DROP TABLE studies", "not exist"),  # Optuna creates the other tables anew
    ],
)
def test_a_database_that_cannot_be_used_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str, reason: str
) -> None:
    monkeypatch.setattr("search.study._LOCKED_S", 0.1)
    config = make_config(tmp_path)
    open_study(config)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as other:
        other.executescript(sql)
        with pytest.raises(UserError, match=rf"^storage: [^\n]*{reason}[^\n]*$"):
            open_study(config)


@pytest.mark.parametrize("storage", ["sqlite:///{}/nowhere/all.db", "postgresql+psycopg2nd://localhost/x"])
def test_a_storage_that_does_not_open_is_reported_in_one_line(tmp_path: Path, storage: str) -> None:
    with pytest.raises(UserError, match=r"^storage: [^\n]+$"):
        open_study(make_config(tmp_path, storage=storage.format(tmp_path)))


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("n_trials", [0, 1])
def test_a_study_of_another_program_is_refused_and_left_as_it_is(
    tmp_path: Path, direction: str, n_trials: int
) -> None:
    config = make_config(tmp_path)
    other = optuna.create_study(study_name="demo", storage=config.storage, direction=direction)
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials)
    if (direction, n_trials) == ("minimize", 0):  # as ours that was killed while it was created
        assert len(open_study(config).trials) == 2
        return
    with pytest.raises(UserError, match=r"^study_name: [^\n]+$"):
        open_study(config)
    assert len(other.trials) == n_trials
    assert not other.user_attrs


def take_away_server(monkeypatch: pytest.MonkeyPatch, place: object, name: str, calls: int) -> list[int]:
    """Let a method fail its first calls; return a list that is empty once they are over."""
    left, method = [*range(calls)], getattr(place, name)

    def call(*args: object, **kwargs: object) -> object:
        if left:
            left.pop()
            raise mlflow.MlflowException("API request failed: connection refused")
        return method(*args, **kwargs)

    monkeypatch.setattr(place, name, call)
    monkeypatch.setattr(objective, "_RETRY_S", 0)
    return left


def test_a_trial_waits_for_a_tracking_server_that_is_away(
    tmp_path: Path, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = take_away_server(monkeypatch, mlflow, "start_run", 3)
    trials = run(make_config(tmp_path), parent)
    assert not left
    assert [trial.state for trial in trials] == [State.COMPLETE] * 4
    assert {len(children) for children in read_children(parent).values()} == {1}


def test_a_trial_without_a_run_does_not_count_and_is_run_again(
    tmp_path: Path, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    for _ in range(MAX_RETRIES + 2):
        with pytest.raises(UserError):
            run(config, 32 * "0")  # there is no such parent
        assert len(list_ended(open_study(config).trials)) == 0
    trials = run(config, parent)
    assert [trial.state for trial in drop_retried(trials)] == [State.COMPLETE] * 4


class InterruptedFile(io.BytesIO):
    def write(self, content: object) -> int:
        if self.tell():
            signal.raise_signal(signal.SIGTERM)
        return super().write(content)


def save(config: TrainConfig) -> Iterator[EpochResult]:
    yield make_epoch(1, 0.5)
    torch.save({"network": torch.zeros(1)}, InterruptedFile())


def rename(run: TrackedRun, name: str) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("interrupted", ["save", "rename"])
def test_an_interrupted_trial_is_run_again_however_the_interrupt_surfaces(
    tmp_path: Path, parent: str, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Out of `torch.save` it comes as a RuntimeError; while a run is opened it must not leave one open."""
    config = make_config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), interrupts.handled():  # noqa: PT012
        if interrupted == "rename":
            patch.setattr(TrackedRun, "rename", rename)
        run(config, parent, save)
    (first, *_) = open_study(config).trials
    assert (first.state, first.user_attrs.get("failure")) == (State.FAIL, None)
    assert [each.info.status for each in read_children(parent)["0"]] == ["KILLED"]
    assert [trial.state for trial in drop_retried(run(config, parent))] == [State.COMPLETE] * 4


def test_progress_and_closing_of_runs_wait_for_the_tracking_server(
    tmp_path: Path, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    take_away_server(monkeypatch, mlflow.MlflowClient, "log_batch", 1)
    wait_for_server(lambda: log_progress(config, study, TrackedRun(parent), 7.0))
    assert mlflow.get_run(parent).data.metrics == {"search_eta_s": 7}
    take_away_server(monkeypatch, mlflow, "search_runs", 1)
    assert close_killed_runs(config, study) == []


@pytest.mark.parametrize("pruner", ["median", "hyperband", "halving", "none"])
def test_every_pruner_is_built_and_lets_a_first_epoch_be(tmp_path: Path, pruner: str) -> None:
    config = make_config(tmp_path, pruner=pruner, epochs=9)
    study = optuna.create_study(pruner=build_pruner(config), sampler=build_sampler(config, 0))
    for score in range(6):
        trial = study.ask()
        for step in range(1, 10):
            trial.report(score, step)
            assert step > 1 or not trial.should_prune()
        study.tell(trial, score)


def prune(config: SearchConfig, losses: Iterable[int], steps: range) -> dict[int, list[int]]:
    """Return the losses of the trials that are pruned, by step; a trial has its loss at every step."""
    study = optuna.create_study(pruner=build_pruner(config), sampler=build_sampler(config, 0))
    pruned_at: dict[int, list[int]] = {}
    for loss in losses:
        trial = study.ask()
        for step in steps:
            trial.report(loss, step)
            if trial.should_prune():
                pruned_at.setdefault(step, []).append(loss)
                break
        study.tell(trial, loss)
    return pruned_at


def test_halving_keeps_a_quarter_of_the_trials_after_a_quarter_of_the_epochs(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=16)
    assert prune(config, (*range(8), -1), range(1, 17)) == {4: [1, 2, 3, 4, 5, 6, 7]}


@pytest.mark.parametrize("epochs", [10, 13, 15, 17, 30, 50, 100])
def test_halving_cuts_once_whatever_the_number_of_epochs(tmp_path: Path, epochs: int) -> None:
    config = make_config(tmp_path, epochs=epochs)
    losses = random.Random(0).sample(range(60), 60)
    assert len(prune(config, losses, range(1, epochs))) == 1


@pytest.mark.parametrize(
    ("losses", "pruned_at"),
    [((-1, -2, -2, -4.5, -4.5, -6), []), ((-1, -2, -2, -2, -2), [5]), ((-9,) * 8, [])],
)
def test_two_epochs_in_a_row_on_the_wrong_side_of_the_median_prune_from_half_of_the_epochs_on(
    tmp_path: Path, losses: tuple[float, ...], pruned_at: list[int]
) -> None:
    config = make_config(tmp_path, epochs=8, pruner="median")
    study = optuna.create_study(pruner=build_pruner(config), sampler=build_sampler(config, 0))
    for _ in range(5):
        trial = study.ask()
        for step in range(1, 9):
            trial.report(-step, step)
        study.tell(trial, 0)
    trial = study.ask()
    found = []
    for step, loss in enumerate(losses, 1):
        trial.report(loss, step)
        if trial.should_prune():
            found.append(step)
    assert found == pruned_at
