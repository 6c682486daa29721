"""Starting from weights: what fits is loaded, what does not is named, and no code in a file runs."""

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
    assert "random head (7 classes)" in said
    assert torch.equal(network.fc.weight, head)
    rest = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, imagenet[key]) for key, value in rest.items())


def test_safetensors_and_a_head_of_the_same_size_are_loaded_whole(tmp_path) -> None:
    source, network = build_resnet("resnet50", 3), build_resnet("resnet50", 3)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(network, str(tmp_path / "w.safetensors"), "resnet50").endswith("head included")
    assert torch.equal(network.fc.weight, source.fc.weight)


def test_a_shallower_resnet_starts_a_deeper_one_that_computes_the_same(imagenet, tmp_path) -> None:
    deep, shallow = build_resnet("resnet101").eval(), build_resnet("resnet50").eval()
    weights = save({key: value for key, value in imagenet.items() if "fc" not in key}, tmp_path / "w.pth")
    assert "17 more blocks" in load_weights(deep, weights, "resnet101")
    load_weights(shallow, weights, "resnet50")
    deep.fc = shallow.fc
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(deep(images), shallow(images))


def test_weights_that_lack_a_block_of_their_own_depth_do_not_fit(imagenet, tmp_path) -> None:
    weights = save({k: v for k, v in imagenet.items() if not k.startswith("layer3.5")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"layer3\.5"):
        load_weights(build_resnet("resnet50"), weights, "resnet50")


@pytest.mark.parametrize(("weights", "version"), [("imagenet", "V2"), ("imagenet_v1", "V1")])
def test_either_version_of_torchvisions_weights_can_be_had(
    weights: str, version: str, imagenet, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet50_Weights[f"IMAGENET1K_{version}"].url
    downloaded = tmp_path / "hub" / "checkpoints" / Path(url).name
    downloaded.parent.mkdir(parents=True)
    torch.save(imagenet, downloaded)
    network = build_resnet("resnet50")
    assert f"IMAGENET1K_{version}" in load_weights(network, weights, "resnet50")
    assert torch.equal(network.conv1.weight, imagenet["conv1.weight"])


def test_imagenet_without_a_network_says_what_else_one_can_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(
        "https_proxy", "http://127.0.0.1:9"
    )  # nothing listens there: the download fails at once
    with pytest.raises(UserError, match="pass weights=FILE"):
        load_weights(build_resnet("resnet50"), "imagenet", "resnet50")
