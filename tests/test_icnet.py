"""ICNet: size, heads, gradients, precision, initialisation, and that it learns."""
import re

import pytest
import torch
from torch import nn
import torch.nn.functional as F

import tiny
from icnet import ICNet, PyramidPooling, print_stages, resize


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def build(num_classes, width, frozen=False):
    torch.manual_seed(0)
    model = ICNet(num_classes, width).train()
    for norm in norms(model):
        norm.train(not frozen).requires_grad_(not frozen)
    return model


@pytest.mark.parametrize("width, millions, gmac", [(1, 6.71, 1.41), (2, 26.76, 5.56)])
def test_stages_and_their_totals(width, millions, gmac, capsys):
    print_stages(ICNet(width=width), 320)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    count = lambda row, unit: int(re.search(rf"([\d,]+) {unit}", row)[1].replace(",", ""))
    assert count(rows["in"], "weights") / 1e6 == pytest.approx(millions, abs=0.01)
    assert count(rows["in"], "MAC") / 1e9 == pytest.approx(gmac, abs=0.01)
    assert sum(count(row, "MAC") for row in rows.values()) == 2 * count(rows["in"], "MAC")
    assert f"({1024 * width}, 10, 10)" in rows["conv5"] and "(25, 320, 320)" in rows["in"]
    # fuse16: two 3x3 from 256 and one 1x1 from 256 channels to 128, at 20 x 20 pixels
    assert count(rows["fuse16"], "MAC") == (9 + 1) * 256 * 128 * width ** 2 * 400


@pytest.mark.parametrize("width", (0.01, 0.02, 0.25))  # at the first two some stages keep the width
@pytest.mark.parametrize("frozen", (False, True))
def test_every_parameter_gets_a_gradient(width, frozen):
    model = build(5, width, frozen)
    batch = {"labels": torch.randint(5, (2, 64, 96), dtype=torch.uint8)}
    model.loss(model(torch.randn(2, 3, 64, 96)), batch, tiny.criterion)[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert width < 0.25 or parameter.grad.any(), name


def test_layers_are_the_sources():
    model = ICNet(5, 0.1)
    dilations = {(name.split(".")[0], *layer.dilation) for name, layer in model.named_modules()
                 if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)}
    assert dilations == {(stage, 1, 1) for stage in ("conv1", "conv2", "conv3_1", "conv3_2", "high")
                         } | {("conv4", 2, 2), ("conv5", 4, 4), ("fuse16", 2, 2), ("fuse8", 2, 2)}
    fused = model.fuse16(*torch.randn(2, 1, 26, 9, 9))
    assert model.conv2(torch.randn(1, 6, 9, 9)).min() == fused.min() == 0       # after a ReLU
    assert {(norm.momentum, norm.eps) for norm in norms(model)} == {(0.05, 1e-5)}


def test_pyramid_adds_the_means_and_resize_is_bilinear_by_hand():
    pyramid = PyramidPooling(1, 1)
    pyramid.conv = nn.Identity()
    x = torch.tensor([0., 8.]).repeat_interleave(3).expand(1, 1, 6, 6)      # two halves
    # each row: x twice (1/6 of the image is a pixel), 4, the halves blended, the thirds blended
    blends = torch.tensor([0, 0, 8 / 3, 16 / 3, 8, 8]), torch.tensor([0, 1, 3, 5, 7, 8.])
    torch.testing.assert_close(pyramid(x)[0, 0, 2], 2 * x[0, 0, 2] + 4 + sum(blends))
    doubled = resize(torch.tensor([[0., 4.]]).view(1, 1, 1, 2), 2)
    assert doubled.tolist() == [[[[0, 1, 3, 4]] * 2]]


def test_heads_and_their_weights():
    model = ICNet(7, 0.1, head_weights=(10, 100, 1000)).train()
    for head, levels in model.heads:
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 5)
        assert levels is None
    outputs = model(torch.randn(2, 3, 64, 128))
    assert [tuple(o.shape) for o in outputs] == [(2, 7, 4, 8), (2, 7, 8, 16), (2, 7, 16, 32)]
    assert all((output == 5).all() for output in outputs)
    values = {4: 1.0, 8: 2.0, 16: 3.0}
    total, main = model.loss(outputs, {"labels": None},
                             lambda logits, labels: torch.tensor(values[logits.shape[2]]))
    assert (total.item(), main.item()) == (3210, 3)
    assert ICNet(7, 0.1).head_weights == (0.4, 0.6, 1.0)


@pytest.mark.parametrize("H, W", [(33, 47), (64, 32), (1, 1)])
def test_evaluation_takes_any_size_and_needs_no_auxiliary_head(H, W):
    model, other, images = ICNet(7, 0.1).eval(), ICNet(7, 0.1).eval(), torch.randn(1, 3, H, W)
    kept = {name: value for name, value in model.state_dict().items()
            if not name.startswith(("head16.", "head8."))}
    missing, _ = other.load_state_dict(kept, strict=False)
    assert {name.split(".")[0] for name in missing} == {"head16", "head8"}
    other.head16 = other.head8 = None                       # computing them would fail
    padded = other(F.pad(images, (0, -W % 32, 0, -H % 32)))
    assert (padded[..., 2] != padded[..., 3]).any()
    torch.testing.assert_close(model(images), padded[..., :H, :W])


@pytest.mark.parametrize("frozen", (False, True))
def test_it_learns_one_batch_and_bf16_agrees(frozen):
    model = build(4, 0.25, frozen)
    images, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[0, 16:48, 8:32], labels[0, 40:, 36:], labels[1, :24, 20:] = 1, 2, 3
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images.contiguous(memory_format=torch.channels_last))
    for logits, expected in zip(rounded, model(images)):
        assert F.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.95
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9), []
    for _ in range(60):
        optimizer.zero_grad()
        total, main = model.loss(model(images), {"labels": labels}, tiny.criterion)
        total.backward()
        optimizer.step()
        losses.append(main.item())
    assert losses[0] > 1 and losses[-1] < 0.25, losses
