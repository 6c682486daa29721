"""Our ResNets against torchvision's: same keys, same shapes, same numbers."""

import pytest
import torch
import torchvision.models

from skin_resnet.model.resnet import STAGE_DEPTHS, Bottleneck, build_resnet


@pytest.mark.parametrize("arch", STAGE_DEPTHS)
def test_keys_and_shapes_are_torchvisions(arch: str) -> None:
    ours = {key: value.shape for key, value in build_resnet(arch, 1000).state_dict().items()}
    theirs = {key: value.shape for key, value in torchvision.models.get_model(arch).state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize("arch", STAGE_DEPTHS)
@pytest.mark.parametrize("train", [True, False])
def test_logits_equal_torchvisions_with_the_same_weights(arch: str, train: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (
        build_resnet(arch).train(train),
        torchvision.models.get_model(arch, num_classes=7).train(train),
    )
    # The last BatchNorm of each block starts at zero in ours: take theirs, where every block takes part.
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("arch", STAGE_DEPTHS)
def test_every_parameter_gets_a_gradient(arch: str) -> None:
    torch.manual_seed(0)
    network = build_resnet(arch)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            torch.nn.init.ones_(module.bn3.weight)  # zero at the start, which would hide the branch behind it
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The sum of all logits is blind to conv biases only; there are none.
    assert without == []


def test_a_fresh_block_is_the_identity_behind_its_shortcut() -> None:
    block = build_resnet("resnet50").layer1[1]
    x = torch.rand(2, 256, 8, 8)
    assert torch.equal(block(x), x)


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    network = build_resnet("resnet50", dropout=0.5, stochastic_depth=0.5)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            torch.nn.init.ones_(module.bn3.weight)
    images = torch.randn(2, 3, 32, 32)
    network.eval()
    assert torch.equal(network(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))


def test_head_and_logits_are_fp32_under_autocast_so_that_top_classes_do_not_tie() -> None:
    torch.manual_seed(0)
    network, images = build_resnet("resnet50").eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_stochastic_depth_rises_linearly_to_its_value() -> None:
    network = build_resnet("resnet50", stochastic_depth=0.3)
    p = [module.stochastic_depth.p for module in network.modules() if isinstance(module, Bottleneck)]
    assert p == pytest.approx([0.3 * block / 15 for block in range(16)])
