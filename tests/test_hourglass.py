"""The stacked hourglass: its size, its two experiments, and that every configuration learns."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

import hourglass
import tiny
from hourglass import StackedHourglass, print_stages

TINY = dict(stacks=2, features=16, stem_stride=4, joints_from=1, joints_modules=2)
KINDS = {"plain": {}, "coarse": dict(coarse_to_fine=True), "surreal": dict(joints="surreal"),
         "centroids": dict(joints="centroids"), "last": dict(joints="surreal", joints_from=9),
         "all": dict(joints="centroids", coarse_to_fine=True, stacks=3, joints_from=2),
         "full resolution": dict(stem_stride=1), "half": dict(stem_stride=2, width=0.55)}


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


def gradients(model, images, batch, precision="fp32"):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        outputs = model(images)
    total, main = model.loss(outputs, batch, tiny.criterion)
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, total, main


@pytest.mark.parametrize("options, millions, gmac, bottleneck", [
    ({}, 12.87, 349, "(256, 20, 20)"), (dict(stem_stride=4), 12.87, 23, "(256, 5, 5)"),
    (dict(width=2), 4 * 12.84, 4 * 347.2, "(512, 20, 20)")])
def test_stages_and_their_totals(options, millions, gmac, bottleneck, capsys):
    with torch.device("meta"):
        print_stages(StackedHourglass(**options), 320)
    lines = capsys.readouterr().out.splitlines()
    counts = [[int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:weights|MAC)", line)]
              for line in lines]
    assert counts[-1][0] / 1e6 == pytest.approx(millions, rel=0.005)
    assert counts[-1][1] / 1e9 == pytest.approx(gmac, rel=0.02)
    assert counts[-1][1] == sum(work for _, work in counts[:-1])
    assert bottleneck in next(line for line in lines if line.startswith("bottom"))


@pytest.mark.parametrize("stride", (1, 2, 4))
@pytest.mark.parametrize("size", ((64, 64), (37, 50), (1, 33)))
def test_evaluation_takes_any_size(stride, size):
    model = build(stem_stride=stride, coarse_to_fine=True).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 25, *size) and logits.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    grads, *_ = gradients(build(**KINDS[kind]), *make_batch())
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


def test_loss_is_the_sum_of_what_each_module_owes():
    (images, batch), model = make_batch(), build(coarse_to_fine=True, joints="surreal")
    logits, maps = model(images)
    assert [x.shape for x in logits] == [(2, 2, 64, 64), (2, 25, 64, 64)]
    assert [x.shape for x in maps] == [(2, 24, 16, 16)] * 2
    total, main = model.loss((logits, maps), batch, tiny.criterion)
    body = torch.where(batch["labels"] == 255, 255, (batch["labels"] > 0).long())
    first = F.cross_entropy(logits[0], body, ignore_index=255)
    last = F.cross_entropy(logits[1], batch["labels"].long(), ignore_index=255)
    moved = (batch["joints"] + 0.5) / 4 - 0.5
    heat = sum(hourglass.heat_map_loss(x, moved, 6.4 / 320 * 64 / 4) for x in maps)
    torch.testing.assert_close(main, last)
    torch.testing.assert_close(total, first + last + heat)


def test_enlarging_is_bilinear_and_each_module_corrects_the_one_before():
    model = build(width=0.5).eval()
    enlarged = model.enlarge(torch.tensor([0., 4.]).expand(1, 1, 2, 2))
    assert enlarged[0, 0, 0].tolist() == [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
    stage, x = model.stages[0], torch.randn(1, 8, 16, 16)
    prediction, following = stage(x)
    following = following - x - stage.reinject_prediction(prediction)
    torch.testing.assert_close(following, stage.reinject_features(stage.features(x)))
    assert following.std() < 2 and stage.features[0](x).std() < 9    # x: 1; drawn small
    for block in stage.modules():   # without residuals a spike adds 1 to its cell at every size
        if isinstance(block, hourglass.Residual):
            block.forward = lambda x: x
    tower = stage.features[0](F.pad(torch.ones(1, 8, 1, 1), (6, 9, 5, 10)))[0, 0]
    assert tower[[0, 0, 7, 4, 5], [8, 0, 4, 7, 6]].tolist() == [1, 2, 3, 4, 5]


def test_levels_are_those_of_the_authors():
    groups = [[{*range(1, 25)}],
              [{13, 16}, {7, 10, 14, 15}, {1, 4}, {*range(17, 25)}, {2, 3, 5, 6, 8, 9, 11, 12}],
              [{13, 16}, {8, 11}, {9, 12}, {21, 23}, {22, 24}, {17, 19}, {18, 20}, {2, 5}, {3, 6},
               {7, 10, 14, 15}, {1, 4}], [{part} for part in range(1, 25)]]
    for level, members in enumerate(groups):
        table = hourglass.level_table(level)
        found = [{*(table == k).nonzero().flatten().tolist()} for k in range(len(members) + 1)]
        assert found == [{0}, *members] and hourglass.NAMES == tiny.NAMES


@pytest.mark.parametrize("stacks, ids", ((2, [2, 25]), (3, [2, 12, 25]), (4, [2, 6, 12, 25]),
                                         (8, [2, 2, 6, 6, 12, 12, 25, 25])))
def test_levels_are_spread_over_the_stacks(stacks, ids):
    model = build(stacks=stacks, coarse_to_fine=True)
    assert [(head.out_channels, levels.max().item() + 1) for head, levels in model.heads] == [
        (count, count) for count in ids]
    assert [head for head, _ in model.heads] == [stage.predict for stage in model.stages]
    assert [levels for _, levels in build(stacks=2).heads] == [None, None]


def test_centroids_of_a_hand_made_map():
    labels = torch.zeros(2, 4, 5, dtype=torch.uint8)
    labels[0, 1, 2:4] = 1                               # x 2 and 3, y 1
    labels[0, 3, 0] = labels[0, 0, 4] = 3               # two far corners
    labels[1, :, 0], labels[1, 2:, 3:] = 255, 2
    expected = torch.full((2, 3, 2), torch.nan)
    expected[0, 0], expected[0, 2] = torch.tensor([2.5, 1.0]), torch.tensor([2.0, 1.5])
    expected[1, 1] = torch.tensor([3.5, 2.5])
    torch.testing.assert_close(hourglass.centroids(labels, 4), expected, equal_nan=True)
    noise = np.random.default_rng(0).integers(0, 25, (320, 320)).astype(np.uint8)
    wanted = np.array(ndimage.center_of_mass(np.ones_like(noise), noise, range(1, 25)))[:, ::-1]
    found = hourglass.centroids(torch.from_numpy(noise)[None], 25)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_heat_maps_peak_at_the_joint_to_the_pixel():
    joints = torch.tensor([[[3.0, 7.0], [30.4, 0.6], [torch.nan, 2.0], [-0.6, 5.0], [31.4, 15.4],
                            [5.0, 15.5]]])
    maps, counts = hourglass.heat_maps(joints, 16, 32, 2.0)
    assert maps.isfinite().all() and maps[0, 0, 7, 3] == 1
    assert counts.tolist() == [[True, True, False, False, True, False]]
    assert maps[0, [0, 1, 4]].flatten(1).argmax(1).tolist() == [7 * 32 + 3, 32 + 30, 15 * 32 + 31]
    assert abs(maps[0, 0, 9, 3].item() - np.exp(-0.5)) < 1e-6           # one spread below
    assert abs(maps[0, 0, 7, 7].item() - np.exp(-2.0)) < 1e-6           # two to the right


def test_only_joints_that_count_cost_anything():
    joints = torch.tensor([[[30.0, 30.0], [torch.nan, 3.0], [70.0, 3.0]]])
    maps = torch.full((1, 3, 64, 64), -6.0, requires_grad=True)
    loss = hourglass.heat_map_loss(maps, joints, 3.0)
    # log(1 + e^-6) everywhere, and 6 for each pixel under the Gaussian, whose sum is 2 pi 9
    assert abs(loss.item() - (6 + 64 * 64 * np.log1p(np.exp(-6)) / (18 * np.pi))) < 1e-3
    loss.backward()
    assert maps.grad[0, 0].any() and not maps.grad[0, 1:].any()
    perfect = hourglass.heat_maps(joints, 64, 64, 3.0)[0].logit(1e-6)
    assert abs(hourglass.heat_map_loss(perfect, joints, 3.0).item() - np.pi ** 2 / 6) < 0.02
    assert hourglass.heat_map_loss(maps, joints[:, 1:2].expand(1, 3, 2), 3.0) == 0


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_recomputed_activations_keep_less_and_change_no_gradient(precision):
    (images, batch), kept, found = make_batch(), {False: 0, True: 0}, []

    def keep(tensor):                                       # until the backward pass
        kept[again] += tensor.nbytes
        return tensor

    for again in kept:
        model = build(joints="centroids", coarse_to_fine=True, checkpoint_activations=again)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(images)
        found.append(gradients(model, images, batch, precision)[0])
    assert kept[True] < kept[False] / 3
    assert all(value.equal(found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("kind", ("plain", "coarse", "surreal", "centroids"))
def test_it_learns_one_batch_and_bf16_agrees(kind):
    (images, batch), history = make_batch(), []
    model = build(features=32, joints_modules=1, **KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)[0][-1]
    assert F.cosine_similarity(rounded.flatten(), model(images)[0][-1].flatten(), dim=0) > 0.95
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    for _ in range(50):
        total, main = model.loss(model(images), batch, tiny.criterion)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append([total.item(), main.item()])
    assert history[-1][1] < 0.2 * history[0][1]
    extra = [total - main for total, main in (history[0], history[-1])]     # the branch's, mostly
    assert extra[1] < 0.5 * extra[0] < 7
