"""The tracking store: checked within seconds, and its sqlite database created whole or not at all."""

import logging
import os
import sqlite3
import time
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

import mlflow
import requests
import sqlalchemy
from filelock import FileLock
from mlflow.entities import Experiment
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH as _ARTIFACTS
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from skin_resnet.errors import UserError, hide_password

# How an absent server or a failing database shows itself.
OUTAGES = (mlflow.MlflowException, requests.RequestException, SQLAlchemyError)

EXPERIMENT = "skin-resnet"  # of runs for which the user has not chosen one
_LATER = ", created by the first run"
_TIMEOUT_S = 4
_DATABASES = {"sqlite", "postgresql", "mysql", "mssql"}
_TABLES = {"experiments", "runs", "metrics", "params", "tags"}
# The drivers whose option `connect_timeout` is in seconds.
_DRIVERS_WITH_TIMEOUT = {"psycopg", "psycopg2", "pymysql", "mysqldb"}


def describe_uri() -> str:
    """Return where the tracking store is, without user name and password."""
    return hide_password(mlflow.get_tracking_uri())


def prepare_store() -> None:
    """Check the tracking store, and create its sqlite database if there is none; once per process and URI.

    Processes may do so at the same time, and be killed at any moment: the database appears when it is whole.
    A store that cannot be used is a UserError.
    """
    _prepare(mlflow.get_tracking_uri(), Path.cwd())


@cache
def _prepare(uri: str, folder: Path) -> None:
    """Prepare the store at a URI, which may be relative to the current folder."""
    check_store(create=True)
    # Created here, because MLflow fails if two processes create an experiment at once.
    if not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
        with suppress(mlflow.MlflowException):  # it exists, or opening the run shows what is wrong
            mlflow.MlflowClient().create_experiment(_get_experiment_name())


def _get_experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)


def find_experiment() -> Experiment | None:
    """Return the experiment of new runs; None if it does not exist, or the environment names it by its id."""
    if "MLFLOW_EXPERIMENT_ID" in os.environ:
        return None
    return mlflow.MlflowClient().get_experiment_by_name(_get_experiment_name())


def check_store(*, create: bool = False) -> str:
    """Check the tracking store, create its sqlite database only with `create`, and return where it is.

    Raises:
        UserError: The store cannot be used.
    """
    uri, shown = mlflow.get_tracking_uri(), describe_uri()
    _quiet_mlflow()
    try:
        file = find_sqlite_file(uri)
        if file and not has_all_tables(file):
            if not create:
                return f"{shown}{_LATER}"
            _create_database(make_url(uri), file)
        _connect(uri)
        return shown
    except UserError:
        raise
    except (requests.ConnectionError, requests.Timeout):
        reason = "no server answers there"
    except Exception as error:  # drivers, servers and damaged files fail in countless ways
        text = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
        reason = hide_password(text)[:240]
    raise UserError(
        f"cannot track runs in {shown}: {reason}; check MLFLOW_TRACKING_URI, or unset it to use ./mlflow.db"
    )


def has_store() -> bool:
    """Check the tracking store as `check_store` does, and return whether there is one."""
    return not check_store().endswith(_LATER)


def _quiet_mlflow() -> None:
    """Limit what MLflow prints, and how often it retries an absent server."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # Its tracebacks and urllib3's retries; the exceptions themselves are raised and reported.
    for name in ("mlflow.store.db.utils", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Its links open the pages for language models; ours are printed by `describe_location`.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # With MLflow's seven retries each epoch would wait for minutes while the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


def find_sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite URI; None for other stores, and for databases in memory."""
    if not uri.startswith("sqlite"):
        return None
    url = make_url(uri)
    url.get_dialect()  # fails for an unknown driver
    name = url.database or ":memory:"
    return None if name.startswith((":memory:", "file:")) else Path(name).absolute()


def has_all_tables(file: Path) -> bool:
    """Return whether a sqlite file is a database of MLflow; False if it is absent, empty or half created.

    Raises:
        UserError: It is something else, or holds runs but is damaged.
        sqlite3.Error: It cannot be read.
    """
    if file.is_dir():
        raise UserError(f"the tracking database {file} is a folder; set MLFLOW_TRACKING_URI to a file in it")
    if not file.exists() or not file.stat().st_size:
        return False
    if not os.access(file, os.R_OK | os.W_OK):
        raise UserError(f"the tracking database {file} is not writable; change its permissions")
    # Not read-only: what a killed writer left half done is rolled back.
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=_TIMEOUT_S)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        filled = {
            table
            for table in tables & {"experiments", "alembic_version"}
            if database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
        }
    if len(filled) == 2 and tables >= _TABLES:
        return True
    # MLflow creates its tables in many steps, and then an experiment; without one nothing can be lost.
    is_mlflows = "experiments" in tables and (tables >= _TABLES or tables <= _TABLES)
    if not tables or (is_mlflows and "experiments" not in filled):
        return False
    raise UserError(
        f"{file} is not a complete MLflow database; restore it from a backup, move it away, or set "
        "MLFLOW_TRACKING_URI to another file"
    )


def _create_database(url: URL, file: Path) -> None:
    """Create a sqlite database beside its place, and move it there when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{file}.lock")
    with FileLock(lock, timeout=60):
        # `mlflow run` and `mlflow server` create it without our lock: wait as long as something writes to it.
        while not (is_complete := has_all_tables(file)) and file.exists():
            if time.time() - file.stat().st_mtime > _TIMEOUT_S:
                break
            time.sleep(0.2)
        if not is_complete:
            partial = file.with_name(f"{file.name}.partial")
            _remove(partial)  # of a process that was killed
            partial_uri = url.set(database=str(partial)).render_as_string()
            # Where experiments keep their artifacts is fixed now: below the current folder, as MLflow has it.
            store = SqlAlchemyStore(partial_uri, _ARTIFACTS)  # type: ignore[no-untyped-call]
            store.engine.dispose()
            _remove(file)  # sqlite would apply an old journal to the new database
            partial.replace(file)
        # A process that still waits for this lock, or makes a new one, finds the database complete.
        with suppress(OSError):
            lock.unlink()


def _remove(database: Path) -> None:
    for suffix in ("-journal", "-wal", "-shm", ""):
        Path(f"{database}{suffix}").unlink(missing_ok=True)


def _connect(uri: str) -> None:
    """Connect once, with a time limit, before MLflow does so, which retries for two minutes."""
    scheme = uri.partition(":")[0]
    if scheme in {"http", "https"}:
        # Any answer will do: not every server behind a proxy has this page.
        requests.get(f"{uri.rstrip('/')}/health", timeout=_TIMEOUT_S, stream=True).close()
    elif scheme.partition("+")[0] in _DATABASES:
        url = make_url(uri)
        if url.get_driver_name() in _DRIVERS_WITH_TIMEOUT and "connect_timeout" not in url.query:
            url = url.update_query_dict({"connect_timeout": str(_TIMEOUT_S)})
        sqlalchemy.create_engine(url, poolclass=NullPool).connect().close()
    mlflow.MlflowClient().search_experiments(max_results=1)
