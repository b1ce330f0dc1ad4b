"""What every network promises: any size, gradients, bf16, that it learns, and export to ONNX."""
import pytest
import torch
import torch.nn.functional as F

import evaluate
import tiny
from hourglass import StackedHourglass
from icnet import ICNet
from segnet import SegNet


def small_hourglass(**options):
    options = dict(stacks=2, features=32, stem_stride=4, joints_from=1) | options
    return StackedHourglass(**options)


NETWORKS = {
    "segnet": lambda: SegNet(width=0.25),
    "segnet vgg16": lambda: SegNet(width=0.25, variant="vgg16"),
    "icnet": lambda: ICNet(width=0.25),
    "hourglass": small_hourglass,
    "hourglass coarse": lambda: small_hourglass(coarse_to_fine=True),
    "hourglass surreal": lambda: small_hourglass(joints="surreal", joint_weight=20),
    "hourglass centroids": lambda: small_hourglass(joints="centroids", joint_weight=20),
}
MORE = {
    "hourglass last": lambda: small_hourglass(joints="surreal", joints_from=9),
    "hourglass all": lambda: small_hourglass(joints="centroids", coarse_to_fine=True, stacks=3),
    "hourglass full": lambda: small_hourglass(stem_stride=1, width=0.3),
}
NARROW = {      # some channel counts become 1, and some stages keep the number of channels
    "segnet narrow": lambda: SegNet(width=0.01),
    "vgg16 narrow": lambda: SegNet(width=0.01, variant="vgg16"),
    "icnet narrow": lambda: ICNet(width=0.01),
    "icnet narrow too": lambda: ICNet(width=0.02),
}


def build(name):
    torch.manual_seed(0)
    model = (NETWORKS | MORE | NARROW)[name]()
    return model.to(memory_format=torch.channels_last).train()


def freeze(model):
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval().requires_grad_(False)
    return model


def make_batch(size=64):
    """Images whose colours give labels away: a grid of parts, some of it ignored; and joints."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(25, (2, 1, 6, 6), generator=generator)
    labels = F.interpolate(cells.float(), (size, size))[:, 0].to(torch.uint8)
    colours = 2 * torch.randn(25, 3, generator=generator)
    images = colours[labels.long()].permute(0, 3, 1, 2)     # channels last
    labels[:, :3] = 255
    joints = torch.rand(2, 24, 2, generator=generator) * size
    joints[0, 0] = torch.nan
    return images, dict(labels=labels, joints=joints)


@pytest.mark.parametrize("name", NETWORKS | MORE | NARROW)
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    layout = evaluate.layout(model, torch.device("cpu"), "fp32")    # as train.py takes it
    model.to(memory_format=layout)
    images, batch = make_batch()
    images = images.contiguous(memory_format=layout)
    total, _ = model.loss(model(images), batch, tiny.criterion)
    total.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any() or "narrow" in name


@pytest.mark.parametrize("name", ("segnet", "segnet vgg16", "icnet", "hourglass", "hourglass full"))
@pytest.mark.parametrize("H, W", ((64, 64), (37, 50), (1, 33)))
def test_evaluation_takes_any_size(name, H, W):
    model = build(name).eval()
    images = torch.randn(1, 3, H, W)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.shape == (1, 25, H, W)
    assert logits.dtype == torch.float32
    if "hourglass" not in name:
        padded = F.pad(images, (0, -W % 32, 0, -H % 32))
        torch.testing.assert_close(model(images), model(padded)[..., :H, :W])


def finest(name, outputs):
    """The logits of the last head in what a network returns in training."""
    if "segnet" in name:
        return outputs
    logits = outputs[0] if "hourglass" in name else outputs
    return logits[-1]


def optimizer_of(name, parameters):
    if "segnet" in name:
        return torch.optim.Adam(parameters, 0.01)
    if "icnet" in name:
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)
    return torch.optim.RMSprop(parameters, 0.003)


@pytest.mark.parametrize("name", [*NETWORKS, "icnet frozen"])
def test_it_learns_one_batch_and_bf16_agrees(name):
    model = build(name.removesuffix(" frozen"))
    frozen = "frozen" in name
    images, batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = finest(name, model(images))
    exact = finest(name, model(images))
    assert rounded.dtype == torch.float32
    # Rounding moves SegNet's maxima to other places, through 13 layers in vgg16.
    agreement = F.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0)
    assert agreement > (0.7 if "vgg16" in name else 0.95)

    if frozen:
        freeze(model)
    optimizer = optimizer_of(name, model.parameters())
    history = []
    for step in range(50):
        if "hourglass" in name:     # else the first step, ten times the rate, decides
            optimizer.param_groups[0]["lr"] = 0.003 * min(1, (step + 1) / 10)
        total, main = model.loss(model(images), batch, tiny.criterion)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append((main.item(), total.item() - main.item()))
    (first, first_rest), *_, (last, rest) = history
    assert last < (0.5 if frozen else 0.2) * first
    if "hourglass" in name:
        assert rest < 0.5 * first_rest                      # the other module's, and the branch's


@pytest.mark.parametrize("name, left", [
    ("segnet", 0), ("segnet vgg16", 0), ("icnet", 0), ("hourglass", 93)])
def test_folded_batch_normalisations_compute_the_same(name, left):
    """The hourglass has most of its BNs before a convolution, where they cannot be folded."""
    model = build(name)
    images, _ = make_batch()
    model(images)                                           # the BNs' statistics are no 0 and 1
    model.eval()
    expected = model(images)
    evaluate.fold_batch_norms(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == left


@pytest.mark.parametrize("name", ("segnet", "segnet vgg16", "icnet", "hourglass", "hourglass full"))
def test_onnx_runtime_computes_the_same(name, tmp_path):
    """With batch, height and width free, on sizes that the export has not seen."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(name).eval()
    free = torch.export.Dim.DYNAMIC
    dimensions = {0: free, 2: free, 3: free}
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 96, 64),), dynamo=True, dynamic_shapes=(dimensions,))
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    feed = session.get_inputs()[0].name
    sizes = [(3, 3, 33, 47), (1, 3, 160, 130)]
    for size in sizes:
        images = torch.randn(size)
        with torch.no_grad():
            expected = model(images)
        logits, = session.run(None, {feed: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
