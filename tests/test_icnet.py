"""ICNet: size, heads, gradients, precision, initialisation, and that it learns."""
import sys

import pytest
import torch
from torch import nn
import torch.nn.functional as F

import icnet
from icnet import ICNet, resize


def criterion(logits, labels, levels=None):
    assert logits.dtype == torch.float32
    labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0]
    return F.cross_entropy(logits, labels.long(), ignore_index=255)


def freeze_batch_normalisation(model):
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


@pytest.mark.parametrize("width, millions", [(1, 6.71), (2, 26.76)])
def test_parameter_count(width, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in ICNet(width=width).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("width", (0.01, 0.02, 0.25))  # at the first two some stages keep the width
@pytest.mark.parametrize("frozen", (False, True))
def test_every_parameter_gets_a_gradient(width, frozen):
    torch.manual_seed(0)
    model = ICNet(5, width).train()
    if frozen:
        freeze_batch_normalisation(model)
    outputs = model(torch.randn(2, 3, 64, 96))
    model.loss(outputs, {"labels": torch.randint(5, (2, 64, 96))}, criterion)[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert width < 0.25 or parameter.grad.any(), name


def test_dilations():
    model = ICNet(5, 0.1)
    dilations = {name: {layer.dilation[0] for layer in stage.modules()
                        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)}
                 for name, stage in model.named_children()}
    assert {name: values for name, values in dilations.items() if values - {1}} == {
        "conv4": {2}, "conv5": {4}, "fuse16": {2}, "fuse8": {2}}


def test_heads_and_their_weights():
    model = ICNet(7, 0.1, head_weights=(10, 100, 1000)).train()
    outputs = model(torch.randn(2, 3, 64, 128))
    assert [tuple(o.shape) for o in outputs] == [(2, 7, 4, 8), (2, 7, 8, 16), (2, 7, 16, 32)]
    values = {4: 1.0, 8: 2.0, 16: 3.0}
    total, main = model.loss(outputs, {"labels": None},
                             lambda logits, labels: torch.tensor(values[logits.shape[2]]))
    assert (total.item(), main.item()) == (3210, 3)
    assert ICNet(7, 0.1).head_weights == (0.4, 0.6, 1.0)
    with pytest.raises(ValueError, match="head_weights"):
        ICNet(7, 0.1, head_weights=(1, 1))


def test_classifying_first_equals_classifying_the_doubled_features():
    model = ICNet(7, 0.1).train()
    features = []
    for head in (model.head16, model.head8, model.head4):
        head.register_forward_hook(lambda module, inputs, _: features.append((module, inputs[0])))
    for output in model(torch.randn(2, 3, 64, 64)):
        head, x = next(pair for pair in features if pair[1].shape[2] * 2 == output.shape[2])
        torch.testing.assert_close(output, head(resize(x, 2)), rtol=1e-4, atol=1e-4)


def test_evaluation_needs_no_auxiliary_head():
    model = ICNet(5, 0.1).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    kept = {name: value for name, value in model.state_dict().items()
            if not name.startswith(ICNet.training_only)}
    other = ICNet(5, 0.1).eval()
    missing, unexpected = other.load_state_dict(kept, strict=False)
    assert not unexpected and all(name.startswith(ICNet.training_only) for name in missing)
    assert {name.split(".")[0] for name in missing} == {"head16", "head8"}
    other.head16 = other.head8 = None  # computing them would fail
    assert torch.equal(other(images), expected)


@pytest.mark.parametrize("H, W", [(33, 47), (64, 32), (1, 1), (97, 160)])
def test_evaluation_takes_any_size(H, W):
    model = ICNet(7, 0.1).eval()
    images = torch.randn(1, 3, H, W)
    padded = torch.zeros(1, 3, H + -H % 32, W + -W % 32)
    padded[..., :H, :W] = images
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (1, 7, H, W) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, model(padded)[..., :H, :W])


def test_training_sizes():
    model = ICNet(5, 0.1).train()
    with pytest.raises(ValueError, match="48x64"):
        model(torch.zeros(2, 3, 48, 64))
    with torch.no_grad():
        assert all(o.isfinite().all() for o in model(torch.randn(1, 3, 64, 64)))


def test_activations_stay_bounded_with_batch_normalisation_frozen():
    """16 residual blocks at full scale would multiply the standard deviation by 25."""
    torch.manual_seed(0)
    model = ICNet(25, 0.5)
    freeze_batch_normalisation(model)
    deviations = []
    for stage in (model.conv2, model.conv5):
        stage.register_forward_hook(lambda _, __, output: deviations.append(output.std()))
    with torch.no_grad():
        outputs = model(torch.randn(4, 3, 128, 128))
    assert all(0.3 < deviation < 3 for deviation in deviations), deviations
    assert all(logits.std() < 1 for logits in outputs)  # the first loss is close to log(25)


def test_bf16_channels_last_trains_and_agrees_with_float32():
    torch.manual_seed(0)
    model = ICNet(5, 0.25).to(memory_format=torch.channels_last).train()
    images = torch.randn(4, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    reference = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    for logits, expected in zip(outputs, reference):
        assert logits.dtype == torch.float32
        assert F.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.98
    model.loss(outputs, {"labels": torch.randint(5, (4, 128, 128))}, criterion)[0].backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32
               for p in model.parameters())


@pytest.mark.parametrize("frozen", (False, True))
def test_one_batch_is_overfitted(frozen):
    torch.manual_seed(0)
    model = ICNet(4, 0.25).train()
    if frozen:
        freeze_batch_normalisation(model)
    images, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[0, 16:48, 8:32], labels[0, 40:, 36:], labels[1, :24, 20:] = 1, 2, 3
    recipe = model.recipe
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, recipe["optimizer"])(learning, recipe["lr"],
                                                          **recipe["optimizer_args"])
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        total, main = model.loss(model(images), {"labels": labels}, criterion)
        total.backward()
        optimizer.step()
        losses.append(main.item())
    assert losses[0] > 1 and losses[-1] < 0.1, losses


def test_main_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["icnet.py"])
    icnet.main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["stage"] == ["output", "parameters", "multiply-adds"]
    assert rows["fuse16"][:5] == ["128", "x", "20", "x", "20"]
    # two 3x3 from 256 and one 1x1 from 256 channels to 128, at 20 x 20 = 400 pixels
    assert float(rows["fuse16"][-2]) == pytest.approx((9 + 1) * 256 * 128 * 400 / 1e6, abs=0.1)
    assert rows["head16"][:3] == ["in", "training", "only"]
    assert float(rows["total"][-2].replace(",", "")) == pytest.approx(1410, rel=0.01)
