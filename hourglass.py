"""Stacked hourglass: down to 1/16 and up again, several times in a row, with a loss after each.

Newell, Yang & Deng, arXiv 1603.06937; the paper trains it at full resolution (Section 4.1). Every
module sees what the one before it predicted, and corrects it ("intermediate supervision"):

    images ─> stem ─> x ─┬─────────────────────────────────────────> + ─> x of the next module
    (B, 3, H, W)         │                            ┌─> 1x1 ───────┤
                         └> hourglass, residual, 1x1 ─┴─> 1x1 ─┬─> 1x1   (both re-injected)
                                                               └─> logits (B, K, H, W)

Two experiments of the paper. Coarse-to-fine: the modules predict 2, 6, 12 and 25 classes (LEVELS).
Joints: what one module hands on also enters a second row of modules that predicts a heat map for
each joint, in training only; joints come from the data or are the centres of the labelled parts.
Differs from the source: its stem has stride 4 (here --stem-stride 4), and only the predictions have
biases, since every other one would be subtracted again by the batch normalisation that follows.
"""
import argparse
import contextlib
import math

import torch
from torch import nn
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

DEPTH = 4           # halvings within an hourglass
SPREAD = 6.4 / 320  # standard deviation of a joint's heat map, in image widths
NAMES = """background hips leftUpLeg rightUpLeg spine leftLeg rightLeg spine1 leftFoot rightFoot
    spine2 leftToeBase rightToeBase neck leftShoulder rightShoulder head leftArm rightArm
    leftForeArm rightForeArm leftHand rightHand leftHandIndex1 rightHandIndex1""".split()
# Label sets of the paper's authors from coarse to fine. A group becomes one class, the rest is
# background; pictures show a group in the colour of its first member.
LEVELS = (
    [tuple(range(1, 25))],
    [(16, 13), (7, 10, 14, 15), (1, 4), tuple(range(17, 25)), (2, 3, 5, 6, 8, 9, 11, 12)],
    [(16, 13), (8, 11), (9, 12), (21, 23), (22, 24), (17, 19), (18, 20), (2, 5), (3, 6),
     (7, 10, 14, 15), (1, 4)],
    [(part,) for part in range(1, 25)],
)


def spread_levels(stacks):
    """Which of LEVELS each of `stacks` modules learns: evenly from the first to the last."""
    last = len(LEVELS) - 1
    return [round(s * last / (stacks - 1)) for s in range(stacks - 1)] + [last]


def level_table(level):
    """(25,) int64: the class that each of SURREAL's ids belongs to at this level."""
    table = torch.zeros(25, dtype=torch.int64)
    for index, group in enumerate(LEVELS[level], 1):
        table[list(group)] = index
    return table


def level_maps(labels, stacks):
    """What each module learns under coarse-to-fine, in ids to be coloured like labels (Fig. 14).

    labels: (..., H, W) uint8, ids of SURREAL or 255. Returns a list of `stacks` such tensors.
    """
    maps = []
    for level in spread_levels(stacks):
        shown = torch.arange(256, dtype=torch.uint8, device=labels.device)
        for group in LEVELS[level]:
            shown[list(group)] = group[0]
        maps.append(shown[labels.long()])
    return maps


def centroids(labels, num_classes):
    """Centre of mass of every part, the stand-in for joints where the data has none.

    labels: (B, H, W) uint8, 255 = ignore. Returns (B, num_classes - 1, 2) float32, x then y in
    pixels; NaN for a part that is not visible.
    """
    parts = torch.arange(1, num_classes, device=labels.device).view(-1, 1, 1)
    mask = labels[:, None] == parts                                       # (B, K-1, H, W)
    columns, rows = mask.sum(-2), mask.sum(-1)                            # (B, K-1, W), (B, K-1, H)
    moments = [(count * torch.arange(count.shape[-1], device=count.device)).sum(-1)
               for count in (columns, rows)]                              # whole numbers: exact
    return torch.stack(moments, -1) / rows.sum(-1, keepdim=True)


def heat_maps(joints, H, W, spread):
    """A Gaussian with peak 1 at every joint, for the whole batch at once.

    joints: (B, J, 2), x then y in pixels of the map; spread: its standard deviation, in pixels.
    Returns maps (B, J, H, W) float32 and counts (B, J) bool: False for a joint NaN or outside.
    """
    x, y = joints.unbind(-1)
    counts = (x >= -0.5) & (x < W - 0.5) & (y >= -0.5) & (y < H - 0.5)    # False for NaN
    x, y = joints.nan_to_num().unsqueeze(-1).unbind(-2)                   # (B, J, 1) each
    along = lambda centre, side: torch.exp(
        -(torch.arange(side, device=joints.device) - centre) ** 2 / (2 * spread ** 2))
    return along(y, H).unsqueeze(-1) * along(x, W).unsqueeze(-2), counts


def heat_map_loss(maps, joints, spread):
    """Sigmoid cross-entropy, the loss the paper's hourglass came with (Section 4.1.3).

    maps: (B, J, H, W) logits; joints, spread: as for heat_maps. A mean over pixels would be that of
    the empty surroundings, 1/400 of it the joint's. The sum over a map's pixels is divided by the
    Gaussian's, 2 pi spread^2, instead: at any size it falls from about 7.6 to pi^2 / 6 for perfect
    maps, and a weight of 1 stands beside the log 25 of a cross-entropy over classes. Newell et al.
    take squared errors; with those, RMSprop's large first steps kept the loss above that of empty
    maps for 100 steps. Mean over joints that count (of all processes); 0 without any.
    """
    target, counts = heat_maps(joints, *maps.shape[-2:], spread)
    losses = F.binary_cross_entropy_with_logits(maps.float(), target, reduction="none")
    losses = losses.sum((-2, -1)) / (2 * math.pi * spread ** 2)           # (B, J)
    loss, count = (losses * counts).sum(), counts.sum()
    if dist.is_initialized():
        dist.all_reduce(count)
        loss = loss * dist.get_world_size()  # DistributedDataParallel averages gradients
    return loss / count.clamp(min=1)


@contextlib.contextmanager
def keep_statistics(module):
    """Within it, batch normalisation works as before but leaves its running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def recompute(module, x):
    """module(x) that keeps only x for the backward pass, which then computes the rest again.

    The second time must not count in the running statistics. torch.compile does without that: what
    it recomputes leaves out the statistics, and of contexts it knows only its own.
    """
    contexts = {} if torch.compiler.is_compiling() else dict(
        context_fn=lambda: (contextlib.nullcontext(), keep_statistics(module)))
    return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False, **contexts)


def bn_relu_conv(c_in, c_out, kernel):
    """BN => ReLU => convolution; the size is kept."""
    return nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(inplace=True),
                         nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False))


class Residual(nn.Module):
    """(BN => ReLU => convolution of 1x1, 3x3, 1x1), plus the input, through a 1x1 if need be."""

    def __init__(self, c_in, c_out):
        super().__init__()
        c_mid = max(1, c_out // 2)
        self.branch = nn.Sequential(bn_relu_conv(c_in, c_mid, 1), bn_relu_conv(c_mid, c_mid, 3),
                                    bn_relu_conv(c_mid, c_out, 1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        return self.branch(x) + self.skip(x)


class Hourglass(nn.Module):
    """One residual at this size, plus the same at half the size and below; (B, C, H, W) is kept."""

    def __init__(self, depth, channels):
        super().__init__()
        self.up = Residual(channels, channels)
        self.low = nn.Sequential(
            nn.MaxPool2d(2, ceil_mode=True),  # odd sizes round up, here and on the way back
            Residual(channels, channels),
            Hourglass(depth - 1, channels) if depth > 1 else Residual(channels, channels),
            Residual(channels, channels), nn.Upsample(scale_factor=2, mode="nearest"))

    def forward(self, x):
        H, W = x.shape[-2:]
        return self.up(x) + self.low(x)[..., :H, :W]


class Stage(nn.Module):
    """One module: x (B, C, H, W) -> its prediction (B, c_out, H, W) and what it hands on, like x.

    That is x + 1x1(features) + 1x1(prediction). The last module of a row has nothing to re-inject
    into and no such layers: it hands on its features.
    """

    def __init__(self, channels, c_out, last):
        super().__init__()
        self.features = nn.Sequential(
            Hourglass(DEPTH, channels), Residual(channels, channels),
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True))
        self.predict = nn.Conv2d(channels, c_out, 1)
        self.last = last
        if not last:
            self.reinject_features = nn.Conv2d(channels, channels, 1, bias=False)
            self.reinject_prediction = nn.Conv2d(c_out, channels, 1, bias=False)

    def forward(self, x):
        features = self.features(x)
        prediction = self.predict(features)
        if self.last:
            return prediction, features
        return prediction, (x + self.reinject_features(features)
                            + self.reinject_prediction(prediction))


class StackedHourglass(nn.Module):
    """Evaluation: (B, 3, H, W) normalised images -> (B, K, H, W) float32 logits, the last module's.

    Training: -> a list of each module's float32 logits, at full size, and a list of heat maps.

    width: factor on `features`, the channels of a module; the stem's grow with them.
    stem_stride: 1, 2 or 4: the modules work at this fraction of the resolution.
    coarse_to_fine: module s learns the label set of its level, for SURREAL's 25 classes.
    joints: "none"; "surreal": the num_joints joints of the data; "centroids": centres of the parts.
    joints_from, joints_modules, joints_weight: the module that feeds the branch, the number of
        modules in it, the factor on each one's loss.
    checkpoint_activations: recompute them in the backward pass, one module at a time. An image at
        320x320, stride 1, in bf16 takes 1.5 GiB instead of 4.1 (on the CPU), for 1.3 of the time.
    Raises ValueError for a value that makes no network.
    """
    recipe = dict(batch_size=3, lr=2.5e-4, optimizer="RMSprop", optimizer_args={}, weight_decay=0.0,
                  schedule="step", schedule_args={"factor": 0.96, "every": 2000},
                  iterations=150000)
    training_only = ("joint_stages.",)

    def __init__(self, num_classes=25, width=1, *, stacks=4, features=256, stem_stride=1,
                 coarse_to_fine=False, joints="none", joints_from=2, joints_modules=2,
                 joints_weight=1.0, num_joints=24, checkpoint_activations=False):
        super().__init__()
        if joints == "centroids":
            num_joints = num_classes - 1
        for name, value in dict(stacks=stacks, features=features, joints_from=joints_from,
                                joints_modules=joints_modules, num_joints=num_joints).items():
            most = 4096 if name in ("features", "num_joints") else 16
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, not {value}")
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, not {stem_stride}")
        if joints not in ("none", "surreal", "centroids"):
            raise ValueError(f"joints must be none, surreal or centroids, not {joints!r}")
        if joints != "none" and joints_from > stacks:
            raise ValueError(f"joints_from {joints_from} is none of the {stacks} stacks: "
                             f"name one of 1 to {stacks}, or build more stacks")
        if coarse_to_fine and num_classes != 25:
            raise ValueError(f"coarse_to_fine groups SURREAL's 25 classes and has no groups for "
                             f"{num_classes}: leave it out")
        self.num_classes, self.stem_stride = num_classes, stem_stride
        self.joints, self.joints_from, self.joints_weight = joints, joints_from, joints_weight
        self.checkpoint_activations = checkpoint_activations
        C, C2, C4 = (max(1, round(features * width / part)) for part in (1, 2, 4))

        self.stem = nn.Sequential(
            nn.Conv2d(3, C4, 7, stride=1 if stem_stride == 1 else 2, padding=3, bias=False),
            nn.BatchNorm2d(C4), nn.ReLU(inplace=True), Residual(C4, C2),
            nn.MaxPool2d(2, ceil_mode=True) if stem_stride == 4 else nn.Identity(),
            Residual(C2, C2), Residual(C2, C))
        widths, levels = [num_classes] * stacks, None
        if coarse_to_fine:
            widths = [1 + len(LEVELS[level]) for level in spread_levels(stacks)]
            levels = torch.stack([level_table(level) for level in spread_levels(stacks)])
        self.register_buffer("levels", levels, persistent=False)  # (stacks, 25) or None
        joint_widths = [] if joints == "none" else [num_joints] * joints_modules
        self.stages, self.joint_stages = (
            nn.ModuleList(Stage(C, c_out, s == len(row)) for s, c_out in enumerate(row, 1))
            for row in (widths, joint_widths))
        self.classifiers = tuple(f"{name}." for name, _ in self.named_modules()
                                 if name.endswith(("predict", "reinject_prediction")))
        for name, module in self.named_modules():
            if name.endswith("predict"):
                # Undecided at first, and heat maps at their mean: Lin et al., arXiv 1708.02002.
                nn.init.normal_(module.weight, std=0.001)
                nn.init.constant_(module.bias, math.log(2 * math.pi * SPREAD ** 2)
                                  if name.startswith("joint_stages") else 0)
            elif isinstance(module, nn.Conv2d):
                # He et al., arXiv 1502.01852. What is added to the stream is scaled down, since
                # 43 residuals in a row grow a millionfold where batch normalisation is frozen
                # (train.py --bn-after); one hourglass already adds up five copies of its input.
                gain = 0.25 if name.endswith("branch.2.2") else (
                    0.2 if name.endswith("reinject_features") else 1)
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= gain

    def forward(self, images):
        H, W = images.shape[-2:]
        if self.training and (H % 32 or W % 32):
            raise ValueError(f"StackedHourglass trains on multiples of 32 pixels, not on {H}x{W}")
        again = self.checkpoint_activations and self.training
        run = recompute if again else lambda module, x: module(x)

        x = run(self.stem, images)                         # (B, C, H/stride, W/stride)
        outputs, maps = [], []
        for s, stage in enumerate(self.stages, 1):
            logits, x = run(stage, x)
            outputs.append(logits)
            if self.training and s == self.joints_from:
                y = x                                      # the branch's own stream
                for joint_stage in self.joint_stages:
                    heat, y = run(joint_stage, y)          # (B, J, H/stride, W/stride)
                    maps.append(heat)
        if not self.training:
            return self.enlarge(logits)[..., :H, :W]       # (B, K, H, W)
        return [self.enlarge(logits) for logits in outputs], maps

    def enlarge(self, logits):
        """Logits at the size of the image, in float32: backwards, bilinear in bf16 is slow."""
        if self.stem_stride == 1:
            return logits.float()
        return F.interpolate(logits.float(), scale_factor=self.stem_stride, mode="bilinear")

    def loss(self, outputs, batch, criterion):
        """outputs: what forward returned in training. Returns (total, main), main the last one's.

        total: the sum over modules, as in the source, and joints_weight times that of the branch.
        """
        outputs, maps = outputs
        labels = batch["labels"]
        levels = [None] * len(outputs) if self.levels is None else self.levels
        losses = [criterion(logits, labels, levels=level)
                  for logits, level in zip(outputs, levels)]
        if self.joints == "none":
            return sum(losses), losses[-1]
        joints = batch["joints"] if self.joints == "surreal" else (
            centroids(labels, self.num_classes))
        joints = (joints + 0.5) / self.stem_stride - 0.5   # from pixels of the image to the maps'
        spread = SPREAD * labels.shape[-1] / self.stem_stride
        joint_losses = [heat_map_loss(heat, joints, spread) for heat in maps]
        return sum(losses) + self.joints_weight * sum(joint_losses), losses[-1]


def print_stages(model, size):
    """Prints output shape, parameters and multiply-adds of each stage, for one image."""
    stages = {}
    for name, child in model.named_children():
        several = isinstance(child, nn.ModuleList)
        stages |= {f"{name}.{i}": m for i, m in enumerate(child)} if several else {name: child}
    stages["total"] = model

    shapes = {}
    for name, stage in stages.items():  # the output of a module is its prediction, and more
        stage.register_forward_hook(lambda _, __, out, name=name: shapes.update(
            {name: out[0].shape if isinstance(out, tuple) else out.shape}))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size))
    counts = counter.get_flop_counts()

    print(f"{'stage':14}{'output':>18}{'parameters':>14}{'multiply-adds':>19}")
    for name, stage in stages.items():
        shape = " x ".join(map(str, shapes[name][1:])) if name in shapes else "in training only"
        parameters = sum(p.numel() for p in stage.parameters())
        path = type(model).__name__ + (f".{name}" if stage is not model else "")
        multiply_adds = sum(counts.get(path, {}).values()) / 2  # a multiply-add counts as two
        print(f"{name:14}{shape:>18}{parameters:>14,}{multiply_adds / 1e6:>17,.1f} M")


def main():
    parser = argparse.ArgumentParser(description="Prints the network stage by stage.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="side of the image in pixels")
    parser.add_argument("--num-classes", type=int, default=25, help="number of classes")
    parser.add_argument("--width", type=float, default=1, help="factor on the channel counts")
    parser.add_argument("--stacks", type=int, default=4, help="modules in a row")
    parser.add_argument("--features", type=int, default=256, help="channels of a module")
    parser.add_argument("--stem-stride", type=int, choices=(1, 2, 4), default=1,
                        help="the modules work at this fraction of the resolution")
    parser.add_argument("--coarse-to-fine", action="store_true", help="coarser classes first")
    parser.add_argument("--joints", choices=("none", "surreal", "centroids"), default="none",
                        help="with a branch for heat maps")
    options = vars(parser.parse_args())
    try:
        print_stages(size=options.pop("size"), model=StackedHourglass(**options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
