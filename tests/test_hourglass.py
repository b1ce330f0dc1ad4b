"""The stacked hourglass: its size, its two experiments, and that every configuration learns."""
import numpy as np
import pytest
from scipy import ndimage
import torch
from torch import nn
import torch.nn.functional as F

import hourglass
from hourglass import StackedHourglass

TINY = dict(stacks=2, features=16, stem_stride=4, joints_from=1, joints_modules=2)
KINDS = {"plain": {}, "coarse": dict(coarse_to_fine=True), "surreal": dict(joints="surreal"),
         "centroids": dict(joints="centroids"),
         "after the last": dict(joints="surreal", joints_from=2),
         "all": dict(joints="centroids", coarse_to_fine=True, stacks=3, joints_from=2),
         "alone": dict(stacks=1, coarse_to_fine=True, joints="centroids"),
         "full resolution": dict(stem_stride=1), "half": dict(stem_stride=2, joints="surreal"),
         "narrow": dict(width=0.55)}


def criterion(logits, labels, levels=None):
    """Mean cross-entropy over the labels that are not 255, as train.py's without weights."""
    assert logits.dtype == torch.float32 and logits.shape[-2:] == labels.shape[-2:]
    target = labels.long()
    if levels is not None:
        target = F.pad(levels, (0, 256 - len(levels)), value=255)[target]
    return F.cross_entropy(logits, target, ignore_index=255)


def build(**options):
    torch.manual_seed(0)
    return StackedHourglass(**TINY | options).to(memory_format=torch.channels_last).train()


def make_batch(size=64, count=2):
    """Images whose colours give labels away: a grid of parts, some of it ignored; and joints."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.stack([torch.randperm(36, generator=generator) for _ in range(count)]) % 25
    labels = F.interpolate(cells.view(count, 1, 6, 6).float(), (size, size))[:, 0].to(torch.uint8)
    colours = torch.randn(25, 3, generator=generator) * 2
    images = colours[labels.long()].permute(0, 3, 1, 2)                 # channels last
    labels[:, :3] = 255
    joints = torch.rand(count, 24, 2, generator=generator) * size
    joints[0, 0], joints[0, 1] = torch.nan, -20.0
    return images, {"labels": labels, "joints": joints}


def gradients(model, images, batch, precision=None):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        outputs = model(images)
    total, main = model.loss(outputs, batch, criterion)
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, total, main


def test_size_of_the_papers_network():
    with torch.device("meta"):
        model, doubled = StackedHourglass(), StackedHourglass(width=2)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 12.87e6 - 1) < 0.01
    assert 3.9 < sum(p.numel() for p in doubled.parameters()) / count < 4.01
    assert doubled.stem[0].out_channels == 128 and doubled.stages[3].predict.in_channels == 512
    assert model.stem[0].stride == (1, 1) and not any(
        isinstance(m, nn.MaxPool2d) for m in model.stem.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = build(**KINDS[kind])
    grads, total, main = gradients(model, *make_batch())
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    assert total.shape == main.shape == () and total.item() > 0
    assert set(model.classifiers) == {f"{name}." for name, _ in model.named_modules() if
                                      name.split(".")[-1] in ("predict", "reinject_prediction")}


def test_loss_is_the_sum_of_what_each_module_owes():
    images, batch = make_batch()
    model = build(coarse_to_fine=True, joints="surreal", joints_weight=0.5)
    logits, maps = model(images)
    assert [x.shape for x in logits] == [(2, 2, 64, 64), (2, 25, 64, 64)]
    assert [x.shape for x in maps] == [(2, 24, 16, 16)] * 2
    total, main = model.loss((logits, maps), batch, criterion)
    body = torch.where(batch["labels"] == 255, 255, (batch["labels"] > 0).long())
    first = F.cross_entropy(logits[0], body, ignore_index=255)
    last = F.cross_entropy(logits[1], batch["labels"].long(), ignore_index=255)
    place = (batch["joints"] + 0.5) / 4 - 0.5
    heat = sum(hourglass.heat_map_loss(x, place, 6.4 / 320 * 64 / 4) for x in maps)
    torch.testing.assert_close(main, last)
    torch.testing.assert_close(total, first + last + 0.5 * heat)


@pytest.mark.parametrize("stride", (1, 2, 4))
@pytest.mark.parametrize("size", ((64, 64), (37, 50), (1, 33)))
def test_evaluation_takes_any_size(stride, size):
    model = build(stem_stride=stride).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 25, *size) and logits.dtype == torch.float32


def test_training_refuses_odd_sizes():
    with pytest.raises(ValueError, match="48x64"):
        build()(torch.zeros(1, 3, 48, 64))


@pytest.mark.parametrize("options, words", (
    (dict(coarse_to_fine=True, num_classes=24), "24"), (dict(stem_stride=3), "3"),
    (dict(joints="surreal", joints_from=3), "1 to 2"), (dict(joints="all"), "'all'"),
    (dict(stacks=0), "stacks"), (dict(joints="surreal", joints_modules=0), "joints_modules"),
    (dict(joints="centroids", num_classes=1), "num_joints")))
def test_impossible_networks_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_levels_partition_the_classes_and_refine_one_another():
    tables = [hourglass.level_table(level) for level in range(4)]
    assert [len(table.unique()) for table in tables] == [2, 6, 12, 25]
    for table in tables:
        assert table[0] == 0 and (table[1:] > 0).all() and table.max() + 1 == len(table.unique())
    for coarse, fine in zip(tables, tables[1:]):  # a finer class has one coarser
        assert len(set(zip(coarse.tolist(), fine.tolist()))) == len(fine.unique())
    same = lambda level, *parts: len({tables[level][part].item() for part in parts}) == 1
    assert same(1, *range(17, 25)) and same(1, 2, 3, 5, 6, 8, 9, 11, 12) and same(1, 1, 4)
    assert same(2, 17, 19) and not same(2, 17, 18) and same(2, 13, 16) and not same(2, 2, 3)
    assert tables[3].tolist() == list(range(25))


@pytest.mark.parametrize("stacks, ids", ((1, [25]), (2, [2, 25]), (3, [2, 12, 25]),
                                         (4, [2, 6, 12, 25]), (8, [2, 2, 6, 6, 12, 12, 25, 25])))
def test_levels_are_spread_over_the_stacks(stacks, ids):
    model = build(stacks=stacks, coarse_to_fine=True)
    assert [stage.predict.out_channels for stage in model.stages] == ids
    assert [table.max().item() + 1 for table in model.levels] == ids
    assert not any("levels" in name for name in model.state_dict())


def test_look_up_on_a_hand_made_map():
    labels = torch.tensor([[0, 16, 13, 255], [8, 11, 9, 24]], dtype=torch.uint8)
    body, groups, parts, full = hourglass.level_maps(labels, 4)
    assert body.tolist() == [[0, 1, 1, 255], [1, 1, 1, 1]]
    assert groups.tolist() == [[0, 16, 16, 255], [2, 2, 2, 17]]
    assert parts.tolist() == [[0, 16, 16, 255], [8, 8, 9, 22]]
    assert full.equal(labels)
    inside = labels[labels < 255].long()
    assert hourglass.level_table(2)[inside].tolist() == [0, 1, 1, 2, 2, 3, 5]


def test_centroids_of_a_hand_made_map():
    labels = torch.zeros(2, 4, 5, dtype=torch.uint8)
    labels[0, 1, 2:4] = 1                               # x 2 and 3, y 1
    labels[0, 3, 0] = labels[0, 0, 4] = 3               # two far corners
    labels[1, :, 0] = 255
    labels[1, 2:, 3:] = 2
    centres = hourglass.centroids(labels, 4)
    assert centres.shape == (2, 3, 2) and centres.dtype == torch.float32
    expected = torch.full((2, 3, 2), torch.nan)
    expected[0, 0], expected[0, 2] = torch.tensor([2.5, 1.0]), torch.tensor([2.0, 1.5])
    expected[1, 1] = torch.tensor([3.5, 2.5])
    torch.testing.assert_close(centres, expected, equal_nan=True, rtol=0, atol=0)
    noise = np.random.default_rng(0).integers(0, 25, (320, 320)).astype(np.uint8)
    wanted = np.array(ndimage.center_of_mass(np.ones_like(noise), noise, range(1, 25)))[:, ::-1]
    found = hourglass.centroids(torch.from_numpy(noise)[None], 25)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_heat_maps_peak_at_the_joint_to_the_pixel():
    joints = torch.tensor([[[3.0, 7.0], [30.4, 0.6], [torch.nan, 2.0], [-0.6, 5.0], [31.4, 15.4],
                            [5.0, 15.5]]])
    maps, counts = hourglass.heat_maps(joints, 16, 32, 2.0)
    assert maps.shape == (1, 6, 16, 32) and maps.isfinite().all()
    assert counts.tolist() == [[True, True, False, False, True, False]]
    peak = lambda j: divmod(maps[0, j].argmax().item(), 32)
    assert (peak(0), peak(1), peak(4)) == ((7, 3), (1, 30), (15, 31))
    assert maps[0, 0, 7, 3] == 1
    assert abs(maps[0, 0, 9, 3].item() - np.exp(-0.5)) < 1e-6           # one spread below
    assert abs(maps[0, 0, 7, 7].item() - np.exp(-2.0)) < 1e-6           # two to the right


def test_only_joints_that_count_cost_anything():
    joints = torch.tensor([[[30.0, 30.0], [torch.nan, 3.0], [70.0, 3.0]]])
    loss_of = lambda maps, joints: hourglass.heat_map_loss(maps, joints, 3.0)
    maps = torch.full((1, 3, 64, 64), -6.0, requires_grad=True)
    loss = loss_of(maps, joints)
    # log(1 + e^-6) everywhere, and 6 for each pixel under the Gaussian, whose sum is 2 pi 9
    assert abs(loss.item() - (6 + 64 * 64 * np.log1p(np.exp(-6)) / (18 * np.pi))) < 1e-3
    loss.backward()
    assert maps.grad[0, 0].any() and not maps.grad[0, 1:].any()
    perfect = hourglass.heat_maps(joints, 64, 64, 3.0)[0].logit(1e-6)
    assert abs(loss_of(perfect, joints).item() - np.pi ** 2 / 6) < 0.02
    assert loss_of(maps, joints[:, 1:2].expand(1, 3, 2)) == 0


def test_evaluation_does_not_need_the_joint_branch():
    model, bare = build(joints="surreal"), build(stacks=2)
    weights = model.state_dict()
    bare.load_state_dict({name: value for name, value in weights.items()
                          if not name.startswith(model.training_only)})
    images = make_batch()[0]
    broken = build(joints="surreal")
    broken.load_state_dict({
        name: value * torch.nan if name.startswith(model.training_only) else value
        for name, value in weights.items()})
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.equal(bare.eval()(images)) and logits.equal(broken.eval()(images))


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("frozen", (False, True))
def test_recomputed_activations_change_nothing(precision, frozen):
    images, batch = make_batch()
    options = dict(joints="centroids", coarse_to_fine=True, stem_stride=2)
    plain, again = build(**options), build(**options, checkpoint_activations=True)
    start = {name: value.clone() for name, value in plain.named_buffers()}
    for model in (plain, again):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(not frozen)
    for _ in range(2):
        expected, total, _ = gradients(plain, images, batch, precision)
        found, same, _ = gradients(again, images, batch, precision)
    assert total.equal(same)
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    buffers = dict(again.named_buffers())
    assert all(value.equal(buffers[name]) for name, value in plain.named_buffers())
    changed = [name for name in start if not start[name].equal(buffers[name])]
    assert frozen == (changed == [])


def test_recomputing_keeps_less():
    images = make_batch()[0]

    def held(model):
        """Bytes that wait for the backward pass; a tensor saved twice counts once."""
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(images)
        return sum(storages.values()) if outputs else 0

    plain, again = (held(build(stem_stride=1, checkpoint_activations=flag))
                    for flag in (False, True))
    assert again < plain / 3


@pytest.mark.parametrize("kind", ("plain", "coarse", "surreal", "centroids"))
def test_one_batch_is_overfitted(kind):
    images, batch = make_batch(64)
    model = build(features=32, joints_modules=1, **KINDS[kind])
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    history = []
    for _ in range(70):
        outputs = model(images)
        total, main = model.loss(outputs, batch, criterion)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append([total.item(), main.item()])
    logits, maps = outputs
    counted = batch["labels"] < 255
    accuracy = (logits[-1].argmax(1) == batch["labels"])[counted].float().mean().item()
    assert accuracy > 0.9 and history[-1][1] < 0.2 * history[0][1]
    extra = [total - main for total, main in (history[0], history[-1])]  # the branch's, mostly
    assert extra[1] < 0.5 * extra[0]


def test_prints_its_stages(capsys, monkeypatch):
    words = "hourglass.py --size 64 --features 16 --stacks 2 --joints surreal"
    monkeypatch.setattr("sys.argv", words.split())
    hourglass.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "stage", "stem", "stages.0", "stages.1", "joint_stages.0", "joint_stages.1", "total"]
    assert "in training only" in lines[4] and "25 x 64 x 64" in lines[-1]
    monkeypatch.setattr("sys.argv", "hourglass.py --coarse-to-fine --num-classes 7".split())
    with pytest.raises(SystemExit) as stopped:
        hourglass.main()
    assert stopped.value.code == 2 and "25 classes" in capsys.readouterr().err
