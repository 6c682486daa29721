"""The command clean: what a run needs is kept, whatever is asked for; the rest is listed, then removed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from filelock import FileLock

from skin_resnet.commands.clean import clean
from skin_resnet.commands.config import CleanConfig
from skin_resnet.data.store import open_store
from skin_resnet.errors import UserError
from skin_resnet.training.checkpoint import RunFolder

DAY_S = 86_400


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """Where the tracking store would be."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path / "mlflow.db"
    mlflow.set_tracking_uri(None)


@pytest.fixture
def client(store: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


@pytest.fixture
def config(tmp_path: Path) -> CleanConfig:
    return CleanConfig(cache_dir=tmp_path / "cache", checkpoint_dir=tmp_path / "checkpoints")


def add_run(
    client: mlflow.MlflowClient, config: CleanConfig, status: str, files: str, days_ago: int = 1
) -> Path:
    """Create a run and its checkpoints."""
    run = client.create_run("0", start_time=int(1000 * (time.time() - days_ago * DAY_S)))
    if status == "DELETED":
        client.delete_run(run.info.run_id)
    elif status != "RUNNING":
        client.set_terminated(run.info.run_id, status)
    return add_checkpoints(config, run.info.run_id, files)


def add_checkpoints(config: CleanConfig, name: str, files: str) -> Path:
    folder = config.checkpoint_dir / name
    folder.mkdir(parents=True)
    for file in files.split():
        (folder / file).write_bytes(bytes(3_000_000))
    return folder


def add_images(config: CleanConfig, digit: str, days_ago: float, *, last: str = "atime") -> Path:
    """Create decoded images that were last used, or made, some days ago."""
    folder = config.cache_dir / "stores" / (digit * 32)
    folder.mkdir(parents=True)
    (folder / "pixels.npy").write_bytes(bytes(5_000_000))
    (folder / "store.json").write_text("{}")
    Path(f"{folder}.lock").touch()
    then = time.time() - days_ago * DAY_S
    times = (then, then - 900 * DAY_S) if last == "atime" else (then - 900 * DAY_S, then)
    os.utime(folder / "store.json", times)
    return folder


def list_files(config: CleanConfig) -> set[Path]:
    return {path for folder in (config.cache_dir, config.checkpoint_dir) for path in folder.rglob("*")}


def clean_twice(config: CleanConfig, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], int]:
    """List, which changes nothing, then remove; return why each is kept, empty if it is not, and the size."""
    before = list_files(config)
    clean(config)
    lines = capsys.readouterr().out.splitlines()
    assert list_files(config) == before
    clean(config.with_changes(remove="true"))
    again = capsys.readouterr().out.splitlines()
    names = [Path(line.partition("MB")[2].strip()).name for line in lines[:-1:2]]
    whys = {name: why.strip().partition("kept: ")[2] for name, why in zip(names, lines[1::2], strict=False)}
    assert [line.strip() == "removed" for line in again[1:-1:2]] == [not why for why in whys.values()]
    assert again[-1].partition("MB")[0] == lines[-1].partition("MB")[0]
    return whys, int(lines[-1].partition("MB")[0])


def test_checkpoints_are_removed_only_where_no_run_can_need_them(client, config: CleanConfig, capsys) -> None:
    resumable = [
        add_run(client, config, "KILLED", "last.pt best.pt"),
        add_run(client, config, "FAILED", "last.pt"),
        add_run(client, config, "RUNNING", "last.pt best.pt running.lock"),
        add_checkpoints(config, "f" * 32, "last.pt"),
    ]
    others = [
        add_run(client, config, "RUNNING", "running.lock"),
        add_checkpoints(config, "untracked-7", "best.pt"),
    ]
    gone = [
        add_run(client, config, "FINISHED", "last.pt best.pt"),
        add_run(client, config, "DELETED", "last.pt .last.pt.tmp"),
        add_run(client, config, "KILLED", "best.pt running.lock"),
    ]
    foreign = add_checkpoints(config, "of somebody else", "notes.txt")
    held = RunFolder(add_run(client, config, "FINISHED", "last.pt"))
    held.acquire()
    whys, size = clean_twice(config, capsys)
    held.release()
    assert {name for name, why in whys.items() if "can be resumed" in why} == {
        path.name for path in resumable
    }
    assert {name for name, why in whys.items() if not why} == {path.name for path in gone}
    assert "process" in whys[held.path.name]
    assert all(any(path.iterdir()) for path in [*resumable, *others, foreign, held.path])
    assert not any(path.exists() for path in gone)
    assert size == 18


def test_decoded_images_go_when_they_have_not_been_used_for_some_days(
    client, config: CleanConfig, capsys
) -> None:
    used, made = add_images(config, "1", days_ago=29), add_images(config, "2", days_ago=29, last="mtime")
    old = [add_images(config, "3", days_ago=31), add_images(config, "4", days_ago=31, last="mtime")]
    decoding, foreign = config.cache_dir / "stores" / ("5" * 32 + ".tmp"), config.cache_dir / "stores/mine"
    (config.cache_dir / "stores" / ("6" * 32 + ".lock")).touch()
    for folder in (decoding, decoding.with_name("6" * 32 + ".tmp"), foreign):
        folder.mkdir()
        (folder / "pixels.npy").write_bytes(bytes(1_000_000))
    with FileLock(decoding.with_suffix(".lock")), FileLock(f"{old[0]}.lock"):
        whys, size = clean_twice(config, capsys)
    assert "process" in whys["5" * 32]
    assert "process" in whys["3" * 32]
    assert {name for name, why in whys.items() if not why} == {"4" * 32, "6" * 32}
    assert size == 6
    assert {path.name for path in (config.cache_dir / "stores").glob("*[!k]")} == {
        used.name, made.name, old[0].name, decoding.name, foreign.name
    }  # fmt: skip
    clean(config.with_changes(days=0.0, remove="true"))
    assert {path.name for path in (config.cache_dir / "stores").iterdir()} == {foreign.name}


@pytest.mark.parametrize("status", ["KILLED", "RUNNING"])
def test_images_used_since_a_resumable_run_began_are_kept(
    client, config: CleanConfig, status: str, capsys
) -> None:
    run = add_run(client, config, status, "last.pt", days_ago=60)
    add_run(client, config, "FINISHED", "last.pt", days_ago=90)
    needed, old = add_images(config, "1", days_ago=50), add_images(config, "2", days_ago=70)
    whys, _ = clean_twice(config, capsys)
    assert "a run may need it" in whys[needed.name]
    assert not whys[old.name]
    client.delete_run(run.name)
    whys, _ = clean_twice(config, capsys)
    assert whys == {run.name: "", needed.name: ""}
    assert not list(config.checkpoint_dir.glob("*"))


def test_opening_decoded_images_counts_as_use_and_does_not_change_them(class_folders, config) -> None:
    paths = sorted(map(str, class_folders.rglob("*.png")))[:3]
    table = pd.DataFrame({"image_id": paths, "path": paths})
    key = open_store(table, 32, config.cache_dir, "stop").key
    file = config.cache_dir / "stores" / key / "store.json"
    for _ in range(2):  # the second time, this process has checked it already
        os.utime(file, (1e9, 1e9))
        open_store(table, 32, config.cache_dir, "stop")
        assert time.time() - file.stat().st_atime < DAY_S
        assert file.stat().st_mtime == 1e9


def test_without_a_tracking_store_none_is_created_and_checkpoints_are_kept(
    store: Path, config: CleanConfig, capsys
) -> None:
    clean(config)
    folder = add_checkpoints(config, "0" * 32, "last.pt")
    clean(config.with_changes(remove="true"))
    assert "unknown" in capsys.readouterr().out
    assert folder.exists()
    assert [path.name for path in store.parent.iterdir()] == ["checkpoints"]


def test_while_the_tracking_store_cannot_be_used_nothing_is_removed(store: Path, config: CleanConfig) -> None:
    folders = [add_checkpoints(config, "0" * 32, "best.pt"), add_images(config, "1", days_ago=99)]
    store.write_text("no database")
    with pytest.raises(UserError, match="cannot track runs"):
        clean(config.with_changes(remove="true"))
    assert all(folder.exists() for folder in folders)
