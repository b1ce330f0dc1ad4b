"""ICNet: its size, its layers and its heads."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import icnet
from icnet import ICNet

HEADS = ("head_deep32", "head_fused16", "head_fused8")


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("width, millions, billions", [(1, 6.71, 1.41), (2, 26.76, 5.56)])
def test_stages_and_their_totals(width, millions, billions, capsys):
    with FlopCounterMode(display=False) as counter:
        icnet.print_stages(ICNet(width=width), 320)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, abs=0.01)
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    weights = {name: int(row.split()[-2].replace(",", "")) for name, row in rows.items()}
    assert weights["in"] / 1e6 == pytest.approx(millions, abs=0.01)
    assert f"({1024 * width}, 10, 10)" in rows["conv5"]
    assert "(25, 320, 320)" in rows["in"]
    # a 3x3 and a 1x1 convolution from 256 channels to 128, and two batch normalisations
    assert weights["fuse16"] == (9 + 1) * 256 * 128 * width ** 2 + 4 * 128 * width


def test_layers_are_the_sources():
    model = ICNet(5, 0.1)
    expected = dict(conv1=1, conv2=1, conv3_1=1, conv3_2=1, detail=1)
    expected |= dict(conv4=2, conv5=4, fuse16=2, fuse8=2)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            stage = name.split(".")[0]
            assert layer.dilation[0] == expected[stage], name
    blocks = [module for module in model.modules() if isinstance(module, icnet.Bottleneck)]
    assert len(blocks) == 3 + 1 + 3 + 6 + 3
    for block in blocks:                                    # see Bottleneck.__init__
        assert (block.branch[-1][-1].weight == 0.25).all()
    for norm in norms(model):
        assert norm.momentum == 0.05
    after_relu = model.conv2(torch.randn(1, 6, 9, 9))
    coarse, fine = torch.randn(2, 1, 26, 9, 9)
    assert after_relu.min() == model.fuse16(coarse, fine).min() == 0


def test_a_bottleneck_adds_its_input_and_fusion_adds_both_maps():
    block = icnet.Bottleneck(8, 2, 8).eval()
    fusion = icnet.CascadeFeatureFusion(8, 8, 3).eval()
    x = torch.randn(1, 8, 9, 9)
    fine = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(block(x), (block.branch(x) + x).relu())
    expected = fusion.coarse(x) + fusion.fine(fine)
    torch.testing.assert_close(fusion(x, fine), expected.relu())


def test_pyramid_adds_the_means_and_resize_is_bilinear_by_hand():
    x = torch.tensor([0., 0, 0, 8, 8, 8]).expand(1, 1, 6, 6)
    halves = torch.tensor([0, 0, 8 / 3, 16 / 3, 8, 8])      # 0 and 8, enlarged to 6 pixels
    thirds = torch.tensor([0, 1, 3, 5, 7, 8.])              # 0, 4 and 8
    # Of six cells each is a pixel, so x comes twice; the mean of the whole is 4.
    expected = 2 * x[0, 0, 2] + 4 + halves + thirds
    torch.testing.assert_close(icnet.pyramid_pooling(x)[0, 0, 2], expected)
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
    shapes = [tuple(logits.shape) for logits in outputs]
    assert shapes == [(2, 7, 4, 8), (2, 7, 8, 16), (2, 7, 16, 32)]
    for number, logits in enumerate(outputs):
        assert (logits == number).all()

    def criterion(logits, labels):
        return {4: 1.0, 8: 2.0, 16: 3.0}[logits.shape[2]]

    assert model.loss(outputs, dict(labels=None), criterion) == (3210, 3)
    assert ICNet(7, 0.1).head_weights == (0.4, 0.6, 1.0)


def test_evaluation_needs_no_auxiliary_head_and_enlarges_smoothly():
    model = ICNet(7, 0.1).eval()
    model.head_deep32 = model.head_fused16 = None           # computing them would fail
    logits = model(torch.randn(1, 3, 64, 32))
    assert (logits[..., 2] != logits[..., 3]).any()
