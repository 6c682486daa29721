"""What a search says it found: the verdict on test, edges of ranges, what pruning saved, the figures."""

import dataclasses
import shlex
from datetime import datetime
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import report
from search.config import SearchConfig
from search.space import build_space
from search.verdict import Verdict, compare_recipes
from search.winner import SEED, WINNER, Retrained, choose_recipes, write_command
from skin_resnet.cli import parse_options
from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.comparison import compare_models
from skin_resnet.evaluation.metrics import Predictions, compute_intervals, compute_metrics
from skin_resnet.evaluation.plots import search as plots

CONFIG = SearchConfig(n_trials=12, epochs=8)
LESIONS = np.array([f"L{i // 2:03}" for i in range(200)])


def predict(skill: float, seed: int) -> Predictions:
    targets = np.random.default_rng(0).integers(0, 4, 200)
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(4), 200) + skill * np.eye(4)[targets]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(
        probabilities=probabilities, targets=targets, image_ids=tuple(f"I{i:03}" for i in range(200))
    )


def test_of_one_seed_the_verdict_is_what_compare_says() -> None:
    models = {SEED: predict(0.2, 1), WINNER: predict(0.4, 2)}
    verdict = compare_recipes({name: [each] for name, each in models.items()}, LESIONS)
    assert list(verdict.differences) == compare_models(models, LESIONS)
    for name, each in models.items():
        intervals = compute_intervals(each, LESIONS)
        for key, (value, interval) in verdict.figures[name].items():
            assert (value, interval) == (getattr(compute_metrics(each), key), intervals[key])


def test_of_several_seeds_the_verdict_is_the_mean_and_surer() -> None:
    groups = {SEED: [predict(0.2, s) for s in range(4)], WINNER: [predict(0.3, s) for s in range(4, 8)]}
    verdict = compare_recipes(groups, LESIONS)
    one = compare_recipes({name: group[:1] for name, group in groups.items()}, LESIONS)
    for name, group in groups.items():
        mean = np.mean([compute_metrics(each).balanced_accuracy for each in group])
        assert verdict.figures[name]["balanced_accuracy"][0] == pytest.approx(mean)
    widths = [each.differences[0].high - each.differences[0].low for each in (one, verdict)]
    assert widths[1] < widths[0]


def retrain(recipe: str, val: float) -> Retrained:
    return Retrained(
        recipe=recipe, config=TrainConfig(), run_id="r", checkpoint=Path("c"), model_uri="m", val=val, gap=0.1
    )


def make_trial(number: int, state: TrialState = TrialState.COMPLETE, **attrs: object) -> FrozenTrial:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    asked = study.ask()
    options = build_space(CONFIG).suggest(asked)
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
    ("skills", "told"),
    [
        ((0.1, 0.9), "The winner beats the seed recipe on test."),
        ((0.3, 0.3), "does not beat the seed recipe on test beyond chance"),
        ((0.9, 0.1), "did not hold"),
    ],
)
def test_the_page_says_whether_the_winner_holds_on_test(skills: tuple[float, float], told: str) -> None:
    retrained = [retrain(SEED, 0.5), retrain(WINNER, 0.6)]
    verdict = compare_recipes({SEED: [predict(skills[0], 1)], WINNER: [predict(skills[1], 2)]}, LESIONS)
    page = report.describe_verdict(retrained, verdict, make_trial(20))
    assert told in page
    assert "winner minus seed recipe" in page
    assert "0.600 on val in the study is 0.600 retrained (+0.000)" in page


def test_a_seed_recipe_that_won_is_retrained_once_and_said_to_have_won() -> None:
    seed = CONFIG.training.model_dump_json()
    trials = [make_trial(0, config=seed, baseline=SEED), make_trial(1)]
    assert list(choose_recipes(CONFIG, trials, trials[0])) == [SEED]
    assert list(choose_recipes(CONFIG, trials, trials[1])) == [SEED, WINNER]
    verdict = Verdict(figures=compare_recipes({SEED: [predict(0.3, 1)]}, LESIONS).figures, differences=())
    assert "No recipe was better" in report.describe_verdict([retrain(SEED, 0.4)], verdict, trials[0])


def test_trials_are_counted_and_what_pruning_saved_is_told() -> None:
    states = [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2
    trials = [make_trial(number, state) for number, state in enumerate(states)]
    trials.append(make_trial(5, TrialState.FAIL, failure="NonFiniteLossError: it became nan"))
    page = report.describe_trials(CONFIG, trials, trials[2])
    assert "6 trials: 3 finished, 2 pruned, 1 failed; 0 killed and run again" in page
    assert "30 epochs were run of 48 asked for; pruning saved 12" in page
    assert "Failed 1 x: NonFiniteLossError" in page


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
    command = shlex.split(write_command(config))
    assert command[:4] == ["python", "-m", "skin_resnet", "train"]
    assert parse_options("train", command[4:]) == config


@pytest.mark.filterwarnings("ignore:PedAnova")  # that low values count is what we tell it by the sign
@pytest.mark.parametrize(("direction", "decides"), [("maximize", "dropout"), ("minimize", "cutmix")])
def test_what_the_best_trials_share_is_the_most_important(direction: str, decides: str) -> None:
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        trial = study.ask()
        options = build_space(CONFIG).suggest(trial)
        study.tell(trial, options["dropout"] if options["dropout"] > 0.35 else -options["cutmix"])
    importances = report.compute_importances(study)
    assert max(importances, key=lambda name: importances[name]) == decides


def test_a_choice_is_drawn_at_its_own_name_also_where_no_trial_made_the_last_one() -> None:
    points = [report.to_point(CONFIG, make_trial(number)) for number in range(9)]
    points = [dataclasses.replace(p, params={**p.params, "augment": "standard"}) for p in points]
    scales = {name: report._get_scale(part) for name, part in build_space(CONFIG).parts.items()}
    (axes,) = plots.plot_parallel(points, scales, 3, maximize=True).axes
    column = [label.get_text() for label in axes.get_xticklabels()].index("augment")
    height = {
        text.get_text(): text.get_position()[1] for text in axes.texts if text.get_position()[0] == column
    }
    assert {line.get_ydata()[column] for line in axes.lines} == {height["standard"]}
    assert [line.get_linewidth() > 2 for line in axes.lines].index(True) == 3, "the winner, not the best"


def test_what_may_not_win_is_no_best_so_far() -> None:
    config = CONFIG.with_changes(max_gap=0.1)
    trials = [make_trial(0, gap=0.05), make_trial(1, gap=0.2)]
    points = [report.to_point(config, trial) for trial in trials]
    figure = plots.plot_history(points, "val_balanced_accuracy", maximize=True)
    (line,) = figure.axes[0].lines
    assert set(line.get_ydata()) == {0.4}
    assert "finished, gap too large" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.filterwarnings("ignore:PedAnova")
def test_every_figure_is_drawn(tmp_path: Path) -> None:
    states = [TrialState.COMPLETE] * 9 + [TrialState.PRUNED] * 3 + [TrialState.FAIL]
    trials = [make_trial(number, state) for number, state in enumerate(states)]
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    points = [report.to_point(CONFIG, trial) for trial in trials]
    assert np.isnan(points[-1].value)
    assert points[-2].value == 0.3
    importances = report.compute_importances(study)
    assert set(importances) == set(build_space(CONFIG).parts)
    curves = {f"{split}/balanced_accuracy": {1: 0.3, 2: 0.5} for split in ("train", "val")}
    scales = {name: report._get_scale(part) for name, part in build_space(CONFIG).parts.items()}
    figures = {
        "history": plots.plot_history(points, "val_balanced_accuracy", maximize=True),
        "importances": plots.plot_importances(importances, 9),
        "slices": plots.plot_slices(points, scales, "val_balanced_accuracy"),
        "parallel": plots.plot_parallel(points, scales, 8, maximize=True),
        "epochs": plots.plot_epochs(points, 8),
        "recipes": plots.plot_recipes(
            {SEED: curves, WINNER: curves}, {SEED: (2, 0.3), WINNER: (1, 0.1)}, "9 images"
        ),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert figure.get_size_inches()[0] * figure.dpi == 900
