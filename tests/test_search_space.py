"""The search space: what is tuned, narrowed and fixed, and the baselines that every study holds."""

import optuna
import pytest

from search.config import SearchConfig
from search.space import BASELINES, TYPICAL, build_space, locate, to_options
from search.space import suggest as suggest_options
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.options import format_value


def suggest(config: SearchConfig, count: int = 30) -> list[dict[str, object]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [suggest_options(build_space(config), study.ask()) for _ in range(count)]


@pytest.mark.parametrize("epochs", [1, 2, 16, 100])
def test_whatever_is_suggested_can_be_trained(epochs: int) -> None:
    config = SearchConfig(epochs=epochs)
    for options in suggest(config):
        trained = config.training.with_changes(**options)
        assert all(len(format_value(value)) <= 11 for value in options.values()), "reads well on a run"
        assert set(options) <= set(TrainConfig.model_fields)
        assert trained.epochs == epochs


def test_each_optimizer_has_a_range_of_its_own() -> None:
    found = suggest(SearchConfig(), 200)
    for name, usual in TYPICAL.items():
        for optimizer, value in usual.items():
            values = [options[name] for options in found if options["optimizer"] == optimizer]
            assert max(values) <= 10.001 * value
            assert max(values) > 2 * value


def test_a_space_is_narrowed_and_fixed_from_the_command_line() -> None:
    fix = "optimizer=sgd, lr=0.001..0.01, augment=light|strong, dropout=0.3, cutmix=0..0.5"
    for options in suggest(SearchConfig(fix=fix)):
        assert options["optimizer"] == "sgd"
        assert 0.001 <= options["lr"] <= 0.01
        assert options["augment"] in {"light", "strong"}
        assert options["dropout"] == 0.3
        assert options["cutmix"] in {0, 0.25, 0.5}


@pytest.mark.parametrize(
    ("fix", "told"),
    [
        ("seed=3", "optimizer, lr, "),
        ("optimizer", "'optimizer' has no value"),
        ("optimiser=sgd", "did you mean optimizer?"),
        ("lr_factor=1..2", "lr_factor"),
        ("augment=light,augment=strong", "augment is given twice"),
        ("optimizer=lion", "lion"),
        ("lr=0..1", "greater than 0"),
        ("lr=1..0.1", "LOW..HIGH"),
        ("lr=1..2..3", "LOW..HIGH"),
        ("augment=none..strong", "none|flips|crops|colors|light|standard|strong"),
    ],
)
def test_a_fix_that_cannot_be_is_refused_in_one_line(fix: str, told: str) -> None:
    with pytest.raises(UserError, match=r"^fix: [^\n]+$") as error:
        build_space(SearchConfig(fix=fix))
    assert told in str(error.value)


@pytest.mark.parametrize("fix", ["none", "optimizer=sgd", "augment=light|strong,lr=0.1..0.2"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_has_a_place_in_every_space(fix: str, baseline: str) -> None:
    config = SearchConfig(fix=fix)
    space = build_space(config)
    place = locate(space, config.training.with_changes(**BASELINES[baseline]))
    assert set(place) == set(space)
    study = optuna.create_study()
    study.enqueue_trial(place)
    suggest_options(space, study.ask())  # Optuna warns, here an error, of a value outside
    for name, each in space.items():
        assert each._contains(each.to_internal_repr(place[name])), name


def test_the_whole_space_holds_both_baselines_exactly() -> None:
    config = SearchConfig()
    for changes in BASELINES.values():
        wanted = config.training.with_changes(**changes)
        space = build_space(config)
        options = to_options(locate(space, wanted))
        assert config.training.with_changes(**{**changes, **options}) == wanted


def test_training_options_pass_through_and_the_objective_chooses_the_epoch() -> None:
    config = SearchConfig(arch="resnet101", epochs=7, objectives="gap,val_loss")
    assert config.training == TrainConfig(arch="resnet101", epochs=7, best_by="loss")


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        ("postgresql+psycopg://me:s3c:ret@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
        ("postgresql+psycopg://me:a/b@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
    ],
)
def test_a_run_shows_no_password(storage: str, shown: str) -> None:
    assert SearchConfig(storage=storage).to_params()["storage"] == shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"objectives": "accuracy"}, "val_balanced_accuracy"),
        ({"objectives": "gap,gap"}, "once"),
        ({"devices": 2}, "use workers"),
        ({"resume": "auto"}, "study_name"),
        ({"storage": "mysql://x"}, "sqlite:///FILE"),
        ({"storage": "sqlite:///:memory:"}, "sqlite:///FILE"),
        ({"best_by": "macro_auc"}, "best_by: .*objectives=val_macro_auc"),
        ({"n_trials": 1}, "n_trials"),
        ({"retrain": "epochs=20,size=128"}, "retrain: 'size=128'"),
        ({"retrain": "epochs"}, "retrain: 'epochs'"),
        ({"retrain": "epochs=0"}, "retrain: epochs"),
        ({"register_as": "a/b"}, "register_as: 'a/b'"),
        ({"register_as": "a:b"}, "register_as: 'a:b'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        SearchConfig(**options)
