"""From image files to a table of predictions: what `predict`, the app and the served model share."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skin_resnet.data.decode import BadImageError, decode_image
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import ResNet, build_resnet

Pixels = NDArray[np.uint8]
# Pixels uint8 (N, S, S, 3) to probabilities float64 (N, K) and unfamiliarity float64 (N,).
Score = Callable[[Pixels], tuple[NDArray[np.float64], NDArray[np.float64]]]

_RIDGE = 0.1  # added to the diagonal of a correlation matrix: fewer images than features must do
FAMILIAR = 0.99  # share of val images that count as familiar
_TINY = float(np.finfo(np.float32).tiny)


class Scorer(nn.Module):
    """Pixels to calibrated probabilities and unfamiliarity, by one network or the mean of several.

    It holds the preprocessing after decoding, and is what is exported.
    """

    center: Tensor
    whitening: Tensor

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        super().__init__()
        members = checkpoint.get("members", [checkpoint])
        self.members = tuple(build_network(each) for each in members)
        self.networks = nn.ModuleList(self.members)  # by which they move between devices
        self.temperature = float(checkpoint["calibration"]["temperature"])
        for name in ("center", "whitening"):
            self.register_buffer(name, torch.stack([each["familiarity"][name] for each in members]))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map pixels uint8 (N, S, S, 3) to probabilities (N, K) and unfamiliarity (N,), both float32."""
        images = normalize(to_float(pixels))
        probabilities, unfamiliarity = [], []
        for network, center, whitening in zip(self.members, self.center, self.whitening, strict=True):
            features = network.begin(images)
            probabilities.append(network.classify(features).softmax(dim=1))
            unfamiliarity.append(measure_unfamiliarity(features.float().mean((2, 3)), center, whitening))
        logs = torch.stack(probabilities).mean(dim=0).clamp_min(_TINY).log()
        return (logs / self.temperature).softmax(dim=1), torch.stack(unfamiliarity).mean(dim=0)


def build_network(checkpoint: Mapping[str, Any]) -> ResNet:
    """Build the network of a checkpoint, ready to predict."""
    with torch.device("meta"):  # drawing random weights takes longer than all else here
        network = build_resnet(checkpoint["arch"], len(checkpoint["classes"]))
    network.load_state_dict(checkpoint["network"], assign=True)
    return network.to(memory_format=torch.channels_last).eval()


def fit_familiarity(train: Tensor, val: Tensor) -> dict[str, Tensor]:
    """Fit what an image of the training's kind looks like, from features of the first stage, (N, C).

    Unfamiliarity is the Mahalanobis distance from the training images, scaled so that `FAMILIAR` of the val
    images are below 1. The first stage's features separate images that show no skin; those of the last
    stage, and the energy of the logits, do not (benchmarks/familiarity.py).
    Source: Lee, Lee, Lee, Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples",
    NeurIPS 2018, section 2.1; one Gaussian instead of one per class.

    Returns:
        `center` (C,) and `whitening` (C, C), float32, as `measure_unfamiliarity` takes them.
    """
    train, val = train.double(), val.double()
    center, scale = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    correlation = torch.cov(((train - center) / scale).T) + _RIDGE * torch.eye(len(center))
    whitening = torch.linalg.inv(torch.linalg.cholesky(correlation)).T / scale[:, None]
    limit = torch.quantile(measure_unfamiliarity(val, center, whitening), FAMILIAR)
    return {"center": center.float(), "whitening": (whitening / limit).float()}


def measure_unfamiliarity(features: Tensor, center: Tensor, whitening: Tensor) -> Tensor:
    """Return how unlike the training images some are, (N,), from features of the first stage, (N, C)."""
    whitened = (features - center).double() @ whitening.double()  # which autocast leaves alone
    return whitened.square().sum(dim=1).sqrt().to(features.dtype)


def describe(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a classifier needs to know besides the networks: plain values, as for JSON."""
    members = checkpoint.get("members", [checkpoint])
    return {
        "classes": list(checkpoint["classes"]),
        "image_size": int(checkpoint["image_size"]),
        "calibration": dict(checkpoint["calibration"]),
        "license": checkpoint["license"],
        "version": "+".join(f"{each['run_id'][:8]}-epoch{each['epoch']}" for each in members),
    }


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Classifies images of skin lesions, given as files or their bytes (JPEG, PNG, ...).

    Attributes:
        facts: From `describe`.
        score: What computes the probabilities.
        networks: For Grad-CAM; none of an exported model.
    """

    facts: Mapping[str, Any]
    score: Score
    networks: tuple[ResNet, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class codes, in the order of the probabilities."""
        return tuple(self.facts["classes"])

    @property
    def columns(self) -> dict[str, str]:
        """The table's columns and their kinds: `string`, `double`, or `strings`, a list."""
        malignant = {"p_malignant": "double"} if self.classes == HAM10000_CLASSES else {}
        return {
            "prediction": "string", "name": "string", **dict.fromkeys(self.classes, "double"),
            "set": "strings", **malignant, "refer": "string", "unfamiliarity": "double",
            "model_version": "string", "error": "string",
        }  # fmt: skip

    def predict(self, images: Iterable[Path | str | bytes], batch_size: int = 64) -> pd.DataFrame:
        """Classify images: paths, or the bytes of files.

        Returns:
            A row per image: prediction (by the decision rule), its full name, the calibrated probability of
            each class, set (the conformal set), p_malignant (where the classes are the seven diagnoses),
            refer (`unfamiliar` if the image is unlike the training images; `uncertain` if the set has several
            classes; else empty), unfamiliarity (above 1: unfamiliar), model_version, and error: why the image
            cannot be read, empty if it can.
        """
        tables = [table for table, _ in self.predict_batches(images, batch_size)]
        return pd.concat(tables, ignore_index=True) if tables else self._tabulate([])

    def predict_batches(
        self, images: Iterable[Path | str | bytes], batch_size: int = 64
    ) -> Iterator[tuple[pd.DataFrame, list[Pixels | str]]]:
        """Yield the rows of each batch as `predict`, with the images' pixels; decodes the next meanwhile."""
        todo, waiting = list(images), list[Future[Pixels | str]]()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(todo) + batch_size, batch_size):
                decoding = [pool.submit(self._decode, each) for each in todo[start : start + batch_size]]
                if waiting:
                    decoded = [each.result() for each in waiting]
                    yield self._tabulate(decoded), decoded
                waiting = decoding

    def _decode(self, image: Path | str | bytes) -> Pixels | str:
        """Return an image's pixels, or why it cannot be read."""
        try:
            file = io.BytesIO(image) if isinstance(image, bytes) else Path(image)
            return decode_image(file, self.facts["image_size"])
        except BadImageError as error:
            return str(error)

    def _tabulate(self, decoded: list[Pixels | str]) -> pd.DataFrame:
        good = [row for row, each in enumerate(decoded) if not isinstance(each, str)]
        records = [{"error": each if isinstance(each, str) else ""} for each in decoded]
        if good:
            scores = self.score(np.stack([decoded[row] for row in good]))
            for row, probabilities, unfamiliarity in zip(good, *scores, strict=True):
                records[row] |= self._judge(probabilities, float(unfamiliarity))
        kinds = {name: float if kind == "double" else object for name, kind in self.columns.items()}
        return pd.DataFrame(records, columns=list(kinds)).astype(kinds)

    def _judge(self, probabilities: NDArray[np.float64], unfamiliarity: float) -> dict[str, Any]:
        """Return the row of an image."""
        calibration, names = self.facts["calibration"], {each.code: each.name for each in DIAGNOSES}
        chosen = int((probabilities * calibration["decision_weights"]).argmax())
        code = self.classes[chosen]
        inside = probabilities >= calibration["least_probability"]
        inside[chosen] = True
        p = dict(zip(self.classes, probabilities.tolist(), strict=True))
        row: dict[str, Any] = {"prediction": code, "name": names.get(code, code), **p}
        if "p_malignant" in self.columns:
            row["p_malignant"] = sum(p[each.code] for each in DIAGNOSES if each.malignant)
        refer = "unfamiliar" if unfamiliarity > 1 else "uncertain" if inside.sum() > 1 else ""
        return row | {
            "set": [name for name, is_in in zip(self.classes, inside, strict=True) if is_in],
            "refer": refer, "unfamiliarity": unfamiliarity, "model_version": self.facts["version"],
        }  # fmt: skip


def build_classifier(
    checkpoint: Mapping[str, Any],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Classifier:
    """Build the classifier of a finished training's checkpoint, on a device."""
    scorer = Scorer(checkpoint).to(device)

    @torch.inference_mode()
    def score(pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        with autocast():
            probabilities, unfamiliarity = scorer(torch.from_numpy(pixels).to(device))
        return probabilities.double().cpu().numpy(), unfamiliarity.double().cpu().numpy()

    return Classifier(facts=describe(checkpoint), score=score, networks=scorer.members)
