"""How well unfamiliarity tells images that show no skin: `python -m benchmarks.familiarity MODEL FOLDER`.

Compares what the product uses, the Mahalanobis distance of the first stage's mean features from those of the
training images, with the same of the other stages and with the energy of the logits (Liu et al., NeurIPS
2020). Each has its threshold at the 99th percentile of val; the shares above it are of the model's own test
images, where few should be, and of all images in FOLDER, where all should be.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skin_resnet.config import TrainConfig
from skin_resnet.data.decode import decode_image
from skin_resnet.data.prepare import read_images
from skin_resnet.evaluation.page import format_table
from skin_resnet.model.classifier import build_network, fit_familiarity, measure_unfamiliarity
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import ResNet
from skin_resnet.tracking.models import read_finished

TRAIN_IMAGES = 2000
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@torch.inference_mode()
def describe(network: ResNet, pixels: np.ndarray) -> dict[str, Tensor]:
    """Return the mean features of each stage, (N, C), and the energy, (N,)."""
    found: dict[str, list[Tensor]] = {}
    for batch in torch.split(torch.from_numpy(np.array(pixels)), 64):
        features = network.begin(normalize(to_float(batch)))
        for number in range(1, 5):
            features = features if number == 1 else getattr(network, f"layer{number}")(features)
            found.setdefault(f"stage {number}", []).append(features.mean((2, 3)))
        found.setdefault("energy", []).append(-network.fc(features.mean((2, 3))).logsumexp(dim=1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="A finished training: run id or checkpoint.")
    parser.add_argument("folder", type=Path, help="Images that show no skin.")
    arguments = parser.parse_args()
    checkpoint = read_finished(arguments.model)
    network, size = build_network(checkpoint), checkpoint["image_size"]
    _, store = read_images(TrainConfig.model_validate(checkpoint["config"]))
    split = checkpoint["split"]
    split["train"] = split["train"][:: max(1, len(split["train"]) // TRAIN_IMAGES)]
    parts = {name: describe(network, store.pixels[store.find_rows(ids)]) for name, ids in split.items()}
    files = sorted(file for file in arguments.folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    parts["others"] = describe(network, np.stack([decode_image(file, size) for file in files]))
    rows = []
    for name in parts["val"]:
        scores = {part: features[name] for part, features in parts.items()}
        if name != "energy":
            fitted = fit_familiarity(scores["train"], scores["val"])
            scores = {part: measure_unfamiliarity(each, **fitted) for part, each in scores.items()}
        limit = torch.quantile(scores["val"], 0.99)
        rows.append([name, *(f"{(scores[part] > limit).float().mean():.3f}" for part in ("test", "others"))])
    print(f"{len(files)} other images; {checkpoint['arch']} at {size} px, epoch {checkpoint['epoch']}\n")
    print(format_table(["distance", "test images above", "other images above"], rows))


if __name__ == "__main__":
    main()
