"""Where runs are tracked, and whether that would work: asked within a time limit, and nothing is made."""

import os
import re
import threading
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import sqlalchemy
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from skin_resnet.data.folders import explain_unwritable

_WAIT_S = 3.0
_SERVER_RULE = "MLFLOW_TRACKING_URI must be a server that answers"
_DATABASE_RULE = "the tracking database must be one that MLflow can use"


@dataclass(frozen=True, kw_only=True)
class TrackingState:
    """What there is to say of the tracking store.

    Attributes:
        text: Where it is, without passwords, and what it answered.
        problem: What is wrong: rule, value, what to do; empty when nothing is.
        artifacts: The folder on this machine that artifacts go to; None where they go elsewhere.
    """

    text: str
    problem: str = ""
    artifacts: Path | None = None


def probe_tracking() -> TrackingState:
    """Ask the tracking store that a run would use; at most 3 s."""
    uri = mlflow.get_tracking_uri()
    place = hide_password(uri)
    answers: list[TrackingState] = []
    # A thread, as no timeout of a library covers names that do not resolve and servers that drip.
    asking = threading.Thread(target=lambda: answers.append(_probe(uri, place)), daemon=True)
    asking.start()
    asking.join(_WAIT_S)
    if answers:
        return answers[0]
    return TrackingState(
        text=f"{place}: no answer in {_WAIT_S:g} s",
        problem=f"the tracking store must answer, but {place} does not within {_WAIT_S:g} s; "
        "see whether it runs and can be reached, or set MLFLOW_TRACKING_URI.",
    )


def hide_password(uri: str) -> str:
    """Write a URI without user name and password."""
    return re.sub(r"://[^/?#]*@", "://***@", uri)


def _probe(uri: str, place: str) -> TrackingState:
    scheme = urllib.parse.urlsplit(uri).scheme
    try:
        if scheme in {"http", "https"}:
            return _probe_server(uri, place)
        if scheme.split("+")[0] in {"sqlite", "postgresql", "mysql", "mssql"}:
            return _probe_database(make_url(uri), place)
    except Exception as error:  # the probe of what is broken breaks in ways that nobody can list
        reason = hide_password(f"{type(error).__name__}: {error}".splitlines()[0])
        return TrackingState(
            text=f"{place}: fails",
            problem=f"the tracking store must answer, but {place} fails with {reason}; see whether it runs, "
            "or set MLFLOW_TRACKING_URI.",
        )
    if scheme in {"", "file"} and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in {"true", "1"}:
        return TrackingState(
            text=f"{place}: a folder",
            problem=f"runs must be tracked in a database or on a server, but got the folder {place}, which "
            "MLflow no longer writes to; move it away, or see `mlflow migrate-filestore --help`.",
        )
    return TrackingState(text=f"{place}: not examined")


def _probe_server(uri: str, place: str) -> TrackingState:
    def fail(answer: str, remedy: str) -> TrackingState:
        problem = f"{_SERVER_RULE}, but {place} {answer}; {remedy}."
        return TrackingState(text=f"{place}: {answer}", problem=problem)

    credentials = get_default_host_creds(uri)  # type: ignore[no-untyped-call]

    def ask(endpoint: str, method: str, **options: Any) -> Any:
        limits = {"timeout": _WAIT_S, "max_retries": 0, "raise_on_status": False}
        return http_request(credentials, endpoint, method, **limits, **options)  # type: ignore[no-untyped-call]

    try:
        version = ask("/version", "GET").text.strip()
        answer = ask("/api/2.0/mlflow/experiments/search", "POST", json={"max_results": 1})
    except mlflow.MlflowException as error:
        told = str(error)
        reason = "connection refused" if "refused" in told else "no route to it" if "esolve" in told else ""
        return fail(
            f"cannot be reached ({reason or hide_password(told.splitlines()[0][-160:])})",
            "start it (`mlflow server`), correct MLFLOW_TRACKING_URI, or unset it to track in ./mlflow.db",
        )
    if answer.status_code in {401, 403}:
        return fail(
            f"refuses us ({answer.status_code}: {' '.join(answer.text.split())[:80]})",
            "set MLFLOW_TRACKING_USERNAME and _PASSWORD or _TOKEN, or start it with --allowed-hosts",
        )
    if answer.status_code != 200 or not re.fullmatch(r"\d+\.\d+[\w.+-]{0,20}", version):
        return fail(
            f"does not answer as MLflow does (status {answer.status_code})",
            "correct MLFLOW_TRACKING_URI, or look into the server's log",
        )
    if int(version.split(".")[0]) < int(mlflow.__version__.split(".")[0]):
        return fail(f"is MLflow {version}", f"update it to {mlflow.__version__}, which is used here")
    experiments = answer.json().get("experiments") or [{}]
    artifacts = _find_local_folder(experiments[0].get("artifact_location", ""))
    return TrackingState(text=f"{place}: MLflow {version} answers", artifacts=artifacts)


def _probe_database(url: URL, place: str) -> TrackingState:
    def fail(answer: str, remedy: str) -> TrackingState:
        problem = f"{_DATABASE_RULE}, but {place} {answer}; {remedy}."
        return TrackingState(text=f"{place}: {answer}", problem=problem, artifacts=Path("mlruns"))

    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "mlflow.db")
        if reason := explain_unwritable(file.parent):
            return fail(
                f"cannot be written ({reason})", "start in another folder, or set MLFLOW_TRACKING_URI"
            )
        if not file.exists():
            return TrackingState(text=f"{place}: made by the first run", artifacts=Path("mlruns"))
        if not os.access(file, os.W_OK):
            return fail("cannot be written", "correct its permissions, or set MLFLOW_TRACKING_URI")
        # Read-only, or looking at it would make or mend files.
        url = make_url(f"sqlite:///file:{urllib.request.pathname2url(str(file.absolute()))}?mode=ro&uri=true")
    try:
        schema, location = _read_schema(url)
    except ModuleNotFoundError as error:
        return fail(
            f"needs a driver ({error})", "install it, as psycopg with `pip install 'psycopg[binary]'`"
        )
    except SQLAlchemyError as error:
        reason = hide_password(str(getattr(error, "orig", None) or error).splitlines()[0])
        return fail(f"does not answer ({reason})", "see who else uses it, restore it, or move it away")
    if schema is None:
        return TrackingState(text=f"{place}: empty, the first run makes its tables", artifacts=Path("mlruns"))
    newest, known = _list_revisions()
    if schema not in known:
        return fail(f"has schema {schema}, which MLflow {mlflow.__version__} does not know", "update MLflow")
    if schema != newest:
        return fail(f"has the old schema {schema}", f"back it up, then `mlflow db upgrade {place}`")
    return TrackingState(
        text=f"{place}: its schema {schema} is current",
        artifacts=_find_local_folder(location) or Path("mlruns"),
    )


def _read_schema(url: URL) -> tuple[str | None, str]:
    """Read the schema's revision, None where there are no tables, and where the experiment's artifacts go."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    engine = sqlalchemy.create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table("alembic_version"):
            return None, ""
        schema = connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version"))
        query = sqlalchemy.text("SELECT artifact_location FROM experiments WHERE name = :name")
        return schema, connection.scalar(query, {"name": name}) or ""


def _list_revisions() -> tuple[str | None, set[str]]:
    """Give the schema that this MLflow wants, and all that it can upgrade from."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()}


def _find_local_folder(location: str) -> Path | None:
    parts = urllib.parse.urlsplit(location)
    if not parts.path or parts.scheme not in {"", "file"}:
        return None
    return Path(urllib.request.url2pathname(parts.path))
