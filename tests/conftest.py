"""What several test modules share: small real data."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow.store.db.utils
import numpy as np
import pandas as pd
import pytest
import sqlalchemy
from PIL import Image

from skin_resnet.labels import HAM10000_CLASSES

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_EXPERIMENT_NAME"] = "Default"  # where `mlflow.search_runs()` looks
# Before torch is imported, and for the processes that tests start: on images this small a second thread
# gains nothing, and on a busy machine two that wait for each other take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def make_table(lesions_per_class: int = 12, classes: tuple[str, ...] = HAM10000_CLASSES) -> pd.DataFrame:
    """A table as `extract` gives it; every third lesion has three images."""
    rows = []
    for target, dx in enumerate(classes):
        for lesion in range(lesions_per_class):
            for photo in range(3 if lesion % 3 == 0 else 1):
                name = f"{dx}_{lesion:03}_{photo}"
                rows.append(
                    (name, f"L_{dx}_{lesion:03}", dx, target, f"/nowhere/{name}.png", 50.0, "male", "back")
                )
    columns = ["image_id", "lesion_id", "dx", "target", "path", "age", "sex", "localization"]
    table = pd.DataFrame(rows, columns=columns).sort_values("image_id", ignore_index=True)
    return table.assign(dx=pd.Categorical(table.dx, categories=list(classes), ordered=True))


def write_class_folders(folder: Path, images_per_class: int = 12, size: int = 32) -> Path:
    """A folder per class of small images that a network can tell apart: each class has its color."""
    rng = np.random.default_rng(0)
    for dx, color in (("blue", (60, 80, 200)), ("green", (60, 200, 80)), ("red", (200, 60, 80))):
        (folder / dx).mkdir(parents=True)
        for number in range(images_per_class):
            pixels = np.clip(rng.normal(color, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / dx / f"{dx}_{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("data") / "folders")


@pytest.fixture(scope="session", autouse=True)
def _migrate_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy the tracking stores of this process from a first one: MLflow's migrations take seconds."""
    first = tmp_path_factory.mktemp("first") / "mlflow.db"
    migrate = mlflow.store.db.utils._initialize_tables

    def copy(engine: sqlalchemy.Engine) -> None:
        if engine.dialect.name != "sqlite" or not engine.url.database:
            migrate(engine)
            return
        if not first.exists():
            own = sqlalchemy.create_engine(f"sqlite:///{first}")
            migrate(own)
            own.dispose()
        with closing(sqlite3.connect(first)) as source, closing(sqlite3.connect(engine.url.database)) as new:
            source.backup(new)

    mlflow.store.db.utils._initialize_tables = copy
    yield
    mlflow.store.db.utils._initialize_tables = migrate
