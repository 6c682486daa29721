"""The book of who opened which test: a test that is looked at often is none."""

from datetime import UTC, datetime

import mlflow


def record_opening(run_id: str, split_hash: str, of: str | None = None) -> str:
    """Record on the run of the model tested that its test is opened: when, by the open run, how often.

    Args:
        run_id: The open run's.
        split_hash: Which split's test.
        of: The model's run; None: the open run is.

    Returns:
        A warning where runs of the same experiment have opened it before, else nothing.
    """
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    before = client.search_runs(
        [run.info.experiment_id], f"tags.`test.opened` = '{split_hash}'", max_results=1000
    )
    # The run that tests is marked, too, so that it is found by the next.
    client.set_tag(run.info.run_id, "test.opened", split_hash)
    model_run_id = of or run.info.run_id
    try:
        tags = client.get_run(model_run_id).data.tags
        now = datetime.now(UTC).isoformat(timespec="seconds")
        openings = [*tags.get("test.openings", "").splitlines(), f"{now} by {run.info.run_id}"]
        client.set_tag(model_run_id, "test.openings", "\n".join(openings))
        client.set_tag(model_run_id, "test.times_opened", str(len(openings)))
    except mlflow.MlflowException:
        pass  # a checkpoint from elsewhere: its run is not in this store
    others = {each.info.run_id for each in before} - {run.info.run_id}
    if not others:
        return ""
    client.set_tag(run.info.run_id, "test.opened_before", str(len(others)))
    return (
        f"**This test was opened before, by {len(others)} run{'s' * (len(others) > 1)} of this experiment.** "
        "The more often it is looked at, the less it is a test: choose between models on val."
    )
