"""Stacked hourglass: down to 1/16 and up again, several times in a row, with a loss after each.

Newell, Yang & Deng, arXiv 1603.06937 ("the source"). "The paper" is the one rebuilt here (Borrego
Carazo, 2018), which trains it at full resolution (Section 4.1). A *module* is an hourglass with a
prediction of its own; `stacks` of them in a row are the network, each correcting the one before:

    images -> stem -> x ─┬─────────────────────────────────────────────────>+ -> the next module's x
    (B, 3, H, W)         │            ┌─> reinject_features ────────────────┤
                         └> features ─┴─> predict ─┬─> reinject_prediction ─┘
                                                   └─> logits (B, K, H, W)

    features: hourglass, residual, 1x1. The other three are a 1x1 convolution each.

Why it goes down: which part a pixel belongs to is told by its surroundings. At 1/16 a 3x3
convolution reaches over 48 pixels of the image, at a 256th of the cost. Why up again: the labels
are as large as the image, and the residual that skips the way down kept the borders.
Why several in a row: a module that sees the first prediction of the whole body can correct a hand
that does not fit its arm.
Why a loss after each (intermediate supervision): its gradient reaches the early modules directly,
instead of through all the later ones, and makes each of them predict something worth correcting.
Why re-injection: a prediction has few channels, features more than it tells, and x all that was
known before; their sum lets the next module start from all three.

Two experiments of the paper. Coarse-to-fine: the modules predict 2, 6, 12 and 25 classes (LEVELS).
Joints: what one module hands on also enters a second stack of modules that predicts a heat map for
each joint, in training only; joints come from the data or are the centres of the labelled parts.
Differs from the source: its stem has stride 4 (here stem_stride=4), and only the predictions have
biases, since every other one would be subtracted again by the batch normalisation that follows.
Differs from the code of the paper's authors: their stem convolution is 1x1, their joint branch
leaves the third of four modules (here the second), and they use dropout of 0.2 after each
hourglass, which the paper does not mention. Here no layer draws at random: train.py resumes a run
exactly because nothing but (seed, step) decides what a step does. A layer that draws from the
global generator, as dropout does, would break that.
"""
from functools import partial

import torch
from torch import distributed as dist, nn
import torch.nn.functional as F

DEPTH = 4           # halvings within an hourglass
SPREAD = 0.02       # standard deviation of a joint's heat map in image widths: 6.4 pixels of 320


# ---- Blocks

def convolution(c_in, c_out, kernel=1, stride=1):
    """A convolution without bias, initialised as in He et al., arXiv 1502.01852. H and W are
    divided by the stride."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv


def bn_relu_conv(c_in, c_out, kernel):
    """BN => ReLU => convolution; the size is kept."""
    return nn.Sequential(
        nn.BatchNorm2d(c_in),
        nn.ReLU(inplace=True),
        convolution(c_in, c_out, kernel)
    )


class Residual(nn.Module):
    """(BN => ReLU => convolution of 1x1, 3x3, 1x1), plus the input, through a 1x1 if need be.

    Why it adds the input: the branch only has to learn what should change, and the gradient reaches
    earlier layers through the sum unchanged (He et al., arXiv 1603.05027).
    """

    def __init__(self, c_in, c_out=None):
        super().__init__()
        c_out = c_out or c_in
        c_mid = max(1, c_out // 2)
        self.branch = nn.Sequential(
            bn_relu_conv(c_in, c_mid, 1),
            bn_relu_conv(c_mid, c_mid, 3),
            bn_relu_conv(c_mid, c_out, 1)
        )
        # The last convolution starts small, because a frozen BN (--bn-after) does not rescale: 43
        # branches in a row, each of the variance of x, would multiply it by 2^43. A quarter of the
        # weights is a 16th of the variance, and (1 + 1/16)^43 = 14.
        self.branch[-1][-1].weight.data *= 0.25
        self.skip = nn.Identity() if c_in == c_out else convolution(c_in, c_out)

    def forward(self, x):
        return self.branch(x) + self.skip(x)


class Hourglass(nn.Module):
    """A residual at this size, plus residuals at half the size around a smaller hourglass.
    (B, C, H, W) is kept. depth: how often the size is halved, here and further inside."""

    def __init__(self, depth, channels):
        super().__init__()
        self.skip = Residual(channels)
        self.inner = nn.Sequential(
            nn.MaxPool2d(2, ceil_mode=True),    # odd sizes are rounded up
            Residual(channels),
            Hourglass(depth - 1, channels) if depth > 1 else Residual(channels),
            Residual(channels)
        )

    def forward(self, x):
        skip = self.skip(x)                                 # (B, C, H, W)
        # The nearest value, interpolate's default, repeats each one 2x2 times (the last one less
        # often where H or W is odd). It is cheap, and enough: the skip has the detail.
        return skip + F.interpolate(self.inner(x), x.shape[-2:])


class HourglassModule(nn.Module):
    """x (B, C, H, W) -> prediction (B, c_out, H, W) and the next module's x, which is
    x + 1x1(features) + 1x1(prediction). The last module has no next: it returns its features.
    level: which of the module's classes each of SURREAL's ids belongs to, (25,) int64 of
    level_table; None where the module learns the labels as they are."""

    def __init__(self, channels, c_out, last):
        super().__init__()
        self.features = nn.Sequential(
            Hourglass(DEPTH, channels),
            Residual(channels),
            convolution(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True)
        )
        self.predict = nn.Conv2d(channels, c_out, 1)
        nn.init.normal_(self.predict.weight, std=0.001)
        # log(0.0025), because 0.0025 = 2 pi SPREAD^2 is the mean of a square heat map. Softmax
        # ignores it, and train.py sets the biases of class heads.
        nn.init.constant_(self.predict.bias, -6)
        self.register_buffer("level", None, persistent=False)
        self.last = last
        if not last:
            self.reinject_prediction = convolution(c_out, channels)
            self.reinject_features = convolution(channels, channels)
            # Small, because a frozen BN does not rescale: x doubles from module to module, and
            # without the factor it would grow ninefold (first weights, random images).
            self.reinject_features.weight.data *= 0.2

    def forward(self, x):
        features = self.features(x)                         # (B, C, H, W)
        prediction = self.predict(features)                 # (B, c_out, H, W)
        if self.last:
            return prediction, features
        return prediction, (
            x
            + self.reinject_features(features)
            + self.reinject_prediction(prediction))


def enlarge(logits, factor):
    """Bilinear, (B, K, H, W) of any float dtype -> (B, K, factor * H, factor * W) float32, because
    the gradient of a bf16 map is slow on CUDA."""
    return F.interpolate(logits.float(), scale_factor=factor, mode="bilinear")


def stack_modules(channels, counts):
    """A module for each of `counts`, the number of channels that it predicts."""
    return nn.ModuleList(
        HourglassModule(channels, count, number == len(counts))
        for number, count in enumerate(counts, 1))


# ---- The network

class StackedHourglass(nn.Module):
    """Evaluation: (B, 3, H, W) normalised images -> (B, K, H, W) float32 logits, the last module's.

    Training: -> a list of each module's float32 logits, at half the image's size
    (stem_stride 4) or at all of it, and a list of heat maps.
    width: factor on `features`, the channels of a module; the stem's grow with them.
    stem_stride: 1 or 4: the modules work at 1 or 1/4 of the image's height and width. An image of
        320x320 then costs 349 or 23 billion multiply-adds.
    coarse_to_fine: each module learns the label set of its level, for SURREAL's 25 classes.
    joints: "none"; "surreal": the num_joints joints of the data; "centroids": centres of the parts.
    joints_from, joints_modules: which module (1 is the first) hands its x to the branch, or, if it
        is the last and has no next x, its features; how many modules the branch has.
    joint_weight: factor on the branch's loss; 1 is the authors'.
    """
    recipe = dict(
        batch_size=3,
        optimizer="RMSprop",
        lr=2.5e-4,
        schedule="step",
        factor=0.96,
        every=2000,
        iterations=150000,
        val_every=1000,
        val_images=300
    )

    def __init__(self, num_classes=25, width=1, *, stacks=4, features=256, stem_stride=1,
                 coarse_to_fine=False, joints="none", num_joints=24, joints_from=2,
                 joints_modules=2, joint_weight=1.0):
        super().__init__()
        self.num_classes = num_classes
        self.stem_stride = stem_stride
        self.joints = joints
        self.joints_from = min(joints_from, stacks)
        self.joint_weight = joint_weight
        C, C2, C4 = [max(1, round(features * width / part)) for part in (1, 2, 4)]
        self.stem = nn.Sequential(
            convolution(3, C4, 7, min(stem_stride, 2)),
            nn.BatchNorm2d(C4),
            nn.ReLU(inplace=True),
            Residual(C4, C2),
            nn.MaxPool2d(2, ceil_mode=True) if stem_stride == 4 else nn.Identity(),
            Residual(C2),
            Residual(C2, C)
        )
        counts = [num_classes] * stacks
        if coarse_to_fine:
            # About evenly from the coarsest to the finest (round takes 0.5 to the even neighbour):
            # of 2 modules body and parts, of 3 body, limbs and parts; a single module learns parts.
            levels = list(LEVELS)
            names = [levels[round(s * 3 / (stacks - 1))] for s in range(stacks - 1)] + ["parts"]
            counts = [1 + len(LEVELS[name]) for name in names]
        self.stack = stack_modules(C, counts)
        if coarse_to_fine:
            for module, name in zip(self.stack, names):
                module.level = level_table(name)

        num_maps = num_classes - 1 if joints == "centroids" else num_joints
        counts = [] if joints == "none" else [num_maps] * joints_modules
        self.joint_stack = stack_modules(C, counts)

    def forward(self, images):
        H, W = images.shape[-2:]
        x = self.stem(images)                               # (B, C, H/stride, W/stride)
        outputs = []
        maps = []
        for number, module in enumerate(self.stack, 1):
            logits, x = module(x)                           # (B, K, H/stride, W/stride)
            outputs.append(logits)
            if self.training and number == self.joints_from:
                y = x                                       # the joint branch's own x
                for joint_module in self.joint_stack:
                    heat, y = joint_module(y)               # (B, J, H/stride, W/stride)
                    maps.append(heat)
        if self.training:
            # Modules at a quarter of the size: the loss at half of it costs a quarter of what it
            # costs at full size. At a quarter, the network would not learn where within its 4x4
            # pixels a part ends: 17.0 % mIoU instead of 20.3 after half of a quick run.
            factor = min(self.stem_stride, 2)
            return [enlarge(logits, factor) for logits in outputs], maps    # (B, K, H/2, W/2)
        # Where H or W is no multiple of 4, there is too much at the right or below.
        return enlarge(logits, self.stem_stride)[..., :H, :W]       # (B, K, H, W)

    @property
    def heads(self):
        """[(classification layer, its level_table or None)]: train.py sets their biases to the
        classes' prior, the log of each class's share of the pixels."""
        return [(module.predict, module.level) for module in self.stack]

    def loss(self, outputs, batch, criterion):
        """outputs: what forward returned in training. Returns (total, main): the sum over all
        modules, as in the source, and the loss of the last module of the stack. The criterion
        (train.py) brings the labels to the size of the logits and to each module's level."""
        outputs, maps = outputs
        labels = batch["labels"]
        losses = [criterion(logits, labels, levels=module.level)
                  for logits, module in zip(outputs, self.stack)]
        total = sum(losses)
        joints = batch.get("joints")
        if self.joints == "centroids":
            joints = centroids(labels, self.num_classes)
        for logits in maps:
            total = total + self.joint_weight * heat_map_loss(logits, joints, self.stem_stride)
        return total, losses[-1]


# ---- Coarse-to-fine labels

NAMES = """background hips leftUpLeg rightUpLeg spine leftLeg rightLeg spine1 leftFoot rightFoot
    spine2 leftToeBase rightToeBase neck leftShoulder rightShoulder head leftArm rightArm
    leftForeArm rightForeArm leftHand rightHand leftHandIndex1 rightHandIndex1""".split()
# Label sets of the paper's authors from coarse to fine. Each line becomes one class, in this order
# after the background.
LEVELS = {
    "body": [" ".join(NAMES[1:])],
    "regions": [
        "head neck",
        "spine1 spine2 leftShoulder rightShoulder",
        "hips spine",
        """leftArm leftForeArm leftHand leftHandIndex1
           rightArm rightForeArm rightHand rightHandIndex1""",
        "leftUpLeg leftLeg leftFoot leftToeBase rightUpLeg rightLeg rightFoot rightToeBase",
    ],
    "limbs": [
        "head neck",
        "leftFoot leftToeBase",
        "rightFoot rightToeBase",
        "leftHand leftHandIndex1",
        "rightHand rightHandIndex1",
        "leftArm leftForeArm",
        "rightArm rightForeArm",
        "leftUpLeg leftLeg",
        "rightUpLeg rightLeg",
        "spine1 spine2 leftShoulder rightShoulder",
        "hips spine",
    ],
    "parts": NAMES[1:],
}


def level_table(name):
    """(25,) int64: the class that each of SURREAL's ids belongs to at this level. At "regions",
    head (16) and neck (13) become 1, hips (1) become 3 and the background (0) stays 0."""
    classes = dict.fromkeys(NAMES, 0)
    for coarse, group in enumerate(LEVELS[name], 1):
        classes |= dict.fromkeys(group.split(), coarse)
    return torch.tensor([*classes.values()])


# ---- Joints

def centroids(labels, num_classes):
    """Centre of mass of every part, the paper's other kind of joints (Fig. 16). labels: (B, H, W)
    uint8. Returns (B, num_classes - 1, 2) float32, x then y in pixels; NaN for an absent part."""
    parts = torch.arange(1, num_classes, device=labels.device)[:, None, None]
    mask = labels[:, None] == parts                         # (B, K-1, H, W)
    centre = []
    for other_axis in (-2, -1):                             # x, then y
        counts = mask.sum(other_axis)                       # (B, K-1, W): pixels in each column
        positions = torch.arange(counts.shape[-1], device=labels.device)
        centre.append((counts * positions).sum(-1) / counts.sum(-1))    # 0 / 0 = NaN
    return torch.stack(centre, -1)


def heat_maps(joints, H, W, spread):
    """A Gaussian with peak 1 at every joint, for the whole batch at once.

    joints: (B, J, 2), x then y in pixels of the map; spread: the Gaussian's standard deviation.
    Returns maps (B, J, H, W) float32 and valid (B, J) bool: False for a joint NaN or outside.
    exp(-(dx^2 + dy^2)) = exp(-dx^2) exp(-dy^2), so a map is the outer product of a column's
    Gaussian and a row's. A joint at x = 0, y = 1 on a map of 2x2, with spread 1:

        column   row        map
        0.61     1  0.61    0.61  0.37
        1                   1     0.61
    """
    def gaussian(centre, side):                             # (B, J) -> (B, J, side)
        distance = torch.arange(side, device=joints.device) - centre.nan_to_num()[..., None]
        return torch.exp(-distance ** 2 / (2 * spread ** 2))

    x, y = joints.unbind(-1)                                # (B, J) each
    # A pixel reaches 0.5 to either side. Comparisons with NaN are False.
    valid = (x >= -0.5) & (x < W - 0.5) & (y >= -0.5) & (y < H - 0.5)
    column = gaussian(y, H)[..., None]                   # (B, J, H, 1)
    row = gaussian(x, W)[..., None, :]                    # (B, J, 1, W)
    return column * row, valid


def heat_map_loss(logits, joints, stride):
    """Sigmoid cross-entropy, as in the paper (Section 4.1.3); Newell et al. take squared errors.

    logits: (B, J, H, W) of any float dtype; joints: (B, J, 2), x then y in pixels of the image,
    which is `stride` times as large. Returns the mean over pixels and over the valid joints of all
    images, 0 without any. With several processes it is this process's share of that mean over all
    of them, scaled so that the average that DistributedDataParallel takes is the mean.
    """
    H, W = logits.shape[-2:]
    # Whole numbers are centres of pixels: at stride 4, the first pixel of a map covers the image's
    # pixels 0 to 3, so its centre, 0, is 1.5 there.
    joints = (joints + 0.5) / stride - 0.5
    target, valid = heat_maps(joints, H, W, SPREAD * W)
    # A joint that is not valid has the weight 0.
    total = F.binary_cross_entropy_with_logits(
        logits.float(), target, valid[..., None, None], reduction="sum")
    count = valid.sum()
    if dist.is_initialized():
        # Divided by the joints of all processes; times their number, which averaging divides by.
        dist.all_reduce(count)
        total = total * dist.get_world_size()
    return total / (count.clamp(1) * H * W)


def print_stages(model, size):
    """Prints each stage as one image passes it: the output's shape (C, H, W) and the weights.
    Innermost in each hourglass is its smallest map."""
    def show(name, stage, inputs, output):
        weights = sum(p.numel() for p in stage.parameters())
        print(f"{name or 'in all':48}{tuple(output.shape[1:])!s:>16}{weights:>12,} weights")

    for name, stage in model.named_modules():
        if not name or name.endswith(("stem", DEPTH * ".inner.2", ".features", "predict")):
            stage.register_forward_hook(partial(show, name))
    model.eval()(torch.zeros(1, 3, size, size))


if __name__ == "__main__":
    with torch.device("meta"):      # shapes alone, nothing is computed
        print_stages(StackedHourglass(), 320)
