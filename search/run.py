"""The command `search`: trials, then the winner retrained, tested once and registered."""

from optuna import Study
from optuna.trial import FrozenTrial

from search import plots, report, winner
from search.config import SearchConfig
from search.outages import wait_for_server
from search.study import choose_best, count_done, get_study_id, lock, open_study, report_storage_errors
from search.workers import close_killed_runs, log_progress, name_session, run_workers
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.errors import UserError
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.run import TrackedRun, describe_location, open_run


def search(config: SearchConfig) -> None:
    """Start or resume a study in an MLflow run of its own; then retrain its winner and test it.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    with open_run(f"search {config.study_name}") as run, report_storage_errors(config):
        run.log_params(config)
        study = open_study(config)
        with lock(config.storage, name_session(run.run_id)):
            run.set_tags({finished_runs.STUDY: get_study_id(study), "search.study": config.study_name})
            page = _search(config, study, run)
        print(f"\n{page}")
        wait_for_server(lambda: run.log_artifacts({"report.md": page}))
        run.describe(page)
    print(f"\n{describe_location(run.run_id)}")


def _search(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    """Run the trials, then choose a winner; return the page."""
    closed = close_killed_runs(config, study)
    done = count_done(study.get_trials(deepcopy=False))
    print(f"study {config.study_name}: {done} of {config.n_trials} trials done", end="")
    print(f"; closed {len(closed)} runs of killed processes" if closed else "", flush=True)
    prepare_data(config.training)  # before there are workers, which would all decode the same images
    run_workers(config, study, run)
    close_killed_runs(config, study)
    log_progress(config, study, run)
    # Of several searches on one study, the first to come here retrains, tests and reports.
    with lock(config.storage, f"winner-{get_study_id(study)}", wait=False) as is_first:
        return _conclude(config, study, run) if is_first else "Another search is testing the winner."


def _conclude(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    """Choose the winner, retrain, test and register it; return the page."""
    best = choose_best(config, study)
    if best is None:
        raise UserError("no trial has finished; their runs say why")
    trials = study.get_trials(deepcopy=False)
    recipes = winner.choose_recipes(config, trials, best)
    command = winner.write_command(list(recipes.values())[-1])
    figures = {f"figures/{name}.png": each for name, each in plots.plot_trials(config, study).items()}
    wait_for_server(lambda: run.log_artifacts({**figures, "retrain.sh": f"{command}\n"}))
    pages = [
        f"### Search {config.study_name}: {config.arch} on {config.data}",
        report.describe_trials(config, study, best),
        f"To train it again:\n\n```sh\n{command}\n```",
    ]
    if config.seeds > 0:
        pages.insert(2, _retrain_and_test(config, study, run, recipes, best))
    else:
        baseline = winner.find_baseline(trials)
        runs = {winner.BASELINE: baseline, winner.WINNER: best} if baseline else {winner.WINNER: best}
        _log_curves(run, {name: trial.user_attrs["run_id"] for name, trial in runs.items()})
    return "\n\n".join(pages)


def _retrain_and_test(
    config: SearchConfig, study: Study, run: TrackedRun, recipes: dict[str, TrainConfig], best: FrozenTrial
) -> str:
    settings = {name: each.model_dump_json() for name, each in recipes.items()}
    settings |= {"seeds": str(config.seeds), "test": config.test}
    before = study.user_attrs.get("verdict", {})
    if before.get("settings") == settings:
        return f"{before['page']}\n\nFrom run {before['run_id']}; test was not evaluated again."
    retrained = winner.retrain(config, study, recipes, run.run_id)
    first = {each.recipe: each.run_id for each in reversed(retrained)}
    _log_curves(run, {name: first[name] for name in recipes})
    scores, warning = winner.evaluate_on_test(run, retrained) if config.test == "at_end" else (None, "")
    registered = winner.register(config, retrained, scores)
    parts = [report.describe_winner(retrained, scores, best), warning, registered]
    page = "\n\n".join(filter(None, parts))
    study.set_user_attr("verdict", {"settings": settings, "page": page, "run_id": run.run_id})
    return page


def _log_curves(run: TrackedRun, run_ids: dict[str, str]) -> None:
    """Log the curves of baseline recipe and winner side by side, from their runs by recipe."""

    def log() -> None:
        histories = {name: finished_runs.read_history(run_id) for name, run_id in run_ids.items()}
        images = finished_runs.read_tags(next(iter(run_ids.values())))["split.val"]
        run.log_artifacts({"figures/recipes.png": plots.plot_recipes(histories, images)})

    wait_for_server(log)
