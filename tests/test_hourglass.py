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
from test_export import make_batch

TINY = dict(stacks=2, features=16, stem_stride=4, joints_from=1)


def build(**options):
    torch.manual_seed(0)
    model = StackedHourglass(**TINY | options)
    return model.to(memory_format=torch.channels_last).train()


@pytest.mark.parametrize("options, weights, billions, bottleneck", [
    ({}, 12_841_764, 348.7, "(256, 20, 20)"),
    (dict(stem_stride=4), 12_841_764, 23.08, "(256, 5, 5)"),
    (dict(width=2), 51_135_972, 1383.8, "(512, 20, 20)"),
])
def test_stages_and_their_totals(options, weights, billions, bottleneck, capsys):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        hourglass.print_stages(StackedHourglass(**options), 320)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.002)
    rows = capsys.readouterr().out.splitlines()
    assert bottleneck in rows[1]
    assert f"{weights:,} weights" in rows[-1]


def test_loss_is_the_sum_of_what_each_module_owes():
    model = build(coarse_to_fine=True, joints="surreal", joint_weight=3)
    images, batch = make_batch()
    logits, maps = model(images)
    assert [x.shape for x in logits] == [(2, 2, 64, 64), (2, 25, 64, 64)]
    assert [x.shape for x in maps] == [(2, 24, 16, 16)] * 2
    total, main = model.loss((logits, maps), batch, tiny.criterion)
    labels = batch["labels"].long()
    body = torch.where(labels == 255, 255, (labels > 0).long())
    first = F.cross_entropy(logits[0], body, ignore_index=255)
    last = F.cross_entropy(logits[1], labels, ignore_index=255)
    heat = sum(hourglass.heat_map_loss(x, batch["joints"], 4) for x in maps)
    torch.testing.assert_close(main, last)
    torch.testing.assert_close(total, first + last + 3 * heat)


def test_enlarging_is_bilinear_and_each_module_corrects_the_one_before():
    model = build(features=64).eval()
    enlarged = model.enlarge(torch.tensor([0., 4]).expand(1, 1, 2, 2))
    assert enlarged[0, 0, 0].tolist() == [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
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
    spike = F.pad(torch.ones(1, 1, 1, 1), (6, 9, 5, 10))
    found = tower(spike)[0, 0]
    assert found[[0, 0, 7, 4, 5], [8, 0, 4, 7, 6]].tolist() == [1, 2, 3, 4, 5]
    block = hourglass.Residual(4, 6)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(block(x), block.branch(x) + block.skip(x))


def test_levels_are_those_of_the_authors():
    arms = {*range(17, 25)}
    legs = {2, 3, 5, 6, 8, 9, 11, 12}
    chest = {7, 10, 14, 15}
    limbs = [{13, 16}, {8, 11}, {9, 12}, {21, 23}, {22, 24}, {17, 19}, {18, 20}, {2, 5}, {3, 6}]
    expected = dict(
        body=[{*range(1, 25)}],
        regions=[{13, 16}, chest, {1, 4}, arms, legs],
        limbs=[*limbs, chest, {1, 4}],
        parts=[{part} for part in range(1, 25)],
    )
    assert hourglass.NAMES == tiny.NAMES
    for level, groups in expected.items():
        table = hourglass.level_table(level).tolist()
        found = [{i for i in range(25) if table[i] == k} for k in range(max(table) + 1)]
        assert sorted(map(sorted, found)) == sorted(map(sorted, [{0}, *groups]))
        assert found[0] == {0}


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
    joints = [[3, 7], [30.4, 0.6], [31.4, 15.4], [torch.nan, 2], [-0.6, 5], [5, 15.5]]
    maps, valid = hourglass.heat_maps(torch.tensor([joints]), 16, 32, 2.0)
    assert maps.isfinite().all()
    assert valid.tolist() == [[True, True, True, False, False, False]]
    peaks = maps[0, :3].flatten(1).argmax(1).tolist()
    assert peaks == [7 * 32 + 3, 32 + 30, 15 * 32 + 31]
    spot = maps[0, 0]
    assert spot[7, 3] == 1
    assert spot[9, 3] == pytest.approx(np.exp(-0.5))        # one spread below
    assert spot[7, 7] == pytest.approx(np.exp(-2))          # two to the right


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
    assert hourglass.heat_map_loss(logits, joints[:, 1:2].expand(1, 3, 2), 64) == 0
