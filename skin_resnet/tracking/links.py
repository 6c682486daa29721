"""Links to pages of the MLflow UI, and the view of the runs table that they open."""

import base64
import json
import time
import zlib
from pathlib import Path
from urllib.parse import quote, urlencode

import mlflow

from skin_resnet.errors import hide_password
from skin_resnet.tracking.store import find_sqlite_file, has_all_tables

LOCAL_SERVER = "http://127.0.0.1:5000"  # of `make ui`, and of `mlflow server` as our output writes it
# A saved view of the runs table, as MLflow's page stores it: a tag of the experiment.
_VIEW = "mlflow.sharedViewState.results"
_COLUMNS = [
    "params.`arch`",
    *(f"metrics.`{name}`" for name in ("best_val_balanced_accuracy", "final_gap")),
    *(f"metrics.`test_{name}`" for name in ("balanced_accuracy", "accuracy", "macro_auc")),
]


def build_link(page: str) -> str:
    """Return the link to a page of the MLflow UI, on the tracking server or on a local one."""
    uri = mlflow.get_tracking_uri()
    server = uri.rstrip("/") if uri.startswith("http") else LOCAL_SERVER
    # Without the workflow type, a new browser opens MLflow's pages for language models.
    return f"{server}/#/{page}?workflowType=machine_learning"


def link_run(run_id: str, text: str = "") -> str:
    """Return a Markdown link to a run's page for pages of the MLflow UI; its text is the run's name."""
    info = mlflow.get_run(run_id).info
    page = f"#/experiments/{info.experiment_id}/runs/{run_id}?workflowType=machine_learning"
    return f"[{text or info.run_name}]({page})"


def link_children(run_id: str, text: str) -> str:
    """Return a Markdown link to the table of a run's child runs."""
    query = urlencode({"searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'"}, quote_via=quote)
    page = f"#/experiments/{mlflow.get_run(run_id).info.experiment_id}/runs?workflowType=machine_learning"
    return f"[{text}]({page}&{query})"


def show_figure(run_id: str, path: str) -> str:
    """Return Markdown that shows a run's figure in its description: the path is one that the server has."""
    return f"![{Path(path).stem}](get-artifact?path={path}&run_uuid={run_id})"


def save_view(experiment_id: str) -> None:
    """Save a view of an experiment's runs with architecture and val and test scores, unless it has one.

    MLflow shows neither params nor metrics in the runs table until they are chosen. The view is in its menu
    "Views", and `describe_experiments` links to it.
    """
    client = mlflow.MlflowClient()
    if _VIEW not in client.get_experiment(experiment_id).tags:
        state = {"selectedColumns": _COLUMNS, "orderByKey": "attributes.start_time", "orderByAsc": False}
        now_ms = int(time.time() * 1000)
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        view = {"name": "results", "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"}
        client.set_experiment_tag(experiment_id, _VIEW, json.dumps(view))


def describe_experiments() -> str:
    """Return a line per experiment that has runs, the newest first, with the link to its table of runs."""
    links = {"no runs yet": build_link("experiments")}
    file = find_sqlite_file(mlflow.get_tracking_uri())
    if file is None or has_all_tables(file):  # a client would create it
        client = mlflow.MlflowClient()
        used = [
            e for e in client.search_experiments() if client.search_runs([e.experiment_id], max_results=1)
        ]
        view = f"&viewStateShareKey={_VIEW.rpartition('.')[2]}"
        links = {
            each.name: build_link(f"experiments/{each.experiment_id}/runs") + view * (_VIEW in each.tags)
            for each in used
        } or links
    return "\n".join(f"{name:12} {link}" for name, link in links.items())


def describe_location(run_id: str) -> str:
    """Return a run's name, its id, and the link to its page in the MLflow UI."""
    run = mlflow.MlflowClient().get_run(run_id)
    uri = mlflow.get_tracking_uri()
    lines = [
        f"run      {run.info.run_name}, {run_id}",
        f"view     {build_link(f'experiments/{run.info.experiment_id}/runs/{run_id}')}",
    ]
    if not uri.startswith("http"):
        lines.append(f"         start first: mlflow server --backend-store-uri {hide_password(uri)}")
    return "\n".join(lines)


if __name__ == "__main__":  # for `make ui`
    print(describe_experiments())
