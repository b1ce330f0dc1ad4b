"""ICNet: its size, its layers and its heads."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import icnet
from icnet import ICNet

HEADS = ("head_deep32", "head_fused16", "head_fused8")


@pytest.mark.parametrize("width, weights, billions", [
    (1, 6_710_411, 1.41),
    (2, 26_755_275, 5.56),
])
def test_stages_and_their_totals(width, weights, billions, capsys):
    with FlopCounterMode(display=False) as counter:
        icnet.print_stages(ICNet(width=width), 320)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, abs=0.01)
    text = capsys.readouterr().out
    assert f"({1024 * width}, 10, 10)" in text
    last = text.splitlines()[-1]
    assert f"{weights:,} weights" in last


def test_layers_are_the_sources():
    model = ICNet(5, 0.1)
    expected = dict(conv1=1, conv2=1, conv3_1=1, conv3_2=1, detail=1)
    expected |= dict(conv4=2, conv5=4, fuse16=2, fuse8=2)
    blocks = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            stage = name.split(".")[0]
            assert layer.dilation[0] == expected[stage]
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.momentum == 0.05
        if isinstance(layer, icnet.Bottleneck):
            scale = layer.branch[-1][-1].weight
            assert (scale == 0.25).all()
            blocks += 1
    assert blocks == 3 + 1 + 3 + 6 + 3


def test_a_bottleneck_adds_its_input_and_fusion_adds_both_maps():
    block = icnet.Bottleneck(8, 2, 8).eval()
    fusion = icnet.CascadeFeatureFusion(8, 8, 3).eval()
    x = torch.randn(1, 8, 9, 9)
    y = torch.randn(1, 8, 9, 9)
    total = block.branch(x) + x
    torch.testing.assert_close(block(x), total.relu())
    total = fusion.coarse(x) + fusion.fine(y)
    torch.testing.assert_close(fusion(x, y), total.relu())


def test_pyramid_adds_the_means_and_resize_is_bilinear_by_hand():
    x = torch.tensor([0., 0, 0, 8, 8, 8]).expand(1, 1, 6, 6)
    halves = torch.tensor([0, 0, 8 / 3, 16 / 3, 8, 8])      # 0 and 8, enlarged to 6 pixels
    thirds = torch.tensor([0, 1, 3, 5, 7, 8.])              # 0, 4 and 8
    # Of six cells each is a pixel, so x comes twice; the mean of the whole is 4.
    expected = 2 * x + 4 + halves + thirds
    torch.testing.assert_close(icnet.pyramid_pooling(x), expected)
    doubled = icnet.resize(torch.tensor([0., 4.]).view(1, 1, 1, 2), 2)
    assert doubled.tolist() == [[[[0, 1, 3, 4], [0, 1, 3, 4]]]]


def test_heads_and_their_weights():
    model = ICNet(7, 0.1, head_weights=(10, 100, 1000)).train()
    assert model.heads == [(getattr(model, name), None) for name in HEADS]
    for number, (head, _) in enumerate(model.heads):
        assert head.weight.std() < 0.02
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, number)
    outputs = model(torch.randn(2, 3, 64, 128))
    shapes = [logits.shape for logits in outputs]
    assert shapes == [(2, 7, 4, 8), (2, 7, 8, 16), (2, 7, 16, 32)]
    for number, logits in enumerate(outputs):
        assert (logits == number).all()
    total, main = model.loss(outputs, dict(labels=1), lambda logits, labels: logits.mean() + labels)
    assert (total.item(), main.item()) == (3210, 3)
    assert ICNet(7, 0.1).head_weights == (0.4, 0.6, 1.0)


def test_evaluation_needs_no_auxiliary_head_and_resizes_smoothly():
    model = ICNet(7, 0.1).eval()
    model.head_deep32 = model.head_fused16 = None           # computing them would fail
    halved = {}
    model.conv3_1.register_forward_hook(lambda *args: halved.update(middle=args[-1]))
    model.conv3_2.register_forward_hook(lambda _, args, __: halved.update(deep=args[0]))
    logits = model(torch.randn(1, 3, 64, 32))
    assert (logits[..., 2] != logits[..., 3]).any()
    expected = icnet.resize(halved["middle"], 0.5)
    torch.testing.assert_close(halved["deep"], expected)
