"""The command `search`: from a space of recipes to the one that holds on test."""

from optuna import Study

from search import report, winner
from search.config import SearchConfig
from search.storage import lock, try_lock
from search.study import close_killed_runs, name_session, open_study
from search.trials import choose_best, count_done, drop_retried, find_baseline, summarize
from search.workers import run_workers
from skin_resnet.data.prepare import prepare_data
from skin_resnet.errors import UserError
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking import search_runs


def search(config: SearchConfig) -> None:
    """Run a study in an MLflow run of its own, or go on with it; then retrain its winner and test it.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    # The run first: it makes the store's tables, once for all workers, and holds what may fail from here on.
    with mlflow_run.open_run("search under way") as run_id:
        mlflow_run.log_params(config)
        study, _ = open_study(config)
        with lock(config.storage, name_session(run_id)):
            mlflow_run.set_tags(
                {search_runs.STUDY: study.user_attrs["id"], "search.study": config.study_name}
            )
            note = _search(config, study, run_id)
        print(f"\n{note}")
        mlflow_run.log_text(note, "report.md")
        mlflow_run.log_note(note)
    print(f"\n{mlflow_run.describe_location(run_id)}")


def _search(config: SearchConfig, study: Study, run_id: str) -> str:
    """Run the trials, then choose a winner; give the page."""
    closed = close_killed_runs(config, study)
    done = count_done(study.get_trials(deepcopy=False))
    print(f"study {config.study_name}: {done} of {config.n_trials} trials are done", end="")
    print(f"; {len(closed)} runs of killed processes were closed" if closed else "", flush=True)
    prepare_data(config.training)  # before there are workers: they would all decode the same pictures
    run_workers(config, study, run_id)
    close_killed_runs(config, study)
    trials = study.get_trials(deepcopy=False)
    search_runs.log_progress(run_id, summarize(config, trials), len(drop_retried(trials)))
    # Of several searches on one study, the first to come here retrains, tests and reports.
    with try_lock(config.storage, f"winner-{study.user_attrs['id']}") as is_first:
        return _conclude(config, study, run_id) if is_first else "Another search is at the winner."


def _conclude(config: SearchConfig, study: Study, run_id: str) -> str:
    """Choose the winner, retrain it, test it, register it, and write the page."""
    trials = study.get_trials(deepcopy=False)
    best = choose_best(config, drop_retried(trials))
    if best is None:
        raise UserError(
            f"a search needs a trial that finished, but none of {len(drop_retried(trials))} did; "
            "their runs say why."
        )
    report.log_figures(config, study, best)
    pages = [
        f"### Search {config.study_name}: {config.arch} on {config.data}",
        report.describe_trials(config, trials, best),
    ]
    recipes = winner.choose_recipes(config, trials, best)
    command = winner.write_command(list(recipes.values())[-1])
    if config.seeds == 0:
        baseline = find_baseline(trials, winner.SEED)
        runs = {winner.SEED: baseline, winner.WINNER: best} if baseline else {winner.WINNER: best}
        report.log_curves({name: trial.user_attrs["run_id"] for name, trial in runs.items()})
    else:
        pages.append(_retrain_and_test(config, study, run_id))
    mlflow_run.log_text(command + "\n", "retrain.sh")
    return "\n\n".join([*pages, f"To train it again:\n\n```sh\n{command}\n```"])


def _retrain_and_test(config: SearchConfig, study: Study, run_id: str) -> str:
    trials = study.get_trials(deepcopy=False)
    best = choose_best(config, drop_retried(trials))
    assert best is not None, "there is a winner to retrain"
    recipes = winner.choose_recipes(config, trials, best)
    asked = {name: each.model_dump_json() for name, each in recipes.items()}
    asked |= {"seeds": str(config.seeds), "test": config.test}
    before = study.user_attrs.get("verdict", {})
    if before.get("asked") == asked:
        return f"{before['page']}\n\nAs run {before['run_id']} found; test was not opened again."
    retrained = winner.retrain(config, study, recipes, run_id)
    first = {each.recipe: each.run_id for each in reversed(retrained)}
    report.log_curves({name: first[name] for name in recipes})
    verdict, warning = winner.score_on_test(retrained) if config.test == "at_end" else (None, "")
    told = [report.describe_verdict(retrained, verdict, best), warning, winner.register(config, retrained)]
    page = "\n\n".join(filter(None, told))
    study.set_user_attr("verdict", {"asked": asked, "page": page, "run_id": run_id})
    return page
