"""The command `search`: from a space of recipes to the one that holds on test."""

from search.config import SearchConfig
from search.storage import lock
from search.study import close_killed_runs, name_session, open_study
from search.trials import choose_best, drop_retried, summarize
from search.workers import run_workers
from skin_resnet.data.prepare import prepare_data
from skin_resnet.tracking import mlflow_run, search_runs


def search(config: SearchConfig) -> None:
    """Run a study in an MLflow run of its own, or go on with it.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    # Before there are workers: they would all make the same tables and decode the same pictures.
    search_runs.create_store()
    prepare_data(config.training)
    study, _ = open_study(config)
    with mlflow_run.open_run("search under way") as run_id, lock(config.storage, name_session(run_id)):
        mlflow_run.set_tags({search_runs.STUDY: study.user_attrs["id"], "search.study": config.study_name})
        mlflow_run.log_params(config)
        close_killed_runs(config, study)
        run_workers(config, study, run_id)
        close_killed_runs(config, study)
        trials = drop_retried(study.get_trials(deepcopy=False))
        search_runs.log_progress(run_id, summarize(config, trials), len(trials))
        best = choose_best(config, trials)
        print(f"best: {best.number if best else None}")
    print(f"\n{mlflow_run.describe_location(run_id)}")
