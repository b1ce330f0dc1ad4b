"""ICNet, the image cascade network: cheap at high resolution, deep only at low resolution.

Zhao, Qi, Shen, Shi & Jia, arXiv 1704.08545 ("the source"). Layers as in
hellochick/ICNet-tensorflow, which "the paper" trained (Borrego Carazo, 2018, Section 3.2).

    image x1    ─> detail, to 1/8 ────────────────────────────────────────────────┐
    image x1/2  ─> conv1 conv2 conv3_1, to 1/16 ────────────────────┐             v
                    └─ x1/2 ─> conv3_2 conv4 conv5 pyramid ─> x2 ─> fuse16 ─> x2 ─> fuse8 ─> x2
                               to 1/32                        v               v              v
    logits (B, K, ...)      in training:                     1/16            1/8            1/4
                            at evaluation: 1/4 alone, then x4

    The number in a map's name is its divisor: fused16 has 1/16 of the image's height and width.

Why three resolutions: which part a pixel belongs to is told by its surroundings (context), and
where the part ends by the pixels themselves. Halving lets every later layer see twice as far (the
receptive field) at a quarter of the cost, so the 13 deep blocks work at 1/16 and 1/32, while
three convolutions are enough to find borders at full resolution. Cascade feature fusion (CFF)
then adds the finer map to the deeper one, step by step on the way back to the image's size.

Differs from the source: nothing is pretrained, hence the initialisation below, and batch
normalisation is trained from the start (in the paper only in the last 20,000 steps; train.py
--bn-after); loss weights are those of the paper's authors (the source: 0.16, 0.4, 1.0);
interpolation does not align corners (the source's does); the finest pooling has 6 x 6 cells (4 x 4
in the variant that the authors trained).
"""
from functools import partial

import torch
from torch import nn
import torch.nn.functional as F

PYRAMID = (1, 2, 3, 6)  # cells along each side, Zhao et al., arXiv 1612.01105


def resize(x, factor):
    """Bilinear, (B, C, H, W) of any float dtype -> (B, C, factor * H, factor * W) float32, because
    the gradient of a bf16 map is slow on CUDA. Convolutions under autocast round it themselves."""
    return F.interpolate(x.float(), scale_factor=factor, mode="bilinear")


def conv_bn(c_in, c_out, kernel=3, stride=1, dilation=1):
    """convolution => BN. H and W are divided by the stride. A dilation of 2 leaves one pixel out
    between those that a 3x3 kernel reads: it then reaches over 5x5 pixels at the same cost."""
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight)    # He et al., arXiv 1502.01852
    return nn.Sequential(conv, nn.BatchNorm2d(c_out, momentum=0.05))


def conv_bn_relu(*args, **options):
    """convolution => BN => ReLU."""
    return conv_bn(*args, **options).append(nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """1x1 => 3x3 => 1x1, plus the input (through a 1x1 where its shape differs) => ReLU.

    Why it adds the input: the block only has to learn what should change, and the gradient reaches
    earlier layers through the sum unchanged (He et al., arXiv 1512.03385).
    """

    def __init__(self, c_in, c_mid, c_out, dilation=1, stride=1):
        super().__init__()
        self.branch = nn.Sequential(
            conv_bn_relu(c_in, c_mid, 1, stride),
            conv_bn_relu(c_mid, c_mid, dilation=dilation),
            conv_bn(c_mid, c_out, 1)
        )
        # The last BN's scale: 16 branches of deviation 1/4, variance 1/16, add up to variance 1.
        # Where batch normalisation is frozen (--bn-after), nothing rescales the sums: with a scale
        # of 1 the features grow 80-fold from conv1 to conv5 (first weights, random images).
        last_bn = self.branch[-1][-1]
        nn.init.constant_(last_bn.weight, 0.25)
        if c_in == c_out and stride == 1:
            self.project = nn.Identity()
        else:
            self.project = conv_bn(c_in, c_out, 1, stride)

    def forward(self, x):
        # add_ and relu_ work in place: faster.
        return self.branch(x).add_(self.project(x)).relu_()


def bottlenecks(count, c_in, c_mid, c_out, dilation=1):
    """`count` bottlenecks, the first of which changes the number of channels."""
    blocks = []
    for _ in range(count):
        blocks.append(Bottleneck(c_in, c_mid, c_out, dilation))
        c_in = c_out
    return nn.Sequential(*blocks)


def averaging(side, cells, device):
    """A matrix (cells, side) that averages `side` pixels over each of `cells` cells. A pixel counts
    for every cell that it overlaps: with 5 pixels and 2 cells, the middle one counts for both. The
    product is adaptive_avg_pool2d along one side, which torch.onnx ties to the example's size."""
    # In steps of 1 / (side * cells), pixels are `cells` long, cells `side`, and all are integers.
    cell = torch.arange(cells, device=device)[:, None]
    pixel = torch.arange(side, device=device)
    offset = pixel * cells - cell * side        # of a pixel's start from a cell's
    overlap = (offset > -cells) & (offset < side)
    return overlap / overlap.sum(1, keepdim=True)


def pyramid_pooling(x):
    """x plus its cell means on each grid of PYRAMID, enlarged again, all (B, C, H, W). So a pixel
    also knows what is in its quarter, its ninth and its thirty-sixth of the image, and in all."""
    H, W = x.shape[-2:]
    total = x = x.float()       # see resize
    with torch.autocast(x.device.type, enabled=False):
        for cells in PYRAMID:
            rows = averaging(H, cells, x.device)
            columns = averaging(W, cells, x.device)
            means = rows @ x @ columns.T                            # (B, C, cells, cells)
            total = total + F.interpolate(means, (H, W), mode="bilinear")
    return total


class CascadeFeatureFusion(nn.Module):
    """ReLU(3x3 of the coarse map + 1x1 of the fine map), both (B, ., H, W) of the fine map's size.

    Why the 3x3 is dilated: the coarse map was enlarged by 2, so pixels that were neighbours lie two
    apart, and what lies between is interpolated from them. With dilation 2 the kernel's nine pixels
    are as far apart as nine neighbours were before; with dilation 1 they would span half of that,
    and mostly tell the same thing. (The source has 2; the paper's text says 1.)
    """

    def __init__(self, c_coarse, c_fine, c_out):
        super().__init__()
        self.coarse = conv_bn(c_coarse, c_out, dilation=2)
        self.fine = conv_bn(c_fine, c_out, 1)

    def forward(self, coarse, fine):
        return self.coarse(coarse).add_(self.fine(fine)).relu_()


def classifier(c_in, num_classes):
    """1x1 convolution to logits. Its weights are small, so that the logits start near its biases,
    which train.py sets to the classes' prior: the log of a class's share of the pixels."""
    head = nn.Conv2d(c_in, num_classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class ICNet(nn.Module):
    """Evaluation: (B, 3, H, W) normalised images -> (B, K, H, W) float32 logits.
    Training: -> float32 logits at 1/16, 1/8 and 1/4, each with a share of the loss, `head_weights`.
    width: factor on every channel count but the image's and the classes'; 2 doubles the filters.

    A head bears the name of the map that it reads; its logits are enlarged by 2 afterwards.
    An image of 320x320 costs 1.4 billion multiply-adds; doubled 5.6.
    """
    # The paper's Section 3.2.3.
    recipe = dict(
        batch_size=64,
        optimizer="SGD",
        optimizer_args={"momentum": 0.9},
        weight_decay=1e-4,
        lr=0.01,
        schedule="poly",
        power=0.9,
        iterations=40000
    )

    def __init__(self, num_classes=25, width=1, *, head_weights=(0.4, 0.6, 1.0)):
        super().__init__()
        self.head_weights = head_weights
        widths = [max(1, round(c * width)) for c in (32, 64, 128, 256, 512, 1024)]
        c32, c64, c128, c256, c512, c1024 = widths
        self.conv1 = nn.Sequential(
            conv_bn_relu(3, c32, stride=2),
            conv_bn_relu(c32, c32),
            conv_bn_relu(c32, c64),
            nn.MaxPool2d(3, 2, padding=1)
        )
        self.conv2 = bottlenecks(3, c64, c32, c128)
        self.conv3_1 = Bottleneck(c128, c64, c256, stride=2)
        self.conv3_2 = bottlenecks(3, c256, c64, c256)
        # From here on dilation widens what a layer sees: another halving would leave 5 x 5 pixels
        # of an image of 320 x 320.
        self.conv4 = bottlenecks(6, c256, c128, c512, dilation=2)
        self.conv5 = bottlenecks(3, c512, c256, c1024, dilation=4)
        self.reduce = conv_bn_relu(c1024, c256, 1)
        self.detail = nn.Sequential(
            conv_bn_relu(3, c32, stride=2),
            conv_bn_relu(c32, c32, stride=2),
            conv_bn_relu(c32, c64, stride=2)
        )
        self.fuse16 = CascadeFeatureFusion(c256, c256, c128)
        self.fuse8 = CascadeFeatureFusion(c128, c64, c128)
        self.head_deep32 = classifier(c256, num_classes)
        self.head_fused16 = classifier(c128, num_classes)
        self.head_fused8 = classifier(c128, num_classes)
        # train.py sets their biases; None: they have no coarser classes.
        self.heads = [
            (self.head_deep32, None),
            (self.head_fused16, None),
            (self.head_fused8, None)
        ]

    def forward(self, images):
        H, W = images.shape[-2:]
        # Zeros at the right and below make H and W multiples of 32, so that every halving is even:
        # for W = 100, -100 % 32 = 28 more columns make 128. In training they are multiples already.
        x = F.pad(images, (0, -W % 32, 0, -H % 32))
        middle8 = self.conv2(self.conv1(resize(x, 0.5)))      # (B, 128, H/8, W/8)
        middle16 = self.conv3_1(middle8)                        # (B, 256, H/16, W/16)
        deep32 = self.conv3_2(resize(middle16, 0.5))          # (B, 256, H/32, W/32)
        deep32 = self.conv5(self.conv4(deep32))                 # (B, 1024, H/32, W/32)
        deep32 = self.reduce(pyramid_pooling(deep32))           # (B, 256, H/32, W/32)
        detail8 = self.detail(x)                                # (B, 64, H/8, W/8)
        fused16 = self.fuse16(resize(deep32, 2), middle16)      # (B, 128, H/16, W/16)
        fused8 = self.fuse8(resize(fused16, 2), detail8)        # (B, 128, H/8, W/8)

        # A 1x1 convolution and a bilinear x2 commute, and x2 costs less on K channels than on 128.
        logits4 = resize(self.head_fused8(fused8), 2)           # (B, K, H/4, W/4)
        if not self.training:
            return resize(logits4, 4)[..., :H, :W]              # (B, K, H, W)
        logits16 = resize(self.head_deep32(deep32), 2)          # (B, K, H/16, W/16)
        logits8 = resize(self.head_fused16(fused16), 2)         # (B, K, H/8, W/8)
        return logits16, logits8, logits4

    def loss(self, outputs, batch, criterion):
        """outputs: of forward, in training. Returns (total, main), the latter at 1/4 alone. The
        criterion (train.py) brings the labels to the size of the logits.

        Why a loss at each resolution: its gradient reaches the deep branch directly, instead of
        only through both fusions, where the finer maps may drown it.
        """
        loss16, loss8, loss4 = [criterion(logits, batch["labels"]) for logits in outputs]
        weight16, weight8, weight4 = self.head_weights
        total = weight16 * loss16 + weight8 * loss8 + weight4 * loss4
        return total, loss4


def print_stages(model, size):
    """Prints each stage as one image passes it: the output's shape (C, H, W) and the weights.
    The smallest map is at 1/32 of the image's size (conv3_2 to reduce)."""

    def show(name, stage, inputs, output):
        weights = sum(p.numel() for p in stage.parameters())
        print(f"{name or 'in all':14}{tuple(output.shape[1:])!s:>16}{weights:>12,} weights")

    for name, stage in model.named_modules():
        if "." not in name:             # conv1, not its layers, conv1.0 and so on
            stage.register_forward_hook(partial(show, name))
    model.eval()(torch.zeros(1, 3, size, size))


if __name__ == "__main__":
    print_stages(ICNet(), 320)
