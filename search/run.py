"""The command `search`: trials, then the winner retrained, tested once and registered."""

import pandas as pd
from optuna import Study

from search import plots, report, winner
from search.config import SearchConfig
from search.study import (
    choose_best,
    count_done,
    drop_retried,
    get_study_id,
    lock,
    open_study,
    report_storage_errors,
    summarize,
)
from search.workers import close_killed_runs, name_session, run_workers
from skin_resnet.data.prepare import prepare_data
from skin_resnet.errors import UserError
from skin_resnet.tracking import search_runs
from skin_resnet.tracking.run import TrackedRun, describe_location, open_run


def search(config: SearchConfig) -> None:
    """Start or resume a study in an MLflow run of its own; then retrain its winner and test it.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    with open_run(config.study_name) as run, report_storage_errors(config):
        run.log_params(config)
        study = open_study(config)
        with lock(config.storage, name_session(run.run_id)):
            run.set_tags({search_runs.STUDY: get_study_id(study), "search.study": config.study_name})
            page = _search(config, study, run)
        print(f"\n{page}")
        run.log_artifacts({"report.md": page})
        run.describe(page)
    print(f"\n{describe_location(run.run_id)}")


def _search(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    """Run the trials, then choose a winner; return the page."""
    closed = close_killed_runs(config, study)
    done = count_done(study.get_trials(deepcopy=False))
    print(f"study {config.study_name}: {done} of {config.n_trials} trials done", end="")
    print(f"; closed {len(closed)} runs of killed processes" if closed else "", flush=True)
    prepare_data(config.training)  # before there are workers, which would all decode the same images
    run_workers(config, study, run.run_id)
    close_killed_runs(config, study)
    done = len(drop_retried(study.get_trials(deepcopy=False)))
    search_runs.log_progress(run.run_id, summarize(config, study), done)
    # Of several searches on one study, the first to come here retrains, tests and reports.
    with lock(config.storage, f"winner-{get_study_id(study)}", wait=False) as is_first:
        return _conclude(config, study, run) if is_first else "Another search is testing the winner."


def _conclude(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    """Choose the winner, retrain, test and register it; return the page."""
    best = choose_best(config, study)
    if best is None:
        raise UserError("no trial has finished; their runs say why")
    figures = plots.plot_trials(config, study)
    run.log_artifacts({f"figures/{name}.png": figure for name, figure in figures.items()})
    trials = study.get_trials(deepcopy=False)
    recipes = winner.choose_recipes(config, trials, best)
    pages = [
        f"### Search {config.study_name}: {config.arch} on {config.data}",
        report.describe_trials(config, study, best),
    ]
    if config.seeds == 0:
        baseline = winner.find_baseline(trials)
        runs = {winner.BASELINE: baseline, winner.WINNER: best} if baseline else {winner.WINNER: best}
        _log_curves(run, {name: trial.user_attrs["run_id"] for name, trial in runs.items()})
    else:
        settings = {name: each.model_dump_json() for name, each in recipes.items()}
        settings |= {"seeds": str(config.seeds), "test": config.test}
        before = study.user_attrs.get("verdict", {})
        if before.get("settings") == settings:
            pages.append(f"{before['page']}\n\nFrom run {before['run_id']}; test was not evaluated again.")
        else:
            page = _retrain_and_test(config, study, run)
            study.set_user_attr("verdict", {"settings": settings, "page": page, "run_id": run.run_id})
            pages.append(page)
    command = winner.write_command(list(recipes.values())[-1])
    run.log_artifacts({"retrain.sh": command + "\n"})
    return "\n\n".join([*pages, f"To train it again:\n\n```sh\n{command}\n```"])


def _retrain_and_test(config: SearchConfig, study: Study, run: TrackedRun) -> str:
    best = choose_best(config, study)
    assert best is not None, "there is a winner to retrain"
    recipes = winner.choose_recipes(config, study.get_trials(deepcopy=False), best)
    retrained = winner.retrain(config, study, recipes, run.run_id)
    first = {each.recipe: each.run_id for each in reversed(retrained)}
    _log_curves(run, {name: first[name] for name in recipes})
    scores, warning = winner.evaluate_on_test(run, retrained) if config.test == "at_end" else (None, "")
    parts = [
        report.describe_winner(retrained, scores, best),
        warning,
        winner.register(config, retrained, scores),
    ]
    return "\n\n".join(filter(None, parts))


def _log_curves(run: TrackedRun, runs: dict[str, str]) -> None:
    """Log the curves of baseline recipe and winner side by side, from their runs by recipe."""
    histories = {name: pd.DataFrame(search_runs.read_curves(run_id)) for name, run_id in runs.items()}
    images = search_runs.read_tag(next(iter(runs.values())), "split.val")
    run.log_artifacts({"figures/recipes.png": plots.plot_recipes(histories, images)})
