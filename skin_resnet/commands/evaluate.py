"""The command `evaluate`: metrics of a trained network on images it has not been trained on."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from skin_resnet.commands.config import EvaluateConfig
from skin_resnet.config import TrainConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.loader import Loader, place_pixels
from skin_resnet.data.split import drop_seen
from skin_resnet.data.store import ImageStore, fingerprint_images, open_store
from skin_resnet.errors import UserError
from skin_resnet.evaluation.artifacts import list_artifacts, show_images
from skin_resnet.evaluation.assess import Assessment, assess
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.page import LEAK_BANNER, format_summary, print_markdown
from skin_resnet.model.classifier import build_network, measure_unfamiliarity
from skin_resnet.tracking.history import log_test_access
from skin_resnet.tracking.links import describe_location
from skin_resnet.tracking.models import combine, get_split, read_models, recalibrate
from skin_resnet.tracking.run import TrackedRun, is_project_run, open_run
from skin_resnet.tracking.store import prepare_store
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import extract_features, predict


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate a trained network in an MLflow run of its own, and print the metrics.

    Images of lesions that the network was trained on are left out, as far as their ids tell: of its own data
    the test split remains, of other data usually everything.

    Raises:
        UserError: The model or the data cannot be used.
    """
    with ExitStack() as stack:
        # Refused before a run is opened; what `mlflow run` has opened ends with the reason.
        opened = stack.enter_context(open_run("evaluate")) if is_project_run() else None
        prepare_store()
        members = read_models(config.model)
        checkpoint = combine(members)
        run = opened or stack.enter_context(open_run("evaluate"))
        run.log_params(config)
        run.rename(f"evaluate · {_name(members, config)}")
        run.set_tags(
            {
                **{
                    f"model.{key}": ", ".join(dict.fromkeys(str(each[key]) for each in members))
                    for key in ("run_id", "arch", "epoch")
                },
                "split.leaks": str(checkpoint["leaks"]).lower(),
            }
        )
        images, val, store = _read_images(checkpoint, config)
        if config.tta > 1 and len(val):  # the mean of several views is surer than one
            checkpoint = recalibrate(checkpoint, _predict(members, val, store, config))
        if store.skipped:
            count = len(store.skipped)
            print(f"skipped  {count} unreadable image{'s' * (count > 1)}")
            run.set_tags({"skipped_images": count})
            run.log_artifacts({"data/skipped_images.json": dict(store.skipped)})
        warning = ""
        split = get_split(checkpoint)
        if set(split.test) & set(images.image_id):
            warning = max(log_test_access(run.run_id, split.hash, each["run_id"]) for each in members)
        assessment, page = assess_and_log(run, checkpoint, images, store, config, warning)
        run.describe(f"{format_summary(assessment, 'test')}\n\n{page}")
        print_markdown(page)
    print(f"\n{describe_location(run.run_id)}")


def _name(members: list[dict[str, Any]], config: EvaluateConfig) -> str:
    """Return what is evaluated on what: `resnet50 · demo · test`, `3 runs · my_clinic`."""
    model = f"{len(members)} runs" if len(members) > 1 else members[0]["arch"]
    is_same = config.data == "same"
    data = Path(members[0]["config"]["data"] if is_same else config.data).stem
    return f"{model} · {data}" + " · test" * is_same


def _read_images(
    checkpoint: dict[str, Any], config: EvaluateConfig
) -> tuple[pd.DataFrame, pd.DataFrame, ImageStore]:
    """Read the images to evaluate on: rows of those the network has not seen, rows of its val, all pixels.

    There are rows of val for the training's own data only.
    """
    trained_with = TrainConfig.model_validate(checkpoint["config"])
    is_same = config.data == "same"
    data = trained_with.data if is_same else config.data
    table = extract(data, config.cache_dir, fewest_classes=1)
    image_size = trained_with.image_size if is_same else checkpoint["image_size"]
    on_bad_image = trained_with.on_bad_image if config.on_bad_image == "same" else config.on_bad_image
    store = open_store(table, image_size, config.cache_dir, on_bad_image)
    table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
    split = get_split(checkpoint)
    table = _match_classes(table, tuple(checkpoint["classes"]))
    test, val = (table[table.image_id.isin(ids)].reset_index(drop=True) for ids in (split.test, split.val))
    if is_same:
        _check_unchanged(checkpoint, "test", test, store)
    if is_same and config.tta > 1:
        _check_unchanged(checkpoint, "val", val, store)
    unseen, val = (test, val) if is_same else (drop_seen(table, split), val[:0])
    reason = "not in its test split" if is_same else "their lesions were trained on"
    print(f"model    {config.model}: {_describe(checkpoint)}")
    print(f"data     {data}: {len(unseen)} images; {len(table) - len(unseen)} left out: {reason}")
    return unseen, val, store


def _check_unchanged(checkpoint: dict[str, Any], split: str, rows: pd.DataFrame, store: ImageStore) -> None:
    """Refuse images of a split whose ids, pixels or diagnoses are not those of the training."""
    if fingerprint_images(rows, store) == checkpoint["split_fingerprints"][split]:
        return
    missing = sorted(set(checkpoint["split"][split]) - set(rows.image_id))
    change = f"{len(missing)} are missing ({missing[0]}, ...)" if missing else "pixels or diagnoses differ"
    raise UserError(
        f"the {split} images of {checkpoint['config']['data']} have changed since the training: {change}; "
        "restore them, or pass other data with data=..."
    )


def _describe(checkpoint: dict[str, Any]) -> str:
    if "members" in checkpoint:
        return f"mean of {len(checkpoint['members'])} networks"
    return f"{checkpoint['arch']} epoch {checkpoint['epoch']}"


def _match_classes(table: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """Number the table's diagnoses in the model's class order."""
    unknown = sorted(set(table.dx) - set(classes))
    if unknown:
        raise UserError(
            f"the data has the class {unknown[0]!r}, which the model does not know ({', '.join(classes)})."
        )
    dx = pd.Categorical(table.dx.astype(str), categories=list(classes), ordered=True)
    return table.assign(dx=dx, target=dx.codes.astype("int64"))


def _predict(
    members: list[dict[str, Any]],
    table: pd.DataFrame,
    store: ImageStore,
    config: TrainConfig | EvaluateConfig,
) -> Predictions:
    if table.empty:
        raise UserError("there are no images the model was not trained on; pass other data.")
    fabric = build_fabric(config.device, config.precision, devices=1)
    loader = Loader(
        pixels=place_pixels(store, fabric.device),
        device=fabric.device,
        rows=store.find_rows(tuple(table.image_id)),
        targets=torch.tensor(table.target.to_numpy()),
        batch_size=config.batch_size,
    )
    views = getattr(config, "tta", 1)
    probabilities, unfamiliarity = [], []
    for member in members:
        network = build_network(member).to(fabric.device)
        probabilities.append(predict(network, loader, fabric, views))
        features = extract_features(network, loader)
        unfamiliarity.append(measure_unfamiliarity(features, **member["familiarity"]).numpy())
    return Predictions(
        probabilities=np.mean(probabilities, axis=0),
        targets=table.target.to_numpy(),
        image_ids=tuple(table.image_id),
        unfamiliarity=np.mean(unfamiliarity, axis=0),
    )


def assess_and_log(
    run: TrackedRun,
    checkpoint: dict[str, Any],
    table: pd.DataFrame,
    store: ImageStore,
    config: TrainConfig | EvaluateConfig,
    warning: str = "",
) -> tuple[Assessment, str]:
    """Evaluate the network of a checkpoint, or its members, on a table's images; log everything on a run.

    Returns:
        The evaluation, and its page.

    Raises:
        UserError: There is no image, or the network's output is not finite.
    """
    members = checkpoint.get("members", [checkpoint])
    raw = _predict(members, table, store, config)
    classes, calibration = tuple(checkpoint["classes"]), checkpoint["calibration"]
    assessment = assess(raw, table, classes, checkpoint["baseline_class"], calibration)
    title = f"Test, {_describe(checkpoint)}"
    views = getattr(config, "tta", 1)
    only_one = "" if config.data == "same" else "; the calibration was fitted with one"
    notes = [
        warning,
        LEAK_BANNER if checkpoint["leaks"] else "",
        f"Predictions are averaged over {views} views{only_one}." * (views > 1),
    ]
    run.log_metrics(assessment.metrics("test"), step=checkpoint["epoch"])
    files = list_artifacts(assessment, "test", title, notes)
    run.log_artifacts(files | show_images(assessment, "test", title, build_network(members[0]), store))
    return assessment, str(files["test/evaluation.md"])
