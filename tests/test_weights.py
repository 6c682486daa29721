"""Starting from weights: what fits is loaded, what does not is told, and no code in a file runs."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision.models

from skin_resnet.errors import UserError
from skin_resnet.model.resnet import build_resnet
from skin_resnet.model.weights import load_weights


@pytest.fixture(scope="module")
def imagenet() -> dict[str, torch.Tensor]:
    return torchvision.models.resnet50().state_dict()


def save(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def test_none_leaves_the_network_as_it_is() -> None:
    network = build_resnet("resnet50")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert load_weights(network, "none", "resnet50") == "random weights"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"network": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
)
def test_a_file_fills_all_but_a_head_of_another_size(imagenet, tmp_path, wrap) -> None:
    network = build_resnet("resnet50")
    head = network.fc.weight.clone()
    said = load_weights(network, save(wrap(imagenet), tmp_path / "w.pth"), "resnet50")
    assert "head left random (7 classes)" in said
    assert torch.equal(network.fc.weight, head)
    rest = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, imagenet[key]) for key, value in rest.items())


def test_safetensors_and_a_head_of_the_same_size_are_loaded_whole(tmp_path) -> None:
    source, network = build_resnet("resnet50", 3), build_resnet("resnet50", 3)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(network, str(tmp_path / "w.safetensors"), "resnet50").endswith("head included")
    assert torch.equal(network.fc.weight, source.fc.weight)


class Bomb:
    """A pickle that would leave a file behind if it were ever run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_never_run(tmp_path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "w2.pth")
    for name in ("w.pth", "w2.pth"):
        with pytest.raises(UserError, match="tensors only"):
            load_weights(build_resnet("resnet50"), str(tmp_path / name), "resnet50")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 a torn archive"])
def test_a_broken_file_is_told_in_one_line(tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as told:
        load_weights(build_resnet("resnet50"), str(tmp_path / name), "resnet50")
    assert "\n" not in str(told.value)


def test_what_does_not_fit_is_refused(imagenet, tmp_path) -> None:
    cases = {
        "is it another network's": imagenet,
        "holds a list": [1, 2],
        "'conv1.weight' is (64, 1, 7, 7)": {**imagenet, "conv1.weight": torch.zeros(64, 1, 7, 7)},
    }
    for message, state in cases.items():
        arch = "resnet101" if "another" in message else "resnet50"
        with pytest.raises(UserError) as told:
            load_weights(build_resnet(arch), save(state, tmp_path / "w.pth"), arch)
        assert message in str(told.value)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(UserError, match=r"no file 'nowhere\.pth'"):
        load_weights(build_resnet("resnet50"), "nowhere.pth", "resnet50")


def test_imagenet_without_a_network_says_what_else_one_can_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(
        "https_proxy", "http://127.0.0.1:9"
    )  # nothing listens there: the download fails at once
    with pytest.raises(UserError, match="pass weights=FILE"):
        load_weights(build_resnet("resnet50"), "imagenet", "resnet50")
