import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skin_resnet.evaluation.artifacts import MAX_CLASSES, choose_examples, choose_stage, compute_gradcam
from skin_resnet.evaluation.plots.assessment import plot_gradcam
from skin_resnet.labels import HAM10000_CLASSES
from skin_resnet.model.resnet import ResNet
from tests.test_metrics import predict_randomly
from tests.test_plots import assert_texts_are_apart


def build_network() -> ResNet:
    """A ResNet of one block a stage, with weights and statistics as if it had been trained."""
    torch.manual_seed(0)
    network = ResNet((1, 1, 1, 1), 4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return network.eval()


def draw_images(number: int = 11) -> Tensor:
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def compute_directly(network: ResNet, images: Tensor, classes: Tensor, stage: int) -> np.ndarray:
    stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    third = network.layer3(network.layer2(network.layer1(stem)))
    last = network.layer4(third)
    features = {3: third, 4: last}[stage]
    logits = network.fc(network.avgpool(last).flatten(1))
    asked = logits[torch.arange(len(images)), classes].sum()
    weights = torch.autograd.grad(asked, features)[0].mean(dim=(2, 3), keepdim=True)
    heat = F.interpolate((weights * features).sum(1, keepdim=True).relu(), (64, 64), mode="bilinear")[:, 0]
    return (heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-30)).detach().numpy()


@pytest.mark.parametrize("stage", [3, 4])
def test_the_heat_is_that_of_a_direct_computation(stage: int) -> None:
    network, images = build_network(), draw_images()
    classes = torch.arange(11) % 4
    heat = compute_gradcam(network, images, classes, stage)
    assert heat.shape == (11, 64, 64)
    assert heat.dtype == np.float32
    assert set(heat.max(axis=(1, 2))) <= {0, 1}  # some classes no place speaks for
    np.testing.assert_allclose(heat, compute_directly(network, images, classes, stage), atol=1e-5)
    other = compute_gradcam(network, images, (classes + 1) % 4, stage)
    assert not np.allclose(heat, other)


@pytest.mark.parametrize("image_size", [32, 48, 49, 64, 96, 97, 128, 224, 450])
def test_the_stage_explained_is_the_last_with_four_by_four_features_or_more(image_size: int) -> None:
    network = build_network()
    features = network.maxpool(network.conv1(torch.zeros(1, 3, image_size, image_size)))
    sides = {}
    for stage in range(1, 5):
        features = getattr(network, f"layer{stage}")(features)
        sides[stage] = features.shape[2]
    fine = [stage for stage in (3, 4) if sides[stage] >= 4]
    assert choose_stage(image_size) == max(fine, default=None)


def test_of_each_class_one_right_and_one_wrong_example_are_chosen() -> None:
    predictions = predict_randomly(400)
    rows = choose_examples(predictions)
    is_right = predictions.predicted == predictions.targets
    for target in range(7):
        chosen, here = rows[predictions.targets[rows] == target], predictions.targets == target
        assert is_right[chosen].sum() == min(1, (here & is_right).sum())
        assert (~is_right[chosen]).sum() == min(1, (here & ~is_right).sum())
    assert len(set(rows)) == len(rows)


def test_of_many_classes_those_with_most_images_are_shown() -> None:
    predictions = predict_randomly(800, classes=40)
    shown = np.unique(predictions.targets[choose_examples(predictions)])
    counts = np.bincount(predictions.targets)
    assert len(shown) == MAX_CLASSES
    assert counts[shown].min() >= np.delete(counts, shown).max()


def test_the_choice_depends_on_ids_but_not_on_the_order_of_images() -> None:
    predictions = predict_randomly(400)
    shuffle = np.random.default_rng(0).permutation(400)
    shuffled = predictions.select(shuffle)
    rows = choose_examples(predictions)
    assert (shuffle[choose_examples(shuffled)] == rows).all()


def test_the_figure_shows_image_and_overlay_of_each_example() -> None:
    predictions = predict_randomly(100)
    rows = choose_examples(predictions)
    images = np.random.default_rng(0).integers(0, 256, (len(rows), 50, 50, 3), dtype=np.uint8)
    heats = np.zeros((len(rows), 50, 50), np.float32)
    heats[:, :25] = 1
    figure = plot_gradcam(images, heats, predictions, rows, HAM10000_CLASSES, "Grad-CAM")
    assert_texts_are_apart(figure)
    nv = predictions.targets == 5
    label = f"Melanocytic nevus (nv)\n{(predictions.predicted[nv] == 5).sum()} of {nv.sum()} right"
    assert label in [axes.get_ylabel() for axes in figure.axes]
    shown = [axes for axes in figure.axes if axes.images]
    for axes, row, image in zip(shown, rows, images, strict=True):
        predicted = predictions.predicted[row]
        word = "right" if predicted == predictions.targets[row] else "wrong"
        assert axes.get_title().startswith(f"{word}: ")
        assert HAM10000_CLASSES[predicted] in axes.get_title()
        assert axes.get_title().endswith(f"p {predictions.probabilities[row, predicted]:.2f}")
        pixels = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(pixels[:, :50], image)
        np.testing.assert_array_equal(pixels[25:, -50:], image[25:])  # no heat, nothing hidden
        assert not np.allclose(pixels[:25, -50:], image[:25].astype(float), atol=20)


def test_long_class_names_are_shortened_to_fit_and_a_class_without_an_example_says_so() -> None:
    predictions = predict_randomly(100, classes=3)
    is_right = predictions.predicted == predictions.targets
    predictions = predictions.select(np.flatnonzero(is_right | (predictions.targets > 0)))
    rows = choose_examples(predictions)
    images, heats = np.zeros((len(rows), 8, 8, 3), np.uint8), np.zeros((len(rows), 8, 8), np.float32)
    classes = ("benign", "melanoma of the skin of the trunk", "other than what is named here")
    figure = plot_gradcam(images, heats, predictions, rows, classes, "Grad-CAM")
    assert_texts_are_apart(figure)
    empty = [axes for axes in figure.axes if not axes.images]
    assert [[text.get_text() for text in axes.texts] for axes in empty] == [["none wrong"]]
