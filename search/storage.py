"""Where a study is kept, and locks that a killed process lets go of."""

import contextlib
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from search.config import hide_password
from skin_resnet.data.folders import lock_file
from skin_resnet.errors import UserError

GRACE = 4  # heartbeats that a trial may miss before it counts as killed
_WAIT_S = 60  # for a database that others are writing to


def open_storage(url: str, heartbeat_s: int) -> RDBStorage:
    """Open a study's storage, with its tables made if there are none.

    Raises:
        UserError: It cannot be opened.
    """
    is_sqlite = url.startswith("sqlite")
    engine_kwargs = {"connect_args": {"timeout": _WAIT_S}} if is_sqlite else {"pool_pre_ping": True}
    try:
        # Several processes that make the tables at once would fail.
        with lock(url, "schema"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return RDBStorage(
                url,
                engine_kwargs=engine_kwargs,
                heartbeat_interval=heartbeat_s,
                grace_period=GRACE * heartbeat_s,
            )
    except (OSError, ImportError, RuntimeError, StorageInternalError, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        name = hide_password(url)
        raise UserError(f"storage must be a database that opens, but {name!r} does not ({reason}).") from None


@contextlib.contextmanager
def lock(url: str, name: str) -> Iterator[None]:
    """Wait for a lock that all processes with this storage share, hold it, and let it go.

    The operating system, or PostgreSQL, lets go of it when the process dies, however it dies.
    """
    with _try_lock(url, name, wait=True):
        yield


@contextlib.contextmanager
def try_lock(url: str, name: str) -> Iterator[bool]:
    """Hold a lock if it is free; give whether it was."""
    with _try_lock(url, name, wait=False) as got:
        yield got


def _try_lock(url: str, name: str, *, wait: bool) -> contextlib.AbstractContextManager[bool]:
    if url.startswith("sqlite"):
        database = make_url(url).database or "optuna.db"
        folder = Path(f"{database}.locks")
        folder.mkdir(exist_ok=True)
        return lock_file(folder / name, wait=wait)
    return _lock_postgresql(url, name, wait=wait)


@contextlib.contextmanager
def _lock_postgresql(url: str, name: str, *, wait: bool) -> Iterator[bool]:
    key = zlib.crc32(f"skin-resnet search {name}".encode())
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if wait:
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(key)))
            yield True
        else:
            yield bool(connection.scalar(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_lock(key))))
