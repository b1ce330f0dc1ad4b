"""The stacked hourglass: its size, its layers and its two experiments."""
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
import torch.nn.functional as F
from scipy import ndimage

import hourglass
import tiny
from hourglass import StackedHourglass
from test_networks import make_batch

TINY = dict(stacks=2, features=16, stem_stride=4, joints_from=1)


def build(**options):
    torch.manual_seed(0)
    model = StackedHourglass(**TINY | options)
    return model.to(memory_format=torch.channels_last).train()


@pytest.mark.parametrize("options, weights, billions, smallest", [
    ({}, 12_841_764, 348.7, "(256, 20, 20)"),
    (dict(stem_stride=4), 12_841_764, 23.08, "(256, 5, 5)"),
    (dict(width=2), 51_135_972, 1383.8, "(512, 20, 20)"),
])
def test_stages_and_their_totals(options, weights, billions, smallest, capsys):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        hourglass.print_stages(StackedHourglass(**options), 320)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.002)
    rows = capsys.readouterr().out.splitlines()
    assert smallest in rows[1]
    assert f"{weights:,} weights" in rows[-1]


def test_loss_is_the_sum_of_what_each_module_owes():
    model = build(coarse_to_fine=True, joints="surreal", joint_weight=3, joints_from=2)
    images, batch = make_batch()
    logits, maps = model(images)
    for map_ in maps:
        assert map_.shape == (2, 24, 16, 16)
    total, main = model.loss((logits, maps), batch, tiny.criterion)
    labels = batch["labels"][:, None]                       # the loss is taken at half the size
    labels = F.interpolate(labels, logits[0].shape[-2:], mode="nearest-exact")[:, 0].long()
    assert labels.shape[-1] * 2 == images.shape[-1]
    body = labels.clamp(max=1).where(labels < 255, labels)
    first = F.cross_entropy(logits[0], body, ignore_index=255)
    last = F.cross_entropy(logits[1], labels, ignore_index=255)
    heat = sum(hourglass.heat_map_loss(x, batch["joints"], 4) for x in maps)
    torch.testing.assert_close(main, last)
    torch.testing.assert_close(total, first + last + 3 * heat)
    heat.backward()                                         # the branch leaves the second module
    assert model.stack[1].features[-2].weight.grad is not None


def test_enlarging_is_bilinear_and_each_module_corrects_the_one_before():
    model = build(features=64).eval()
    enlarged = hourglass.enlarge(torch.tensor([0., 4]).expand(1, 1, 2, 2), 4)
    assert enlarged[0, 0, 0].tolist() == [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
    full = StackedHourglass(stacks=1, features=8, stem_stride=1)
    logits, _ = full(torch.randn(2, 3, 32, 32))
    assert logits[0].shape == (2, 25, 32, 32)               # at stride 1, nothing is enlarged
    module = model.stack[0]
    x = torch.randn(1, 64, 16, 16)
    prediction, following = module(x)
    again = following - x - module.reinject_prediction(prediction)
    torch.testing.assert_close(again, module.reinject_features(module.features(x)))


def test_first_weights_are_he_et_als_and_small_where_they_add_up():
    module = build(features=64).stack[0]
    branch = module.features[1].branch
    he = (2 / 64) ** 0.5                                    # a 1x1 convolution of 64 channels
    expected = {
        branch[0][-1]: he,
        branch[2][-1]: 0.25 * (2 / 32) ** 0.5,
        module.reinject_features: 0.2 * he,
        module.predict: 0.001,
    }
    for layer, std in expected.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


def test_an_hourglass_adds_every_size():
    """Without residuals a spike adds 1 to the cell that it lies in, at every size."""
    tower = hourglass.Hourglass(4, 1)
    for block in tower.modules():
        if isinstance(block, hourglass.Residual):
            block.forward = lambda x: x
    spike = torch.zeros(1, 1, 16, 16)
    spike[..., 5, 6] = 1
    found = tower(spike)[0, 0]
    assert found[5, 6] == 5
    assert found[4, 7] == 4                                 # the same 2x2
    assert found[7, 4] == 3                                 # the same 4x4
    assert found[0, 0] == 2
    assert found[0, 8] == 1


def test_a_residual_adds_its_input():
    x = torch.randn(1, 4, 3, 3)
    block = hourglass.Residual(4, 6)
    torch.testing.assert_close(block(x), block.branch(x) + block.skip(x))


def test_levels_are_those_of_the_authors():
    arms = range(17, 25)
    legs = [2, 3, 5, 6, 8, 9, 11, 12]
    head, chest, pelvis = [13, 16], [7, 10, 14, 15], [1, 4]
    feet = [[8, 11], [9, 12]]
    hands = [[21, 23], [22, 24]]
    shafts = [[17, 19], [18, 20], [2, 5], [3, 6]]           # left and right, arms and legs
    expected = dict(
        body=[range(1, 25)],
        regions=[head, chest, pelvis, arms, legs],
        limbs=[head, *feet, *hands, *shafts, chest, pelvis],
        parts=[[part] for part in range(1, 25)],
    )
    assert hourglass.NAMES == tiny.NAMES
    for level, groups in expected.items():
        table = torch.zeros(25, dtype=torch.int64)
        for coarse, group in enumerate(groups, 1):
            table[list(group)] = coarse
        assert hourglass.level_table(level).equal(table)


@pytest.mark.parametrize("counts", (
    [25], [2, 25], [2, 12, 25], [2, 6, 12, 25], [2, 2, 6, 6, 12, 12, 25, 25]))
def test_levels_are_spread_over_the_stacks(counts):
    model = build(stacks=len(counts), coarse_to_fine=True)
    for count, module, (head, levels) in zip(counts, model.stack, model.heads, strict=True):
        assert head is module.predict
        assert head.out_channels == levels.max() + 1 == count
    assert [levels for _, levels in build().heads] == [None, None]


def test_centroids_are_scipys():
    labels = np.random.default_rng(0).integers(0, 24, (320, 300)).astype(np.uint8)
    labels[:9] = 255
    centres = ndimage.center_of_mass(np.ones_like(labels), labels, range(1, 24))
    found = hourglass.centroids(torch.from_numpy(labels)[None], 25)[0]
    np.testing.assert_allclose(found[:23], np.array(centres)[:, ::-1], rtol=1e-6)
    assert found[23].isnan().all()                          # part 24 is absent


def test_heat_maps_peak_at_the_joint_to_the_pixel():
    joints = [
        [3, 7],
        [30.4, 0.6],
        [31.4, 15.4],
        [torch.nan, 2],
        [-0.6, 5],
        [5, 15.5],
    ]
    maps, valid = hourglass.heat_maps(torch.tensor([joints]), 16, 32, 2.0)
    assert maps.isfinite().all()
    assert valid[0].tolist() == 3 * [True] + 3 * [False]
    rounded = [(7, 3), (1, 30), (15, 31)]
    for spot, (y, x) in zip(maps[0], rounded):
        assert spot.argmax() == y * 32 + x
    spot = maps[0, 0]
    assert spot[9, 3] == pytest.approx(np.exp(-0.5))        # one spread below
    assert spot[7, 7] == pytest.approx(np.exp(-2))          # two to the right


def test_a_heat_map_is_as_wide_as_the_papers():
    """6.4 pixels of 320, which are 2 of 100. Only logits like the target's give its entropy."""
    joints = torch.tensor([[[160, 160.0]]])
    target, _ = hourglass.heat_maps((joints + 0.5) / 3.2 - 0.5, 100, 100, 2)
    loss = hourglass.heat_map_loss(target.logit(1e-6), joints, 3.2)
    entropy = F.binary_cross_entropy(target, target)
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-3)


def test_only_joints_that_count_cost_anything():
    """A joint at 31.5 of 128 pixels lies on the first of two cells' centres at 1/64: x = 0."""
    joints = torch.tensor([[[31.5, 95.5], [torch.nan, 3], [140, 3]]])
    logits = torch.full((1, 3, 2, 2), -6.0, requires_grad=True)
    loss = hourglass.heat_map_loss(logits, joints, 64)
    # Each of 4 pixels costs log(1 + e^-6), the one under the joint 6 more.
    assert loss.item() == pytest.approx(np.log1p(np.exp(-6)) + 6 / 4)
    loss.backward()
    assert logits.grad[0, 0].argmin() == 2                  # x = 0, y = 1
    assert not logits.grad[0, 1:].any()
    joints[:] = torch.nan
    assert hourglass.heat_map_loss(logits, joints, 64) == 0
