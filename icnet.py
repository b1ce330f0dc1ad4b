"""ICNet, the image cascade network: cheap at high resolution, deep only at low resolution.

Zhao, Qi, Shen, Shi & Jia, arXiv 1704.08545 ("the source"). Layers as in
hellochick/ICNet-tensorflow, which "the paper" trained (Borrego Carazo, 2018, Section 3.2). Two
branches look at the image at 1 and 1/2 of its size. The third, at 1/4, continues the first layers
of 1/2; it is deep, and cascade feature fusion (CFF) refines its output:

    1    -> high, to 1/8 ─────────────────────────────────────────────────┐
    1/2  -> conv1 conv2 conv3_1, to 1/16 ──────────────────┐              v
    1/4     └─ conv3_2 conv4 conv5 pyramid, to 1/32 -> x2 -> CFF -> x2 -> CFF -> x2
                                                       v            v            v
    logits (B, K, ...)      in training: 1/16,         1/8 and      1/4; at evaluation 1/4, then x4

Differs from the source: nothing is pretrained, hence the initialisation below; loss weights are
those of the paper's authors (the source: 0.16, 0.4, 1.0); interpolation does not align corners (the
source's does); the finest pooling has 6 x 6 cells (4 x 4 in the variant that the authors trained).
"""
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

PYRAMID = (1, 2, 3, 6)  # cells along each side, Zhao et al., arXiv 1612.01105


def resize(x, factor):
    """Bilinear, (B, C, H, W) -> (B, C, factor * H, factor * W); float32: bf16 is slow on CUDA."""
    return F.interpolate(x.float(), scale_factor=factor, mode="bilinear").to(x.dtype)


def conv_bn(c_in, c_out, kernel, stride=1, dilation=1):
    """convolution => BN. H and W are divided by the stride."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=False),
                         nn.BatchNorm2d(c_out, momentum=0.05))


def conv_bn_relu(*args, **options):
    """convolution => BN => ReLU."""
    return conv_bn(*args, **options).append(nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """1x1 => 3x3 => 1x1, plus the input (through a 1x1 where its shape differs) => ReLU."""

    def __init__(self, c_in, c_mid, c_out, stride=1, dilation=1):
        super().__init__()
        self.branch = nn.Sequential(conv_bn_relu(c_in, c_mid, 1, stride),
                                    conv_bn_relu(c_mid, c_mid, 3, dilation=dilation),
                                    conv_bn(c_mid, c_out, 1))
        changes = c_in != c_out or stride > 1
        self.project = conv_bn(c_in, c_out, 1, stride) if changes else nn.Identity()

    def forward(self, x):
        return F.relu(self.branch(x).add_(self.project(x)), inplace=True)  # in place is faster


def bottlenecks(count, c_in, c_mid, c_out, stride=1, dilation=1):
    """`count` bottlenecks, the first of which sets the number of channels and the stride."""
    return nn.Sequential(Bottleneck(c_in, c_mid, c_out, stride, dilation), *(
        Bottleneck(c_out, c_mid, c_out, dilation=dilation) for _ in range(count - 1)))


class PyramidPooling(nn.Module):
    """x plus its cell means on each grid of PYRAMID, enlarged again => 1x1 convolution."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = conv_bn_relu(c_in, c_out, 1)

    def forward(self, x):
        x = x.float()                                         # (B, c_in, H, W); see resize
        means = [F.adaptive_avg_pool2d(x, cells) for cells in PYRAMID]
        return self.conv(sum((F.interpolate(m, x.shape[-2:], mode="bilinear") for m in means), x))


class CascadeFeatureFusion(nn.Module):
    """ReLU(3x3 of the coarse map + 1x1 of the fine map), both (B, ., H, W) of the fine map's size.
    The dilation is 2, as in the source's code; the paper's text says 1."""

    def __init__(self, c_coarse, c_fine, c_out):
        super().__init__()
        self.coarse = conv_bn(c_coarse, c_out, 3, dilation=2)
        self.fine = conv_bn(c_fine, c_out, 1)

    def forward(self, coarse, fine):
        return F.relu(self.coarse(coarse).add_(self.fine(fine)), inplace=True)


class ICNet(nn.Module):
    """Evaluation: (B, 3, H, W) normalised images -> (B, K, H, W) float32 logits.
    Training: -> float32 logits at 1/16, 1/8 and 1/4, each with a share of the loss, `head_weights`.
    width: factor on every channel count but the image's and the classes'; 2 doubles the filters."""
    recipe = dict(batch_size=64, lr=0.01, optimizer="SGD", optimizer_args={"momentum": 0.9},
                  weight_decay=1e-4, schedule="poly", power=0.9, iterations=40000)  # Section 3.2.3

    def __init__(self, num_classes=25, width=1, *, head_weights=(0.4, 0.6, 1.0)):
        super().__init__()
        self.head_weights = head_weights
        widths = [max(1, round(c * width)) for c in (32, 64, 128, 256, 512, 1024)]
        c32, c64, c128, c256, c512, c1024 = widths
        self.conv1 = nn.Sequential(conv_bn_relu(3, c32, 3, stride=2), conv_bn_relu(c32, c32, 3),
                                   conv_bn_relu(c32, c64, 3), nn.MaxPool2d(3, 2, padding=1))
        self.conv2 = bottlenecks(3, c64, c32, c128)
        self.conv3_1 = bottlenecks(1, c128, c64, c256, stride=2)
        self.conv3_2 = bottlenecks(3, c256, c64, c256)
        self.conv4 = bottlenecks(6, c256, c128, c512, dilation=2)
        self.conv5 = bottlenecks(3, c512, c256, c1024, dilation=4)
        self.pyramid = PyramidPooling(c1024, c256)
        self.high = nn.Sequential(*(conv_bn_relu(c_in, c_out, 3, stride=2)
                                    for c_in, c_out in ((3, c32), (c32, c32), (c32, c64))))
        self.fuse16 = CascadeFeatureFusion(c256, c256, c128)
        self.fuse8 = CascadeFeatureFusion(c128, c64, c128)
        self.head16 = nn.Conv2d(c256, num_classes, 1)
        self.head8 = nn.Conv2d(c128, num_classes, 1)
        self.head4 = nn.Conv2d(c128, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # He et al., arXiv 1502.01852
            elif isinstance(module, Bottleneck):
                # The last BN's scale: 16 branches of variance 1/16 add up to variance 1. At scale 1
                # features grow 25-fold while batch normalisation is frozen (--bn-after).
                nn.init.constant_(module.branch[-1][-1].weight, 16 ** -0.5)
        self.heads = [(self.head16, None), (self.head8, None), (self.head4, None)]
        for head, _ in self.heads:  # small weights, so that the biases decide: train.py sets them
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, images):
        H, W = images.shape[-2:]
        x = F.pad(images, (0, -W % 32, 0, -H % 32))           # any size, made a multiple of 32
        # half, quarter and full are named after the size of their branch's image, not of the map.
        half = self.conv2(self.conv1(resize(x, 1 / 2)))       # (B, 128, H/8, W/8)
        half = self.conv3_1(half)                             # (B, 256, H/16, W/16)
        quarter = self.conv3_2(resize(half, 1 / 2))           # (B, 256, H/32, W/32)
        quarter = self.conv5(self.conv4(quarter))             # (B, 1024, H/32, W/32)
        quarter = self.pyramid(quarter)                       # (B, 256, H/32, W/32)
        full = self.high(x)                                   # (B, 64, H/8, W/8)
        fused16 = self.fuse16(resize(quarter, 2), half)       # (B, 128, H/16, W/16)
        fused8 = self.fuse8(resize(fused16, 2), full)         # (B, 128, H/8, W/8)

        # A 1x1 convolution and a bilinear x2 commute, and x2 costs less on K channels than on 128.
        logits4 = resize(self.head4(fused8).float(), 2)       # (B, K, H/4, W/4)
        if not self.training:
            return resize(logits4, 4)[..., :H, :W]            # (B, K, H, W)
        logits16 = resize(self.head16(quarter).float(), 2)    # (B, K, H/16, W/16)
        logits8 = resize(self.head8(fused16).float(), 2)      # (B, K, H/8, W/8)
        return logits16, logits8, logits4

    def loss(self, outputs, batch, criterion):
        """outputs: of forward, in training. Returns (total, main), the latter at 1/4 alone."""
        losses = [criterion(logits, batch["labels"]) for logits in outputs]
        return sum(weight * loss for weight, loss in zip(self.head_weights, losses)), losses[-1]


def print_stages(model, size):
    """Prints each stage as it is computed: output, parameters, multiply-adds (MAC) of one image."""
    counts = []

    def show(name, stage, output):
        total = counter.get_total_flops() // 2              # a multiply-add is two FLOPs
        counts.append(total if stage is model else total - sum(counts))
        shape = tuple(output.shape[1:])
        parameters = sum(p.numel() for p in stage.parameters())
        print(f"{name or 'in all':11}{shape!s:>16}{parameters:>11,} weights{counts[-1]:>15,} MAC")

    for name, stage in [*model.named_children(), ("", model)]:
        stage.register_forward_hook(lambda stage, _, out, name=name: show(name, stage, out))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size))


if __name__ == "__main__":
    print_stages(ICNet(), 320)
