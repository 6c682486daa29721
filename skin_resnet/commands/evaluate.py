"""The command `evaluate`: metrics of a trained network on images it has not been trained on."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from skin_resnet.config import EvaluateConfig, TrainConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.loader import Loader, place_pixels
from skin_resnet.data.split import Split, drop_seen
from skin_resnet.data.store import ImageStore, fingerprint_images, open_store
from skin_resnet.errors import UserError
from skin_resnet.evaluation.artifacts import list_artifacts, show_images
from skin_resnet.evaluation.assess import Assessment, assess
from skin_resnet.evaluation.calibration import fit_calibration
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.page import LEAK_BANNER, format_summary, print_markdown
from skin_resnet.model.resnet import ResNet, build_resnet
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.history import log_test_access
from skin_resnet.tracking.links import describe_location
from skin_resnet.tracking.run import TrackedRun, is_project_run, open_run
from skin_resnet.tracking.store import prepare_store
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import predict


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
        images, store = _read_images(checkpoint, config)
        if store.skipped:
            count = len(store.skipped)
            print(f"skipped  {count} unreadable image{'s' * (count > 1)}")
            run.set_tags({"skipped_images": count})
            run.log_artifacts({"data/skipped_images.json": dict(store.skipped)})
        warning = ""
        split = _get_split(checkpoint)
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


def _read_images(checkpoint: dict[str, Any], config: EvaluateConfig) -> tuple[pd.DataFrame, ImageStore]:
    """Read the images to evaluate on: rows of those that the network has not seen, and all pixels."""
    trained_with = TrainConfig.model_validate(checkpoint["config"])
    is_same = config.data == "same"
    data = trained_with.data if is_same else config.data
    table = extract(data, config.cache_dir, fewest_classes=1)
    image_size = trained_with.image_size if is_same else checkpoint["image_size"]
    on_bad_image = trained_with.on_bad_image if config.on_bad_image == "same" else config.on_bad_image
    store = open_store(table, image_size, config.cache_dir, on_bad_image)
    table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
    split = _get_split(checkpoint)
    if is_same:
        _check_unchanged(checkpoint, table[table.image_id.isin(split.test)], store)
    unseen = drop_seen(_match_classes(table, tuple(checkpoint["classes"])), split)
    if is_same:  # without images that were in no split
        unseen = unseen[unseen.image_id.isin(split.test)].reset_index(drop=True)
    reason = "not in its test split" if is_same else "their lesions were trained on"
    print(f"model    {config.model}: {_describe(checkpoint)}")
    print(f"data     {data}: {len(unseen)} images; {len(table) - len(unseen)} left out: {reason}")
    return unseen, store


def _check_unchanged(checkpoint: dict[str, Any], test: pd.DataFrame, store: ImageStore) -> None:
    """Refuse test images whose ids, pixels or diagnoses are not those of the training."""
    if fingerprint_images(test, store) == checkpoint["split_fingerprints"]["test"]:
        return
    missing = sorted(set(checkpoint["split"]["test"]) - set(test.image_id))
    change = f"{len(missing)} are missing ({missing[0]}, ...)" if missing else "pixels or diagnoses differ"
    raise UserError(
        f"the test images of {checkpoint['config']['data']} have changed since the training: {change}; "
        "restore them, or pass other data with data=..."
    )


def _get_split(checkpoint: dict[str, Any]) -> Split:
    return Split(**{name: tuple(ids) for name, ids in checkpoint["split"].items()})


def read_models(models: str) -> list[dict[str, Any]]:
    """Read the checkpoints that names stand for, separated by commas; see `read_finished`.

    Raises:
        UserError: One cannot be read, or they were not trained on one split at one image size.
    """
    names = [each.strip() for each in models.split(",") if each.strip()]
    checkpoints = {name: read_finished(name) for name in names}
    if not checkpoints:
        raise UserError(f"model: {models!r} names no model; pass a run id, models:/NAME@ALIAS or a file")
    first = checkpoints[names[0]]
    for name, each in checkpoints.items():
        for key in ("classes", "split", "image_size"):
            if each[key] != first[key]:
                raise UserError(
                    f"model: {name} and {names[0]} differ in {key}; average models that were trained on one "
                    "split at one image size"
                )
    return list(checkpoints.values())


def combine(checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a checkpoint that stands for the mean probabilities of several, calibrated for that mean."""
    first = checkpoints[0]
    if len(checkpoints) == 1:
        return first
    val = Predictions(
        probabilities=np.mean([each["val_probabilities"].numpy() for each in checkpoints], axis=0),
        targets=first["val_targets"].numpy(),
        image_ids=tuple(first["split"]["val"]),
    )
    counts = np.array(first["class_counts"])
    calibration = fit_calibration(val, tuple(first["classes"]), first["calibration"]["coverage"], counts)
    return {**first, "members": checkpoints, "calibration": calibration}


def _describe(checkpoint: dict[str, Any]) -> str:
    if "members" in checkpoint:
        return f"mean of {len(checkpoint['members'])} networks"
    return f"{checkpoint['arch']} epoch {checkpoint['epoch']}"


def read_finished(model: str) -> dict[str, Any]:
    """Read the checkpoint that a name stands for: a run id, a model's URI or a file.

    Raises:
        UserError: There is none, it is not of a finished training, or an incompatible version wrote it.
    """
    path = Path(model).expanduser()
    is_file = path.suffix in {".pt", ".pth", ".safetensors"} or path.is_file()
    checkpoint = read_checkpoint(path if is_file else finished_runs.download_checkpoint(model))
    if "calibration" not in checkpoint:
        raise UserError(f"{model!r} is not a finished training; wait until it finishes, or resume it.")
    try:
        TrainConfig.model_validate(checkpoint["config"])
        _get_split(checkpoint).to_frame()
        checkpoint["calibration"]["decision_weights"]
        build_network(checkpoint)
    except Exception as error:  # what another version, or a user, has written can raise any
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the checkpoint of {model!r} was written by an incompatible version ({reason}); train again, or "
            "use the version it was trained with."
        ) from None
    return checkpoint


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
    networks: list[ResNet], table: pd.DataFrame, store: ImageStore, config: TrainConfig | EvaluateConfig
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
    return Predictions(
        probabilities=np.mean(
            [predict(network.to(fabric.device), loader, fabric, views) for network in networks], axis=0
        ),
        targets=table.target.to_numpy(),
        image_ids=tuple(table.image_id),
    )


def build_network(checkpoint: dict[str, Any]) -> ResNet:
    """Build the network of a checkpoint, ready to predict."""
    with torch.device("meta"):  # drawing random weights takes longer than all else here
        network = build_resnet(checkpoint["arch"], len(checkpoint["classes"]))
    network.load_state_dict(checkpoint["network"], assign=True)
    return network.to(memory_format=torch.channels_last).eval()


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
    networks = [build_network(each) for each in checkpoint.get("members", [checkpoint])]
    raw = _predict(networks, table, store, config)
    classes, calibration = tuple(checkpoint["classes"]), checkpoint["calibration"]
    assessment = assess(raw, table, classes, checkpoint["baseline_class"], calibration)
    title = f"Test, {_describe(checkpoint)}"
    views = getattr(config, "tta", 1)
    notes = [
        warning,
        LEAK_BANNER if checkpoint["leaks"] else "",
        f"Predictions are averaged over {views} views; the calibration was fitted with one." * (views > 1),
    ]
    run.log_metrics(assessment.metrics("test"), step=checkpoint["epoch"])
    files = list_artifacts(assessment, "test", title, notes)
    run.log_artifacts(files | show_images(assessment, "test", title, networks[0].cpu(), store))
    return assessment, str(files["test/evaluation.md"])
