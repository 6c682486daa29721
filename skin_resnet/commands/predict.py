"""The command `predict`: classify images, and show, write or log the predictions."""

import json
import os
import re
import sys
from glob import glob
from pathlib import Path

import pandas as pd
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from skin_resnet.commands.config import PredictConfig
from skin_resnet.data.sources import list_images
from skin_resnet.data.tables import read_table, replace_nan
from skin_resnet.errors import UserError, expand
from skin_resnet.evaluation.artifacts import explain_prediction
from skin_resnet.evaluation.plots.assessment import overlay
from skin_resnet.model.classifier import Classifier, Pixels
from skin_resnet.tracking.models import load_model
from skin_resnet.tracking.run import open_project_run


def predict(config: PredictConfig) -> int:
    """Classify images; return the exit code: 1 if none of them can be read, else 0.

    Raises:
        UserError: The model cannot be used, there is no image, or a file cannot be written.
    """
    with open_project_run(f"predict · {config.model}") as run:
        if run:
            run.log_params(config)
        try:
            paths, file = find_images(config.images), expand(config.output)
            is_table = file.suffix in {".csv", ".jsonl"} and not file.is_dir()  # refused now, not at the end
            if config.output != "none" and not (is_table and os.access(file.parent, os.W_OK)):
                raise UserError(f"output={file} should be FILE.csv or FILE.jsonl, in a writable folder")
            table = _classify(load_model(config.model, config.device, config.precision), paths, config)
            _print(table) if config.output == "none" else _write(table, file)
        except OSError as error:
            raise UserError(f"cannot use {error.filename}: {error.strerror}; choose another path") from None
        failed, referred = int((table.error != "").sum()), int(table.refer.str.len().gt(0).sum())
        if run:
            run.log_artifacts({"predictions.csv": _flatten(table)})
            if failed == len(table):  # `mlflow run` ends the run FAILED for exit code 1
                run.set_tags({"failure": "no image can be read"})
    counts = f"images: {len(table)}, unreadable: {failed}, to refer: {referred}"
    print(f"{counts}; research software, not a medical device")
    return int(failed == len(table))


def find_images(text: str) -> list[Path]:
    """Return the images that the option `images` names, in its order; a name without any is a UserError."""
    found: list[Path] = []
    for name in [text] if os.path.exists(text) else re.split("\n" if "\n" in text else " *, *", text):
        pattern, before = str(expand(name)), len(found)
        matches = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
        for path in map(Path, matches):
            if path.is_dir():
                found += list_images(path)
            elif path.suffix.lower() == ".csv":
                found += [path.parent / each for each in read_table(path, required=("path",)).path]
            else:
                found.append(path)
        if len(found) == before:
            raise UserError(f"images: there is none at {name!r}; pass files, folders, a pattern or a CSV")
    return found


def _classify(classifier: Classifier, paths: list[Path], config: PredictConfig) -> pd.DataFrame:
    """Return the predictions, with the path in front; write Grad-CAM images if they are asked for."""
    folder, numbered, tables = expand(config.explain), enumerate(paths, 1), list[pd.DataFrame]()
    is_shown = sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ
    with tqdm(total=len(paths), unit=" img", leave=False, disable=not is_shown) as bar:
        for table, images in classifier.predict_batches(paths, config.batch_size):
            for image, code, (number, path) in zip(images, table.prediction, numbered, strict=False):
                if config.explain != "none" and not isinstance(image, str):
                    shown = _explain(classifier, image, code)
                    folder.mkdir(parents=True, exist_ok=True)
                    shown.save(folder / f"{number}_{path.stem}.png")  # numbered, because names may repeat
            tables.append(table)
            bar.update(len(table))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "path", [os.fsencode(path).decode(errors="backslashreplace") for path in paths])
    return table


def _explain(classifier: Classifier, image: Pixels, code: str) -> Image.Image:
    """Return an image beside its Grad-CAM."""
    heat = explain_prediction(classifier, image, code)
    if heat is None:
        raise UserError("explain: Grad-CAM needs a run or checkpoint, no exported model, of image_size > 48")
    return Image.fromarray(overlay(image, heat))


def _print(table: pd.DataFrame) -> None:
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in table.path])
    malignant = ["p_malignant"] if "p_malignant" in table else []
    headers = ("image", "prediction", "p", "set", *malignant, "refer")
    grid = Table(*headers, box=None, pad_edge=False, collapse_padding=True)
    grid.columns[0].overflow = "fold"  # names stay whole
    for row in table.to_dict("records"):
        cells = [row["error"], *[""] * (2 + len(malignant)), "unreadable"]
        if not row["error"]:
            code = row["prediction"]
            p, *others = (f"{row[name]:.2f}" for name in (code, *malignant))
            label = " ".join(dict.fromkeys((code, row["name"])))
            cells = [label, p, " ".join(row["set"]), *others, row["refer"]]
        grid.add_row(os.path.relpath(row["path"], base), *cells)
    Console(highlight=False, markup=False, emoji=False).print(grid)


def _flatten(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(set=table.set.str.join("|"))  # names of classes may have spaces


def _write(table: pd.DataFrame, file: Path) -> None:
    """Write the predictions to a file, whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        if file.suffix == ".csv":
            _flatten(table).to_csv(temporary, index=False)
        else:
            lines = [json.dumps(row, ensure_ascii=False) for row in replace_nan(table).to_dict("records")]
            temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
