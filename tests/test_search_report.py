"""What a search reports: winner and baseline recipe on test, edges of ranges, what pruning saved, figures."""

import math
import subprocess
import warnings
from datetime import datetime, timedelta

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import plots, report
from search.config import SearchConfig
from search.report import DIFFERENCE, MAJORITY, WINNER, compare_recipes
from search.run import choose_recipes
from search.space import BASELINE, build_space, suggest
from skin_resnet.cli import parse_options
from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Predictions,
    compute_metrics,
    compute_scores,
)
from skin_resnet.options import write_command
from tests.test_plots import assert_texts_are_apart

CONFIG = SearchConfig(n_trials=12, epochs=8)
LESIONS = np.array([f"L{i // 2:03}" for i in range(200)])


def predict(skill: float, seed: int) -> Predictions:
    targets = np.random.default_rng(0).integers(0, 4, 200)
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(4), 200) + skill * np.eye(4)[targets]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(
        probabilities=probabilities, targets=targets, image_ids=tuple(f"I{i:03}" for i in range(200))
    )


def test_of_one_seed_the_scores_are_those_of_an_evaluation() -> None:
    models = {BASELINE: predict(0.2, 1), WINNER: predict(0.4, 2)}
    scores = compare_recipes({name: [each] for name, each in models.items()}, LESIONS)
    for name, each in models.items():
        for key in HEADLINES:
            assert tuple(scores.loc[(name, key)]) == compute_scores(each, LESIONS)[key]
    for key in HEADLINES:
        assert scores.value[DIFFERENCE, key] == scores.value[WINNER, key] - scores.value[BASELINE, key]


def test_of_several_seeds_the_scores_are_means_with_narrower_intervals() -> None:
    groups = {BASELINE: [predict(0.2, s) for s in range(4)], WINNER: [predict(0.3, s) for s in range(4, 8)]}
    scores = compare_recipes(groups, LESIONS)
    one = compare_recipes({name: group[:1] for name, group in groups.items()}, LESIONS)
    for name, group in groups.items():
        mean = np.mean([compute_metrics(each).balanced_accuracy for each in group])
        assert scores.value[name, "balanced_accuracy"] == pytest.approx(mean)
    widths = [each.high - each.low for each in (one, scores)]
    assert (widths[1][DIFFERENCE] < widths[0][DIFFERENCE]).all()


def test_the_majority_class_is_a_column_of_the_table() -> None:
    scores = compare_recipes({BASELINE: [predict(0.2, 1)]}, LESIONS)
    targets = predict(0, 1).targets
    assert scores.value[MAJORITY, "accuracy"] == np.bincount(targets).max() / len(targets)
    assert scores.value[MAJORITY, "balanced_accuracy"] == 1 / 4
    assert scores.value[MAJORITY, "macro_auc"] == 0.5
    page = report.describe_winner(retrain(baseline_recipe=0.4), scores, make_trial(0))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    assert rows[0][1:] == [MAJORITY, BASELINE]
    (row,) = (row for row in rows if row[0] == "test balanced accuracy")
    assert row[1] == "0.250", "what is always the same has no interval"
    assert "[" in row[2]


def retrain(**vals: float) -> pd.DataFrame:
    config = TrainConfig().model_dump_json()
    rows = {"recipe": [name.replace("_", " ") for name in vals], "val": [*vals.values()], "gap": 0.1}
    return pd.DataFrame({**rows, "config": config, "run_id": "r"})


def make_trial(number: int, state: TrialState = TrialState.COMPLETE, **attrs: object) -> FrozenTrial:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    asked = study.ask()
    options = suggest(build_space(CONFIG), asked)
    value = 0.4 + number / 100
    user_attrs = {
        "config": CONFIG.training.with_changes(**options).model_dump_json(), "gap": 0.2, "best_epoch": 3,
        "val/balanced_accuracy": value, "epochs": 8 if state == TrialState.COMPLETE else 2, **attrs,
    }  # fmt: skip
    trial = create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params=asked.params,
        distributions=asked.distributions,
        user_attrs=user_attrs,
        intermediate_values={} if state == TrialState.FAIL else {1: 0.2, 2: 0.3},
    )
    trial.number = number
    trial.datetime_start = trial.datetime_complete = datetime(2026, 1, 1)
    return trial


@pytest.mark.parametrize(
    ("skills", "verdict"),
    [((0.1, 0.9), "is better"), ((0.3, 0.3), "not significantly"), ((0.9, 0.1), "is worse")],
)
def test_the_page_says_whether_the_winner_holds_on_test(skills: tuple[float, float], verdict: str) -> None:
    scores = compare_recipes({BASELINE: [predict(skills[0], 1)], WINNER: [predict(skills[1], 2)]}, LESIONS)
    assert verdict in report.describe_winner(retrain(baseline_recipe=0.5, winner=0.6), scores, make_trial(20))


@pytest.mark.parametrize(("retrained_val", "is_biased"), [(0.55, True), (0.6, False), (0.7, False)])
def test_selection_bias_is_mentioned_where_the_winner_falls(retrained_val: float, is_biased: bool) -> None:
    retrained = retrain(baseline_recipe=0.5, winner=retrained_val)
    page = report.describe_winner(retrained, None, make_trial(20))  # 0.6 in the study
    assert f"{retrained_val:.3f}" in page
    assert ("selection bias" in page) == is_biased


def test_a_baseline_recipe_that_won_is_retrained_once_and_named_as_the_winner() -> None:
    baseline = CONFIG.training.model_dump_json()
    trials = [make_trial(0, config=baseline, baseline=BASELINE), make_trial(1)]
    assert list(choose_recipes(CONFIG, trials[0])) == [BASELINE]
    assert list(choose_recipes(CONFIG, trials[1])) == [BASELINE, WINNER]
    scores = compare_recipes({BASELINE: [predict(0.3, 1)]}, LESIONS)
    assert "No recipe was better" in report.describe_winner(retrain(baseline_recipe=0.4), scores, trials[0])


def make_study(states: list[TrialState], config: SearchConfig = CONFIG, **attrs: object) -> optuna.Study:
    study = optuna.create_study(directions=["maximize"] * len(config.objective_names))
    study.add_trials([make_trial(number, state, **attrs) for number, state in enumerate(states)])
    return study


def test_trials_are_counted_and_what_pruning_saved_is_reported() -> None:
    study = make_study([TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2)
    study.add_trial(make_trial(5, TrialState.FAIL, failure="NonFiniteLossError: it became nan"))
    page = report.describe_trials(CONFIG, study, study.trials[2])
    assert "6 trials: 3 finished, 2 pruned, 1 failed; 0 were killed" in page
    assert "30 of 48 epochs" in page
    assert "saved 12" in page
    assert "NonFiniteLossError" in page


def test_a_winner_on_the_edge_of_a_range_is_warned_of_unless_nothing_lies_beyond() -> None:
    space = build_space(CONFIG)
    trial = make_trial(0)
    middle = {"lr_factor": 0.7, "weight_decay_factor": 2.0, "mixup": 0.2, "cutmix": 0.5, "dropout": 0.2}
    middle |= {"label_smoothing": 0.1, "stochastic_depth": 0.1, "warmup_epochs": 0.5}
    for params, edges in (
        ({}, 0),
        ({"lr_factor": 9.9}, 1),
        ({"lr_factor": 0.05, "mixup": 0.0}, 1),
        ({"mixup": 0.4}, 1),
    ):
        trial.params = {**trial.params, **middle, **params}
        assert len(report.find_edges(space, trial)) == edges, params


def test_the_command_trains_with_the_very_same_config() -> None:
    config = TrainConfig(lr=1e-5, data="a folder/x", epochs=3, mixup=0.2, image_size=64)
    command = write_command(config, width=30)
    assert max(map(len, command.splitlines())) <= 30
    pasted = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True)
    program, name, *options = pasted.stdout.splitlines()
    assert (program, name) == ("skin-resnet", "train")
    assert parse_options("train", options) == config


def test_the_time_left_includes_retraining_that_is_larger_than_the_trials() -> None:
    trial = make_trial(0)  # 8 epochs
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=80)
    assert math.isnan(report.estimate_retraining_s(CONFIG, []))
    assert report.estimate_retraining_s(CONFIG.with_changes(seeds=0), []) == 0
    for options, seconds in (({}, 2 * 3 * 80), ({"retrain": "epochs=16"}, 2 * 3 * 160)):
        assert report.estimate_retraining_s(CONFIG.with_changes(**options), [trial]) == seconds
    larger = CONFIG.with_changes(image_size=64, retrain="image_size=128", seeds=1)
    assert report.estimate_retraining_s(larger, [trial]) == 2 * 4 * 80


@pytest.mark.parametrize(("objective", "decides"), [("val_macro_auc", "dropout"), ("val_loss", "cutmix")])
def test_what_the_best_trials_share_is_the_most_important(objective: str, decides: str) -> None:
    config = CONFIG.with_changes(objectives=objective)
    study = optuna.create_study(
        direction="minimize" if objective == "val_loss" else "maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    for _ in range(60):
        trial = study.ask()
        options = suggest(build_space(CONFIG), trial)
        study.tell(trial, options["dropout"] if options["dropout"] > 0.35 else -options["cutmix"])
    target = plots.build_target(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna, of a target that is not maximized
        importances = optuna.importance.get_param_importances(study, target=target)
    assert max(importances, key=lambda name: importances[name]) == decides
    assert set(importances) == set(build_space(CONFIG))


@pytest.mark.parametrize("finished", [0, 1, 7, 8])
def test_every_figure_that_there_are_enough_trials_for_is_drawn(finished: int) -> None:
    states = [TrialState.COMPLETE] * finished + [TrialState.PRUNED] * 3 + [TrialState.FAIL]
    by_accuracy = CONFIG.with_changes(objectives="val_balanced_accuracy")
    figures = plots.plot_trials(by_accuracy, make_study(states), 0.14)
    assert set(figures) == {"trials"} | ({"hyperparameters"} if finished == 8 else set())
    names = [f"{split}/{metric}" for split in ("train", "val") for metric in ("balanced_accuracy", "loss")]
    curves = pd.DataFrame({name: {1: 0.3, 2: 0.5} for name in names})
    figures["recipes"] = plots.plot_recipes({BASELINE: curves, WINNER: curves}, "9 images", 0.14, "loss")
    assert [line.get_xdata()[0] for line in figures["recipes"].axes[0].lines[:1]] == [1]
    for figure in figures.values():
        assert_texts_are_apart(figure)
        assert figure.get_size_inches()[0] * figure.dpi == 900
        assert figure.legends[0].get_texts()
    for panels in (figures["trials"].axes, figures["recipes"].axes[:2]):
        for axes in panels:
            assert 0.14 in [line.get_ydata()[0] for line in axes.lines if len(line.get_ydata())]


def test_of_several_objectives_the_first_is_drawn() -> None:
    config = CONFIG.with_changes(objectives="val_loss,gap")
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trials([create_trial(values=[loss, 0.1], user_attrs={"gap": 0.1}) for loss in (0.7, 0.8, 0.9)])
    (panel,) = plots.plot_trials(config, study, 0.14)["trials"].axes
    drawn = [value for line in panel.lines for value in line.get_ydata()]
    assert sorted(drawn) == [0.7, 0.8, 0.9]


def test_what_would_show_nothing_is_not_drawn() -> None:
    states = [TrialState.COMPLETE, TrialState.PRUNED]
    assert not plots.plot_trials(CONFIG, make_study([*states, TrialState.FAIL]), 0.14)
    short = CONFIG.with_changes(epochs=2)
    (trials,) = plots.plot_trials(short, make_study([*states, TrialState.COMPLETE]), 0.14)["trials"].axes
    assert not trials.get_title(loc="left").startswith("Over the epochs")
