"""SegNet: its size, its layers and its indices."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
import torch.nn.functional as F

from segnet import SegNet, print_stages, unpool

@pytest.mark.parametrize("options, parameters, billions, smallest", [
    ({}, 1_417_241, 35.2, "(64, 4, 4)"),
    (dict(width=2), 5_644_313, 138.4, "(128, 4, 4)"),
    (dict(variant="vgg16"), 29_457_433, 63.9, "(512, 2, 2)"),
])
def test_stages_and_their_totals(options, parameters, billions, smallest, capsys):
    with FlopCounterMode(display=False) as counter:
        print_stages(SegNet(**options), 64)
    work = counter.get_total_flops() / 2                    # FLOPs of a multiply-add
    assert work * (320 / 64) ** 2 == pytest.approx(billions * 1e9, abs=5e7)
    text = capsys.readouterr().out
    *rows, last = text.splitlines()
    weights = [int(row.split()[-2].replace(",", "")) for row in rows]
    assert sum(weights) == parameters
    assert f"{parameters:,} weights" in last
    assert smallest in text


def test_unpool_puts_each_value_where_its_maximum_was():
    x = torch.tensor([[1., 2, 0, 0], [4, 3, 0, 5]])
    x = x.bfloat16().view(1, 1, 2, 4)
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    with torch.autocast("cpu", torch.bfloat16):             # which would answer in float32
        y = unpool(10 * pooled, indices)
    assert y.dtype == torch.bfloat16
    assert y[0, 0].tolist() == [[0, 0, 0, 0], [40, 0, 0, 50]]


def test_decoder_uses_the_indices_of_its_mirror_stage():
    """With every stage an identity, what is left is each 16x16 cell's maximum, in its own place."""
    model = SegNet(3, width=0.05).eval()
    nothing = nn.Identity()
    model.classifier = nothing
    model.encoder = model.decoder = nn.ModuleList([nothing] * 4)
    images = torch.rand(1, 3, 64, 32)
    peaks, indices = F.max_pool2d(images, 16, return_indices=True)
    expected = F.max_unpool2d(peaks, indices, 16)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("variant, kernel, relus, biases", [
    ("basic", 7, 4, 5),
    ("vgg16", 3, 25, 26),
])
def test_layers_are_the_sources(variant, kernel, relus, biases):
    model = SegNet(4, 0.1, variant=variant)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    *inner, classifier = convolutions
    assert {layer.kernel_size for layer in inner} == {(kernel, kernel)}
    assert sum(layer.bias is not None for layer in convolutions) == biases
    assert sum(isinstance(layer, nn.ReLU) for layer in model.modules()) == relus
    (head, levels), = model.heads
    assert head is classifier
    assert levels is None


def test_first_weights_keep_the_variance():
    """He et al.: a convolution's weights have the variance 2 / (kernel area x channels in)."""
    model = SegNet(25).requires_grad_(False)
    for stage in model.encoder[1:]:
        conv = stage[0]
        assert conv.weight.std() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.02)
