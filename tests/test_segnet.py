"""SegNet: size, indices, gradients, precision, and that it learns."""
import sys

import pytest
import torch
import torch.nn.functional as F

import segnet
from segnet import SegNet, unpool

CONFIGURATIONS = [dict(variant=variant, width=width)
                  for variant in ("basic", "vgg16") for width in (0.01, 0.125)]


def criterion(logits, labels, levels=None):
    assert logits.dtype == torch.float32 and logits.shape[-2:] == labels.shape[-2:]
    return F.cross_entropy(logits, labels.long(), ignore_index=255)


def train_step(model, images, labels):
    total, main = model.loss(model.train()(images), {"labels": labels}, criterion)
    total.backward()
    return total, main


@pytest.mark.parametrize("options, parameters", [
    ({}, 1_417_241), ({"width": 2}, 5_644_313), ({"variant": "vgg16"}, 29_457_433)])
def test_parameter_count(options, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in SegNet(**options).parameters()) == parameters


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_every_parameter_gets_a_gradient(options):
    model = SegNet(5, **options)
    total, main = train_step(model, torch.randn(2, 3, 64, 32), torch.randint(5, (2, 64, 32)))
    assert total is main
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_unpool_puts_each_value_where_its_maximum_was():
    x = torch.tensor([[1., 2., 0., 0.], [4., 3., 0., 5.], [7., 0., 0., 0.], [0., 0., 6., 6.]])
    pooled, indices = F.max_pool2d(x[None, None], 2, return_indices=True)
    expected = torch.tensor([[0, 0, 0, 0], [40, 0, 0, 50], [70, 0, 0, 0], [0, 0, 60, 0]]).float()
    assert torch.equal(unpool(10 * pooled, indices)[0, 0], expected)


def test_unpool_stays_bf16_and_channels_last_under_autocast():
    x = torch.randn(2, 8, 16, 12).bfloat16().to(memory_format=torch.channels_last)
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    with torch.autocast("cpu", torch.bfloat16):
        unpooled = unpool(pooled, indices)
    assert unpooled.dtype == torch.bfloat16
    assert unpooled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unpooled.float(), F.max_unpool2d(pooled.float(), indices, 2))


def test_decoder_uses_the_indices_of_its_mirror_stage():
    """With every stage an identity, what is left is each 16x16 cell's maximum, in its own place."""
    model = SegNet(3, width=0.05).eval()
    for stages in (model.encoder, model.decoder):
        for i in range(4):
            stages[i] = torch.nn.Identity()
    model.classifier = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 32)
    peaks, indices = F.max_pool2d(images, 16, return_indices=True)
    assert torch.equal(model(images), F.max_unpool2d(peaks, indices, 16))


@pytest.mark.parametrize("variant", ("basic", "vgg16"))
@pytest.mark.parametrize("H, W", [(33, 47), (64, 32), (1, 1)])
def test_evaluation_takes_any_size(variant, H, W):
    model = SegNet(7, 0.1, variant=variant).eval()
    images = torch.randn(1, 3, H, W)
    padded = torch.zeros(1, 3, H + -H % 32, W + -W % 32)
    padded[..., :H, :W] = images
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (1, 7, H, W) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, model(padded)[..., :H, :W])


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="48x64"):
        SegNet(width=0.05).train()(torch.zeros(2, 3, 48, 64))
    with pytest.raises(ValueError, match="resnet"):
        SegNet(variant="resnet")


@pytest.mark.parametrize("variant, agreement", [("basic", 0.95), ("vgg16", 0.7)])
def test_bf16_channels_last_trains_and_agrees_with_float32(variant, agreement):
    """Rounding each convolution of an untrained float32 vgg16 to bf16 moves maxima to other places
    through 13 layers: it alone gives a cosine of 0.86."""
    torch.manual_seed(0)
    model = SegNet(5, 0.25, variant=variant).to(memory_format=torch.channels_last).train()
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    reference = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert F.cosine_similarity(logits.flatten(), reference.flatten(), dim=0) > agreement
    assert logits.dtype == torch.float32
    model.loss(logits, {"labels": torch.randint(5, (2, 64, 64))}, criterion)[0].backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32
               for p in model.parameters())


@pytest.mark.parametrize("variant", ("basic", "vgg16"))
def test_one_batch_is_overfitted(variant):
    torch.manual_seed(0)
    model = SegNet(4, 0.25, variant=variant)
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[0, 8:24, 4:16], labels[0, 20:, 18:], labels[1, :12, 10:] = 1, 2, 3
    labels[:, :2] = 255
    recipe = model.recipe
    optimizer = getattr(torch.optim, recipe["optimizer"])(model.parameters(), recipe["lr"],
                                                          **recipe["optimizer_args"])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(train_step(model, images, labels)[0].item())
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.05, losses


def test_main_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["segnet.py", "--size", "64"])
    segnet.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "output", "parameters", "multiply-adds"]
    # 64 x 64 pixels, 49 x 3 -> 64 channels
    assert lines[1].split() == ["encoder.0", *"64 x 64 x 64".split(), "9,600", "38.5", "M"]
    # 35.17 GMAC at 320x320 (a 25th of the pixels here)
    assert lines[-1].split() == ["total", *"25 x 64 x 64".split(), "1,417,241", "1,406.7", "M"]
