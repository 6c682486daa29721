"""The command `search`: trials, then the winner retrained with new seeds, tested and registered."""

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pandas as pd
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from search import plots, report
from search.config import SearchConfig
from search.objective import PatientTracker, enter_child, wait_for_server
from search.report import WINNER, compare_recipes
from search.space import BASELINE, BASELINE_RECIPE
from search.study import choose_best, get_study_id, list_ended, lock, open_study, report_storage_errors
from search.workers import close_killed_runs, log_progress, name_session, run_workers
from skin_resnet.commands.compare import read_predictions
from skin_resnet.commands.evaluate import assess_and_log
from skin_resnet.commands.train import log_card, open_test_split
from skin_resnet.commands.train import report as report_training
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.data.split import join_lesions
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.page import format_summary, print_markdown
from skin_resnet.evaluation.plots.curves import FEWEST_EPOCHS
from skin_resnet.options import write_command
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.links import describe_location, link_view, save_view
from skin_resnet.tracking.registry import register_run
from skin_resnet.tracking.run import TrackedRun, open_run
from skin_resnet.training.checkpoint import RunFolder, read_checkpoint
from skin_resnet.training.resume import ResumePoint, find_resume_point
from skin_resnet.training.run import run_training


def search(config: SearchConfig) -> None:
    """Start or resume a study in an MLflow run of its own; then retrain its winner and test it.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    with open_run(f"search · {config.study}") as run, report_storage_errors(config):
        run.log_params(config)
        study = open_study(config)
        with lock(config.storage, name_session(run.run_id)):
            study_id = get_study_id(study)
            run.set_tags({finished_runs.STUDY: study_id, "search.study": config.study})
            # All trials and retrainings of the study, the best on val first.
            where = f"tags.`{finished_runs.STUDY}` = '{study_id}' and tags.`mlflow.parentRunId` != ''"
            wait_for_server(lambda: save_view(run.run_id, report.name_view(config, study), where))
            _run_trials(config, study, run)
            # Of several searches on one study, the first to come here retrains, tests and reports.
            with lock(config.storage, f"winner-{study_id}", wait=False) as is_first:
                page = _conclude(config, study, run) if is_first else "Another search is testing the winner."
        titled = f"### Search {config.study}: {config.arch}, {config.n_trials} trials\n\n{page}"
        print_markdown(titled)
        wait_for_server(lambda: run.log_artifacts({"report.md": titled}))
        verdict, _, rest = page.partition("\n\n")
        wait_for_server(lambda: run.describe(f"{verdict}\n\n{_link_winner(config, study, run)}\n\n{rest}"))
        wait_for_server(lambda: run.log_metrics({"search_eta_s": 0.0}, step=config.n_trials))
    print(f"\n{describe_location(run.run_id)}")


def _run_trials(config: SearchConfig, study: Study, run: TrackedRun) -> None:
    closed = close_killed_runs(config, study)
    done = len(list_ended(study.get_trials(deepcopy=False)))
    more = f"; closed {len(closed)} runs of killed processes" if closed else ""
    then = f"; retraining with seeds={config.seeds} follows" if config.seeds else ""
    print(f"study {config.study}: {done} of {config.n_trials} trials done{more}{then}", flush=True)
    prepare_data(config.training)  # before there are workers, which would all decode the same images
    run_workers(config, study, run)
    close_killed_runs(config, study)
    left_s = report.estimate_retraining_s(config, list_ended(study.get_trials(deepcopy=False)))
    wait_for_server(lambda: log_progress(config, study, run, left_s))


def _conclude(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    """Choose the winner, retrain, test and register it; return the page."""
    best = choose_best(config, study)
    if best is None:
        raise UserError("no trial finished; see the tag `failure` of the trials' runs")
    command = write_command(list(choose_recipes(config, best).values())[-1])
    data = prepare_data(config.training)
    majority = 1 / int(data.select(data.split.val).dx.nunique())  # balanced accuracy of the majority class
    drawn = plots.plot_trials(config, study, majority)
    figures = {f"figures/{name}.png": each for name, each in drawn.items()}
    wait_for_server(lambda: run.log_artifacts({**figures, "retrain.sh": f"{command}\n"}))
    if config.seeds > 0:
        verdict = _retrain_and_test(config, study, run, best, majority)
    else:
        verdict = ""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        run_ids = {trial.user_attrs.get("baseline"): trial.user_attrs["run_id"] for trial in finished}
        shown = {BASELINE: run_ids.get(BASELINE), WINNER: best.user_attrs["run_id"]}
        drawn_ids = {name: run_id for name, run_id in shown.items() if run_id}
        wait_for_server(lambda: _log_curves(config, run, drawn_ids, majority))
    trials = report.describe_trials(config, study, best)
    return "\n\n".join(filter(None, [verdict, trials, f"To train it again:\n\n```sh\n{command}\n```"]))


def _link_winner(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    best = choose_best(config, study)
    winner = f"**Winner: {report.link_trial(config, best)}.** " if best else ""
    view = report.name_view(config, study)
    return f"{winner}See {link_view(run.run_id, view, 'the runs of its trials and retrainings')}."


def choose_recipes(config: SearchConfig, best: FrozenTrial) -> dict[str, TrainConfig]:
    """Return baseline recipe and winner as they are retrained; the baseline recipe alone if it won."""
    baseline = config.change_for_retraining(config.training.with_changes(**BASELINE_RECIPE))
    winner = config.change_for_retraining(TrainConfig.model_validate_json(best.user_attrs["config"]))
    if winner == baseline or best.user_attrs.get("baseline") == BASELINE:
        return {BASELINE: baseline}
    return {BASELINE: baseline, WINNER: winner}


def _retrain_and_test(
    config: SearchConfig, study: Study, run: TrackedRun, best: FrozenTrial, majority: float
) -> str:
    """Retrain all recipes, test them once, and register the winner; return a summary."""
    recipes = choose_recipes(config, best)
    settings = {name: each.model_dump_json() for name, each in recipes.items()}
    settings |= {"seeds": str(config.seeds), "test": config.test}
    before = study.user_attrs.get("verdict", {})
    if before.get("settings") == settings:
        note = f"From run {before['run_id']}; test was not evaluated again."
        return "\n\n".join(filter(None, [before["page"], note, _register(config, study, before["winner"])]))
    # The trials' own seed is not among them: it may be what made the winner win.
    retrained = pd.DataFrame(
        _retrain(study, name, each.with_changes(seed=each.seed + number), run.run_id)
        for number in range(1, config.seeds + 1)
        for name, each in recipes.items()
    )
    run_ids = retrained.drop_duplicates("recipe").set_index("recipe").run_id.to_dict()
    wait_for_server(lambda: _log_curves(config, run, run_ids, majority))
    scores, warning = _test(run, retrained) if config.test == "at_end" else (None, "")
    in_study = best if config.retrain == "none" else None
    page = "\n\n".join(filter(None, [report.describe_winner(retrained, scores, in_study), warning]))
    winner = retrained[retrained.recipe == list(recipes)[-1]].nlargest(1, "val").iloc[0].run_id
    kept = {"settings": settings, "page": page, "run_id": run.run_id, "winner": winner}
    study.set_user_attr("verdict", kept)
    return "\n\n".join(filter(None, [page, _register(config, study, winner)]))


def _retrain(study: Study, recipe: str, config: TrainConfig, parent_run_id: str) -> dict[str, Any]:
    """Train a recipe in a child run, from where a killed search left it; return the study's record of it."""
    name, key = f"{recipe} · seed {config.seed}", f"retrained {recipe} · seed {config.seed}"
    options = config.model_dump_json()
    kept: dict[str, Any] = study.user_attrs.get(key, {})
    if kept.get("config") != options:
        kept = {}
    if "val" in kept:
        return kept
    print(f"\n{name}")
    tags = {finished_runs.STUDY: get_study_id(study), "search.recipe": recipe}
    point: ResumePoint | None = None
    with ExitStack() as stack:
        stack.callback(lambda: point.folder.release() if point else None)
        if kept:
            with suppress(UserError):  # it was killed before it began to train, or elsewhere
                point = find_resume_point(config.with_changes(resume=kept["run_id"]))
        run_id = point.folder.path.name if point else None
        run = enter_child(stack, name, run_id=run_id, parent_run_id=parent_run_id, tags=tags)
        if point is None:
            folder = RunFolder(config.checkpoint_dir.expanduser() / run.run_id)
            point = ResumePoint(folder=folder, config=config)
            folder.acquire()
        kept = {"recipe": recipe, "config": options, "run_id": run.run_id}
        study.set_user_attr(key, kept)
        result = run_training(point.config, tracker=PatientTracker(run), resume=point)
        wait_for_server(lambda: run.describe(report_training(run, result)))
        checkpoint = read_checkpoint(result.checkpoint_path)
        wait_for_server(lambda: log_card(run, checkpoint, result.data))
        wait_for_server(lambda: run.log_model(result.checkpoint_path))
    kept |= {"val": result.best.val.balanced_accuracy, "gap": result.final_gap}
    study.set_user_attr(key, kept)
    return kept


def _log_curves(config: SearchConfig, run: TrackedRun, run_ids: dict[str, str], majority: float) -> None:
    """Log the curves of the recipes side by side, from their runs; if there are enough epochs."""
    histories = {name: finished_runs.read_history(run_id) for name, run_id in run_ids.items()}
    images = finished_runs.read_tags(next(iter(run_ids.values())))["split.val"]
    if max(map(len, histories.values())) >= FEWEST_EPOCHS:
        figure = plots.plot_recipes(histories, images, majority, config.training.best_by)
        run.log_artifacts({"figures/recipes.png": figure})


def _test(run: TrackedRun, retrained: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Evaluate all retrained networks on test; return what `compare_recipes` does, and a warning, if any."""
    config = TrainConfig.model_validate_json(retrained.config[0])
    data = prepare_data(config)
    table, warning = wait_for_server(lambda: open_test_split(run, config, data))

    def evaluate(run_id: str) -> Predictions:
        checkpoint = read_checkpoint(finished_runs.download_checkpoint(run_id))
        with open_run(run_id=run_id) as child:
            assessment, page = assess_and_log(child, checkpoint, table, data.store, config)
            log_card(child, checkpoint, data, assessment)
            trained = finished_runs.read_tags(run_id).get("mlflow.note.content", "")
            child.describe("\n\n".join([format_summary(assessment, "test"), trained, page]))
        return read_predictions(finished_runs.read_run(run_id, "test").predictions)

    predictions: dict[str, list[Predictions]] = {name: [] for name in retrained.recipe}
    for name, run_id in zip(retrained.recipe, retrained.run_id, strict=True):
        predictions[name].append(wait_for_server(partial(evaluate, run_id)))
    return compare_recipes(predictions, join_lesions(table).to_numpy(str)), warning


def _register(config: SearchConfig, study: Study, run_id: str) -> str:
    """Register the winner's run, unless this study has; return a sentence about it."""
    key = f"{run_id} as {config.register_as}"
    text: str = study.user_attrs.get(key, "")
    if not text and config.register_as != "none":
        text = wait_for_server(lambda: register_run(run_id, config.register_as))
        study.set_user_attr(key, text)
    return text
