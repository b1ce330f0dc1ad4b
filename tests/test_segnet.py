"""SegNet: size, indices, gradients, precision, and that it learns."""
import re

import pytest
import torch
import torch.nn.functional as F

import tiny
from segnet import SegNet, print_stages, unpool


@pytest.mark.parametrize("options, parameters, gmac, bottleneck", [
    ({}, 1_417_241, 35.2, "(64, 4, 4)"), ({"width": 2}, 5_644_313, 138.4, "(128, 4, 4)"),
    ({"variant": "vgg16"}, 29_457_433, 63.9, "(512, 2, 2)")])
def test_stages_and_their_totals(options, parameters, gmac, bottleneck, capsys):
    print_stages(SegNet(**options), 64)                     # a 25th of the pixels of 320 x 320
    text = capsys.readouterr().out
    counts = [[int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:weights|MAC)", line)]
              for line in text.splitlines()]
    assert counts[-1][0] == parameters == sum(weights for weights, _ in counts[:-1])
    assert counts[-1][1] == sum(work for _, work in counts[:-1])
    assert counts[-1][1] * 25e-9 == pytest.approx(gmac, abs=0.05)
    assert bottleneck in text and "(25, 64, 64)" in text.splitlines()[-1]


@pytest.mark.parametrize("variant", ("basic", "vgg16"))
@pytest.mark.parametrize("width", (0.01, 0.125))
def test_every_parameter_gets_a_gradient(variant, width):
    model = SegNet(5, width, variant=variant)
    batch = {"labels": torch.randint(5, (2, 64, 32), dtype=torch.uint8)}
    total, main = model.loss(model(torch.randn(2, 3, 64, 32)), batch, tiny.criterion)
    total.backward()
    assert total is main
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_unpool_puts_each_value_where_its_maximum_was():
    x = torch.tensor([[1., 2., 0., 0.], [4., 3., 0., 5.], [7., 0., 0., 0.], [0., 0., 6., 6.]])
    pooled, indices = F.max_pool2d(x.bfloat16()[None, None], 2, return_indices=True)
    with torch.autocast("cpu", torch.bfloat16):             # which would answer in float32
        y = unpool(10 * pooled, indices)[0, 0]
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[0, 0, 0, 0], [40, 0, 0, 50], [70, 0, 0, 0], [0, 0, 60, 0]]


def test_decoder_uses_the_indices_of_its_mirror_stage():
    """With every stage an identity, what is left is each 16x16 cell's maximum, in its own place."""
    model = SegNet(3, width=0.05).eval()
    model.classifier = torch.nn.Identity()
    model.encoder = model.decoder = torch.nn.ModuleList([model.classifier] * 4)
    images = torch.rand(1, 3, 64, 32)
    peaks, indices = F.max_pool2d(images, 16, return_indices=True)
    assert torch.equal(model(images), F.max_unpool2d(peaks, indices, 16))


@pytest.mark.parametrize("H, W", [(33, 47), (64, 32), (1, 1)])
def test_evaluation_takes_any_size(H, W):
    for variant in ("basic", "vgg16"):
        model, images = SegNet(7, 0.1, variant=variant).eval(), torch.randn(1, 3, H, W)
        padded = model(F.pad(images, (0, -W % 32, 0, -H % 32)))     # (1, 7, 64, 64), or less
        torch.testing.assert_close(model(images), padded[..., :H, :W])
        assert padded.shape[1] == 7 and padded.dtype == torch.float32


@pytest.mark.parametrize("variant, agreement, relus", [("basic", 0.95, 4), ("vgg16", 0.7, 25)])
def test_it_learns_one_batch_and_bf16_agrees(variant, agreement, relus):
    """Rounding to bf16 moves maxima to other places through 13 layers: agreement of 0.86."""
    torch.manual_seed(0)
    model, images = SegNet(4, 0.25, variant=variant), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.to(memory_format=torch.channels_last)(images)
    assert F.cosine_similarity(rounded.flatten(), model(images).flatten(), dim=0) > agreement
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[0, 8:24, 4:16], labels[0, 20:, 18:], labels[1, :12, 10:], labels[:, :2] = 1, 2, 3, 255
    optimizer, losses = torch.optim.Adam(model.parameters(), model.recipe["lr"]), []
    (head, levels), = model.heads                           # its biases are the logits' offsets
    for _ in range(30):
        optimizer.zero_grad()
        total, _ = model.loss(model(images), {"labels": labels}, tiny.criterion)
        total.backward()
        losses.append(total.item())
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.1 and levels is None
    assert [*map(type, model.modules())].count(torch.nn.ReLU) == relus
    head.weight.data.zero_()
    assert (model(images) == head.bias.view(-1, 1, 1)).all()
