"""Links to pages of the MLflow UI, and the view of the runs table that they open."""

import base64
import json
import time
import zlib
from pathlib import Path

import mlflow

from skin_resnet.errors import hide_password
from skin_resnet.tracking.store import find_sqlite_file, has_all_tables

LOCAL_SERVER = "http://127.0.0.1:5000"  # of `make ui`, and of `mlflow server` as our output writes it
# A saved view of the runs table, as MLflow's page stores it: a tag of the experiment.
_VIEW = "mlflow.sharedViewState."
_RESULTS = "results"  # the view of all runs
# The columns with their widths in pixels: together with those of every run they fit on a page of 1,500.
_COLUMNS = {
    "attributes.`Run Name`": 255, "runDateAndNestInfo": 126,
    "params.`arch`": 75, "params.`image_size`": 90, "params.`seed`": 50,
    "metrics.`best_val_balanced_accuracy`": 215, "metrics.`test_balanced_accuracy`": 165,
    "metrics.`test_macro_auc`": 117, "metrics.`final_gap`": 80,
}  # fmt: skip


def build_link(page: str, view: str = "") -> str:
    """Return the link to a page of the MLflow UI, on the tracking server or on a local one."""
    uri = mlflow.get_tracking_uri()
    server = uri.rstrip("/") if uri.startswith("http") else LOCAL_SERVER
    return f"{server}/{_build_path(page, view)}"


def _build_path(page: str, view: str = "") -> str:
    # Without the workflow type, a new browser opens MLflow's pages for language models.
    return f"#/{page}?workflowType=machine_learning" + f"&viewStateShareKey={view}" * bool(view)


def link_run(run_id: str, text: str = "") -> str:
    """Return a Markdown link to a run's page for pages of the MLflow UI; its text is the run's name."""
    info = mlflow.get_run(run_id).info
    return f"[{text or info.run_name}]({_build_path(f'experiments/{info.experiment_id}/runs/{run_id}')})"


def link_view(run_id: str, view: str, text: str) -> str:
    """Return a Markdown link to a saved view of the runs table in a run's experiment."""
    experiment_id = mlflow.get_run(run_id).info.experiment_id
    return f"[{text}]({_build_path(f'experiments/{experiment_id}/runs', view)})"


def show_figure(run_id: str, path: str) -> str:
    """Return Markdown that shows a run's figure in its description: the path is one that the server has."""
    return f"![{Path(path).stem}](get-artifact?path={path}&run_uuid={run_id})"


def cut(markdown: str, longest: int) -> str:
    """Return Markdown of a run, cut after a paragraph if it has more characters than can be shown."""
    if len(markdown) <= longest:
        return markdown
    return markdown[:longest].rpartition("\n\n")[0] + "\n\nThe rest is in the run's artifacts."


def save_view(run_id: str, name: str = _RESULTS, where: str = "") -> None:
    """Save a view of the runs in a run's experiment with their data and scores, unless it is there.

    MLflow shows neither params nor metrics in the runs table until they are chosen. The view is in its menu
    "Views", and `describe_experiments` links to the one of all runs. Runs under a condition `where` are shown
    without their parents, the best on val first; it is in the view, for MLflow ignores one in a view's link.
    """
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    if _VIEW + name not in client.get_experiment(experiment_id).tags:
        state = {
            "selectedColumns": list(_COLUMNS), "columnOrder": list(_COLUMNS), "columnWidths": _COLUMNS,
            "orderByKey": "metrics.`best_val_balanced_accuracy`" if where else "attributes.start_time",
            "orderByAsc": False, "searchFilter": where,
        }  # fmt: skip
        now_ms = int(time.time() * 1000)
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        view = {"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"}
        client.set_experiment_tag(experiment_id, _VIEW + name, json.dumps(view))


def describe_experiments() -> str:
    """Return a line per experiment that has runs, the newest first, with the link to its table of runs."""
    links = {}
    file = find_sqlite_file(mlflow.get_tracking_uri())
    if file is None or has_all_tables(file):  # a client would create it
        client = mlflow.MlflowClient()
        for each in client.search_experiments():
            if client.search_runs([each.experiment_id], max_results=1):
                view = _RESULTS if _VIEW + _RESULTS in each.tags else ""
                links[each.name] = build_link(f"experiments/{each.experiment_id}/runs", view)
    links = links or {"no runs yet": build_link("experiments")}
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
