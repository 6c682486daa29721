"""The test access log: which runs have evaluated which test split. Choosing by test makes it useless."""

from datetime import UTC, datetime

import mlflow


def log_test_access(run_id: str, split_hash: str, model_run_id: str | None = None) -> str:
    """Log on the run of a model that its test split is evaluated: when, by which run, how often.

    Args:
        run_id: The run that evaluates.
        split_hash: Whose test split.
        model_run_id: The model's run; None: the same.

    Returns:
        A warning if other runs of the experiment have evaluated on it before, else nothing.
    """
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    before = client.search_runs([experiment_id], f"tags.`test.accessed` = '{split_hash}'", max_results=1000)
    client.set_tag(run_id, "test.accessed", split_hash)  # by which the next one finds it
    model_run_id = model_run_id or run_id
    try:
        log = client.get_run(model_run_id).data.tags.get("test.access_log", "").splitlines()
        log.append(f"{datetime.now(UTC).isoformat(timespec='seconds')} by {run_id}")
        client.set_tag(model_run_id, "test.access_log", "\n".join(log))
        client.set_tag(model_run_id, "test.access_count", str(len(log)))
    except mlflow.MlflowException:
        pass  # the model's run is not in this store
    others = {each.info.run_id for each in before} - {run_id}
    if not others:
        return ""
    client.set_tag(run_id, "test.accessed_before", str(len(others)))
    return (
        f"**This test split was evaluated before, by {len(others)} run{'s' * (len(others) > 1)} of this "
        "experiment.** The more often it is used, the more optimistic it becomes: choose models on val."
    )
