"""Many machines: two workers on a study that a real PostgreSQL server keeps."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_search_end_to_end import Search

from search.study import lock

pytest.importorskip("psycopg")
# Debian puts what a server needs beside PATH, in a folder a version.
FOLDERS = [os.environ["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
PROGRAMS = {name: shutil.which(name, path=os.pathsep.join(FOLDERS)) for name in ("initdb", "pg_ctl")}
needs_server = pytest.mark.skipif(not all(PROGRAMS.values()), reason="PostgreSQL is not installed")


def as_server_user(program: str, *options: str, cwd: Path) -> None:
    # PostgreSQL refuses to run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    command = [PROGRAMS[program], *options]
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=120, **user)


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/pg.XXXXXX"], text=True).strip())
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_server_user("initdb", "-D", f"{folder}/data", "-U", "search", "--auth=trust", cwd=folder)
    options = f"-p {port} -k {folder} -h 127.0.0.1"
    as_server_user("pg_ctl", "-D", f"{folder}/data", "-w", "-l", "log", "-o", options, "start", cwd=folder)
    yield f"postgresql+psycopg://search@127.0.0.1:{port}/postgres"
    as_server_user("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop", cwd=folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=needs_server)])
def test_a_lock_is_held_by_one_and_free_afterwards(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/x.db" if kind == "sqlite" else request.getfixturevalue("storage")
    with lock(url, "a"):
        with lock(url, "a", wait=False) as got, lock(url, "b", wait=False) as got_other:
            assert (got, got_other) == (False, True)
    with lock(url, "a", wait=False) as got:
        assert got


@needs_server
@pytest.mark.slow
def test_two_searches_at_once_share_a_study_and_count_its_trials_once(
    storage: str, tmp_path: Path, class_folders: Path
) -> None:
    search = Search(tmp_path, class_folders, storage=storage, epochs=1, heartbeat_s=2)
    try:
        machines = [search.start() for _ in range(2)]
        assert [each.wait(600) for each in machines] == [0, 0], search.log.read_text()
    finally:
        search.kill()
    search.check_books()
    trials = search.read_trials()
    assert len(trials) == 5, "nothing was run again"
    assert [trial.user_attrs.get("baseline") for trial in trials[:3]] == ["baseline recipe", "defaults", None]
