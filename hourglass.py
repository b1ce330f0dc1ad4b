"""Stacked hourglass: down to 1/16 and up again, several times in a row, with a loss after each.

Newell, Yang & Deng, arXiv 1603.06937 (the source); the paper (Borrego Carazo, 2018, Section 4.1)
trains it at full resolution. Each corrects the prediction before it (intermediate supervision):

    images -> stem -> x ─┬─────────────────────────────────────────> + -> x of the next module
    (B, 3, H, W)         │                            ┌─> 1x1 ───────┤
                         └> hourglass, residual, 1x1 ─┴─> 1x1 ─┬─> 1x1   (both re-injected)
                                                               └─> logits (B, K, H, W)

Two experiments of the paper. Coarse-to-fine: the modules predict 2, 6, 12 and 25 classes (LEVELS).
Joints: what one module hands on also enters a second row of modules that predicts a heat map for
each joint, in training only; joints come from the data or are the centres of the labelled parts.
Differs from the source: its stem has stride 4 (here --stem-stride 4), and only the predictions have
biases, since every other one would be subtracted again by the batch normalisation that follows.
Differs from the code of the paper's authors: their stem convolution is 1x1, and their joint branch
leaves the third of four modules (here the second).
"""
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
# Label sets of the paper's authors from coarse to fine, as positions in NAMES: a group becomes one
# class, the rest is background.
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


def centroids(labels, num_classes):
    """Centre of mass of every part, the paper's other kind of joints (Fig. 16). labels: (B, H, W)
    uint8. Returns (B, num_classes - 1, 2) float32, x then y in pixels; NaN for an absent part."""
    parts = torch.arange(1, num_classes, device=labels.device).view(-1, 1, 1)
    mask = labels[:, None] == parts                                       # (B, K-1, H, W)
    columns, rows = mask.sum(-2), mask.sum(-1)                            # (B, K-1, W), (B, K-1, H)
    moments = [(count * torch.arange(count.shape[-1], device=count.device)).sum(-1)
               for count in (columns, rows)]                              # whole numbers: exact
    return torch.stack(moments, -1) / rows.sum(-1, keepdim=True)


def heat_maps(joints, H, W, spread):
    """A Gaussian with peak 1 at every joint, for the whole batch at once.

    joints: (B, J, 2), x then y in pixels of the map; spread: the Gaussian's standard deviation.
    Returns maps (B, J, H, W) float32 and valid (B, J) bool: False for a joint NaN or outside.
    """
    def gaussian(centre, side):                                           # (B, J) -> (B, J, side)
        distance = torch.arange(side, device=joints.device) - centre.nan_to_num().unsqueeze(-1)
        return torch.exp(-distance ** 2 / (2 * spread ** 2))
    x, y = joints.unbind(-1)                                              # (B, J) each
    valid = (x >= -0.5) & (x < W - 0.5) & (y >= -0.5) & (y < H - 0.5)    # False for NaN
    return gaussian(y, H).unsqueeze(-1) * gaussian(x, W).unsqueeze(-2), valid


def heat_map_loss(maps, joints, spread):
    """Sigmoid cross-entropy, as in the paper (Section 4.1.3); Newell et al. take squared errors.

    maps: (B, J, H, W) logits; joints, spread: as for heat_maps. A joint fills 1/400 of its map and
    would vanish in a mean over pixels, so a map's sum is divided by its Gaussian's, 2 pi spread^2.
    The loss then starts at about 7.0 and is pi^2 / 6 for perfect maps, at any size.
    Returns, once DDP averages, the mean over the valid joints of all processes; 0 without any.
    """
    target, valid = heat_maps(joints, *maps.shape[-2:], spread)
    losses = F.binary_cross_entropy_with_logits(maps.float(), target, reduction="none")
    losses = losses.sum((-2, -1)) / (2 * math.pi * spread ** 2)           # (B, J)
    loss, count = (losses * valid).sum(), valid.sum()
    if dist.is_initialized():
        dist.all_reduce(count)
        loss = loss * dist.get_world_size()  # DistributedDataParallel averages gradients
    return loss / count.clamp(min=1)


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
            nn.MaxPool2d(2, ceil_mode=True),  # odd sizes round up; forward cuts the rest off
            Residual(channels, channels),
            Hourglass(depth - 1, channels) if depth > 1 else Residual(channels, channels),
            Residual(channels, channels), nn.Upsample(scale_factor=2, mode="nearest"))

    def forward(self, x):
        H, W = x.shape[-2:]
        return self.up(x) + self.low(x)[..., :H, :W]


class Stage(nn.Module):
    """One module: x (B, C, H, W) -> prediction (B, c_out, H, W) and the next module's x, which is
    x + 1x1(features) + 1x1(prediction). The last one has no next: it returns its features."""

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
    stem_stride: 1, 2 or 4: the modules work at 1, 1/2 or 1/4 of the image's height and width.
    coarse_to_fine: module s learns the label set of its level, for SURREAL's 25 classes.
    joints: "none"; "surreal": the num_joints joints of the data; "centroids": centres of the parts.
    joints_from, joints_modules: which module (1 is the first) feeds the branch; its own modules.
    checkpoint_activations: recompute them in the backward pass, one module at a time. An image at
        320x320, stride 1, bf16 takes 1.5 GiB instead of 4.1 (on the CPU), and 1.3 times as long.
    """
    recipe = dict(batch_size=3, lr=2.5e-4, optimizer="RMSprop", schedule="step", factor=0.96,
                  every=2000, iterations=150000, val_every=1000, val_images=300)

    def __init__(self, num_classes=25, width=1, *, stacks=4, features=256, stem_stride=1,
                 coarse_to_fine=False, joints="none", joints_from=2, joints_modules=2,
                 num_joints=24, checkpoint_activations=False):
        super().__init__()
        self.num_classes, self.stem_stride = num_classes, stem_stride
        self.joints, self.joints_from = joints, min(joints_from, stacks)
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
        self.register_buffer("levels", levels, persistent=False)   # (stacks, 25) or None
        num_maps = {"none": 0, "surreal": num_joints, "centroids": num_classes - 1}[joints]
        joint_widths = [num_maps] * joints_modules if num_maps else []
        self.stages = nn.ModuleList(Stage(C, K, s == stacks) for s, K in enumerate(widths, 1))
        self.joint_stages = nn.ModuleList(
            Stage(C, J, s == joints_modules) for s, J in enumerate(joint_widths, 1))
        for name, module in self.named_modules():
            if name.endswith("predict"):
                # Small weights: heat maps start at their mean, classes at their prior (train.py).
                nn.init.normal_(module.weight, std=0.001)
                nn.init.constant_(module.bias, math.log(2 * math.pi * SPREAD ** 2)
                                  if name.startswith("joint_stages") else 0)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)     # He et al., arXiv 1502.01852
                # Scaled down: the last convolution of a residual, re-injected features. If BN
                # is frozen (--bn-after), 43 residuals in a row would else grow x a millionfold.
                module.weight.data *= (0.25 if name.endswith("branch.2.2") else
                                       0.2 if name.endswith("reinject_features") else 1)

    def forward(self, images):
        H, W = images.shape[-2:]
        x = self.run(self.stem, images)                    # (B, C, H/stride, W/stride)
        outputs, maps = [], []
        for s, stage in enumerate(self.stages, 1):
            logits, x = self.run(stage, x)
            outputs.append(logits)
            if self.training and s == self.joints_from:
                y = x                                      # the branch's own stream
                for joint_stage in self.joint_stages:
                    heat, y = self.run(joint_stage, y)     # (B, J, H/stride, W/stride)
                    maps.append(heat)
        if not self.training:
            return self.enlarge(logits)[..., :H, :W]       # (B, K, H, W)
        return [self.enlarge(logits) for logits in outputs], maps

    def run(self, module, x):
        """module(x), which checkpoint_activations computes again in the backward pass instead of
        keeping it. Batch normalisation then updates its statistics twice with the same batch."""
        if self.checkpoint_activations and self.training:
            return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
        return module(x)

    def enlarge(self, logits):
        """Logits at the size of the image, in float32: in bf16, bilinear is slow backwards."""
        if self.stem_stride == 1:
            return logits.float()
        return F.interpolate(logits.float(), scale_factor=self.stem_stride, mode="bilinear")

    @property
    def heads(self):
        """[(classification layer, its levels (25,) or None)]: their biases start at the prior."""
        levels = [None] * len(self.stages) if self.levels is None else self.levels
        return [(stage.predict, level) for stage, level in zip(self.stages, levels)]

    def loss(self, outputs, batch, criterion):
        """outputs: what forward returned in training. Returns (total, main): the sum over all
        modules, as in the source, and the loss of the last module of the stack."""
        outputs, maps = outputs
        labels = batch["labels"]
        losses = [criterion(logits, labels, levels=level)
                  for logits, (_, level) in zip(outputs, self.heads)]
        if self.joints == "none":
            return sum(losses), losses[-1]
        joints = batch["joints"]
        if self.joints == "centroids":
            joints = centroids(labels, self.num_classes)
        joints = (joints + 0.5) / self.stem_stride - 0.5   # from pixels of the image to the maps'
        spread = SPREAD * labels.shape[-1] / self.stem_stride
        joint_losses = [heat_map_loss(heat, joints, spread) for heat in maps]
        return sum(losses) + sum(joint_losses), losses[-1]


def print_stages(model, size):
    """Prints each stage as it is computed from one image: output, parameters, and multiply-adds
    (MAC) since the line above. "bottom" is the bottleneck of the first hourglass."""
    counts = []

    def show(name, stage, output):
        total = counter.get_total_flops() // 2              # a multiply-add is two FLOPs
        counts.append(total if stage is model else total - sum(counts))
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])
        parameters = sum(p.numel() for p in stage.parameters())
        print(f"{name or 'in all':11}{shape!s:>16}{parameters:>11,} weights{counts[-1]:>16,} MAC")

    bottom = model.stages[0].features[0]
    while isinstance(bottom, Hourglass):
        bottom = bottom.low[2]
    stages = [("stem", model.stem), ("bottom", bottom), *model.stages.named_children(), ("", model)]
    for name, stage in stages:
        stage.register_forward_hook(lambda stage, _, out, name=name: show(name, stage, out))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval().to("meta")(torch.zeros(1, 3, size, size, device="meta"))  # shapes alone


if __name__ == "__main__":
    print_stages(StackedHourglass(), 320)
