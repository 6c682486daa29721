"""Weights to start from, checkpoints to evaluate, and names of runs and models."""

import io
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.calibration import fit_calibration
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.checkpoint import FORMAT
from tests.bad_inputs import BadInput, Options
from tests.bad_inputs.tables import with_text, write_data

CLASSES = ("mole", "scar", "wart")
NAN = torch.full((256,), torch.nan)
RAN = "the_code_in_the_pickle_ran"
CODE_NAMES = ("given.pt", "given.pth", "given.safetensors")


class Code:
    """A pickle of this leaves a file behind when it is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.folder / RAN,)


@cache
def build_state(arch: str = "resnet50", classes: int = 3) -> dict[str, Tensor]:
    """A state dict of the right names and shapes, each tensor one number: files of it are small."""
    with torch.device("meta"):
        shapes = build_resnet(arch, classes).state_dict()
    return {
        name: torch.full((), 0.01 if value.is_floating_point() else 0, dtype=value.dtype).expand(value.shape)
        for name, value in shapes.items()
    }


@cache
def build_checkpoint() -> dict[str, Any]:
    """What a finished training of `write_data` leaves; it has learned from the first six photos."""
    ids = [f"photo_{number:02}" for number in range(12)]
    probabilities = torch.softmax(torch.arange(36.0).reshape(12, 3) % 7, dim=1).double().numpy()
    targets = torch.arange(12).remainder(3).numpy()
    guesses = Predictions(probabilities=probabilities, targets=targets, image_ids=tuple(ids))
    return {
        "format": FORMAT, "arch": "resnet50", "classes": list(CLASSES), "image_size": 32,
        "network": build_state(), "epoch": 1, "val": {},
        "config": TrainConfig(image_size=32).model_dump(mode="json"),
        "split": {"train": ids[:6], "val": ids[6:9], "test": ids[9:]}, "split_fingerprints": {},
        "baseline_class": "mole", "leaks": False, "run_id": "",
        "familiarity": {"center": torch.zeros(256), "whitening": torch.eye(256)},
        "license": "unknown",
        "calibration": fit_calibration(guesses, CLASSES, 0.9, np.ones(len(CLASSES), np.int64)),
    }  # fmt: skip


def save(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_weight(content: bytes) -> bytes:
    """Change one byte of the first tensor in an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tensor = next(member for member in archive.infolist() if member.filename.endswith("data/0"))
        value = archive.read(tensor)
    place = content.index(value, tensor.header_offset + len(tensor.filename))
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def with_weights(build: Callable[[Path], bytes], name: str = "given.pth") -> Callable[[Path], Options]:
    """Give `train` a file to start from."""

    def make(folder: Path) -> Options:
        (folder / name).write_bytes(build(folder))
        return {**write_data(folder), "weights": str(folder / name)}

    return make


def with_model(build: Callable[[Path], bytes], name: str = "given.pt") -> Callable[[Path], Options]:
    """Give `evaluate` a file to score, on photos it has not learned from."""

    def make(folder: Path) -> Options:
        (folder / name).write_bytes(build(folder))
        return {**write_data(folder), "model": str(folder / name)}

    return make


def with_checkpoint(**changes: object) -> Callable[[Path], Options]:
    """Change a whole checkpoint; what is set to None is left out."""
    content = {**build_checkpoint(), **changes}
    kept = {name: value for name, value in content.items() if value is not None}
    return with_model(lambda _: save(kept))


def with_config(**changes: object) -> Callable[[Path], Options]:
    return with_checkpoint(config={**build_checkpoint()["config"], **changes})


def with_data_of(change: Callable[[str], str]) -> Callable[[Path], Options]:
    """Give `evaluate` a good checkpoint, and other data."""

    def make(folder: Path) -> Options:
        return {**with_checkpoint()(folder), **with_text(change)(folder)}

    return make


def list_code(make: Callable[..., Callable[[Path], Options]]) -> list[tuple[str, Callable[[Path], Options]]]:
    """Code in a pickle under every usual name: plain, in torch's archive, and among weights."""

    def write_plain(folder: Path) -> bytes:
        return pickle.dumps(Code(folder))

    return [
        *((f"code in {name}", make(write_plain, name)) for name in CODE_NAMES),
        ("code in an archive", make(lambda folder: save(Code(folder)), "given.pt")),
        ("code among weights", make(lambda folder: save({"w": NAN, "x": Code(folder)}), "given.pth")),
    ]


def change_state(**changes: Tensor) -> dict[str, Tensor]:
    return {**build_state(), **{name.replace("__", "."): value for name, value in changes.items()}}


STATE = save(build_state())

WEIGHTS = [
    BadInput(name=name, make=make, told=told)
    for name, make, told in [
        (
            "no such weights",
            lambda folder: {**write_data(folder), "weights": "gone.pth"},
            ("weights", "existing path", "'gone.pth'"),
        ),
        (
            "folder as weights",
            lambda folder: {**write_data(folder), "weights": str(folder)},
            ("there is no file", "weights="),
        ),
        ("empty weights", with_weights(lambda _: b""), ("damaged", "given.pth")),
        ("text as weights", with_weights(lambda _: b"no weights"), ("more than the tensors", "given.pth")),
        ("weights cut off", with_weights(lambda _: cut(STATE)), ("given.pth",)),
        ("a flipped weight", with_weights(lambda _: flip_a_weight(STATE)), ("damaged",)),
        (
            "safetensors cut off",
            with_weights(lambda _: cut(safetensors.torch.save({"w": NAN})), "given.safetensors"),
            ("damaged", "given.safetensors"),
        ),
        ("a list as weights", with_weights(lambda _: save([1, 2])), ("state dict", "given.pth")),
        ("weights without names", with_weights(lambda _: save({1: NAN})), ("state dict", "given.pth")),
        (
            "weights of another arch",
            with_weights(lambda _: save(build_state("resnet101"))),
            ("do not fit resnet50", "missing"),
        ),
        (
            "weights of another shape",
            with_weights(lambda _: save(change_state(conv1__weight=torch.ones(64, 1, 7, 7)))),
            ("do not fit resnet50", "[64, 1, 7, 7]"),
        ),
        (
            "weights that are NaN",
            with_weights(lambda _: save(change_state(layer1__0__bn3__bias=NAN))),
            ("NaN", "'layer1.0.bn3.bias'"),
        ),
        (
            "weights that are whole numbers",
            with_weights(lambda _: save(change_state(layer1__0__bn3__bias=NAN.nan_to_num().char()))),
            ("torch.int8", "dequantized"),
        ),
    ]
] + [BadInput(name=f"weights: {name}", make=make, told=("given.",)) for name, make in list_code(with_weights)]

MODELS = [
    BadInput(name=name, make=make, told=told, command="evaluate")
    for name, make, told in [
        ("no such checkpoint", lambda folder: {"model": f"{folder}/gone.pt"}, ("there is no", "gone.pt")),
        ("no such run", lambda _: {"model": "0" * 32}, ("is not a checkpoint", "0" * 32)),
        (
            "no such model",
            lambda _: {"model": "models:/gone@champion"},
            ("is not a checkpoint", "gone@champion"),
        ),
        ("model without a name", lambda _: {"model": "models:/"}, ("is not a checkpoint", "models:/")),
        ("run without an id", lambda _: {"model": "runs:/"}, ("is not a checkpoint", "runs:/")),
        ("empty checkpoint", with_model(lambda _: b""), ("damaged", "given.pt")),
        ("text as checkpoint", with_model(lambda _: b"no network"), ("damaged", "given.pt")),
        ("checkpoint cut off", with_model(lambda _: cut(save(build_checkpoint()))), ("damaged", "given.pt")),
        (
            "a flipped weight in a checkpoint",
            with_model(lambda _: flip_a_weight(save(build_checkpoint()))),
            ("damaged", "given.pt"),
        ),
        ("weights as checkpoint", with_model(lambda _: STATE), ("not a checkpoint", "given.pt")),
        ("list as checkpoint", with_model(lambda _: save([1])), ("not a checkpoint", "given.pt")),
        ("checkpoint of the future", with_checkpoint(format=99), ("format is 99", "given.pt")),
        ("unfinished training", with_checkpoint(calibration=None), ("not a finished training", "given.pt")),
        ("checkpoint without network", with_checkpoint(network=None), ("'network'", "given.pt")),
        (
            "checkpoint of another arch",
            with_checkpoint(arch="resnet101"),
            ("incompatible version", "given.pt"),
        ),
        ("checkpoint of an unknown arch", with_checkpoint(arch="vgg16"), ("incompatible version", "vgg16")),
        (
            "checkpoint of other classes",
            with_checkpoint(classes=["mole", "wart"]),
            ("incompatible version", "given.pt"),
        ),
        ("checkpoint with a number as split", with_checkpoint(split=3), ("incompatible version", "given.pt")),
        (
            "checkpoint with lists as options",
            with_checkpoint(config=[1]),
            ("incompatible version", "options"),
        ),
        ("checkpoint with an unknown option", with_config(vintage=1), ("incompatible version", "vintage")),
        (
            "checkpoint with an option out of bounds",
            with_config(lr=-1),
            ("incompatible version", "lr should be"),
        ),
        (
            "data of other classes",
            with_data_of(lambda t: t.replace("wart", "zit")),
            ("mole, scar, wart", "'zit'"),
        ),
        (
            "data it has learned",
            with_data_of(lambda t: "\n".join(t.splitlines()[:7])),
            ("no images", "not trained on"),
        ),
    ]
] + [
    BadInput(name=f"model: {name}", make=make, told=("given.",), command="evaluate")
    for name, make in list_code(with_model)
]

RUNS = [
    BadInput(name=name, make=lambda _, runs=runs: {"runs": runs}, told=told, command="compare")
    for name, runs, told in [
        ("unknown runs", "abc,def", ("abc",)),
        ("one run", "abc", ("two different runs", "abc")),
        ("one run twice", "abc,abc", ("two different runs", "'abc,abc'")),
        ("commas only", ",", ("two different runs", "','")),
        ("best of none", "best", ("best",)),
    ]
]
