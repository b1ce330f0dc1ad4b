"""SegNet: an encoder of convolutions and max pooling, and its mirror image as the decoder.

Badrinarayanan, Kendall & Cipolla, arXiv 1511.00561 ("the source"). "The paper" is the one rebuilt
here (Borrego Carazo, 2018), which trains SegNet-Basic (Section 3.3).

    images -> [conv BN ReLU, pool] x 4 -> [unpool, conv BN] x 4 -> 1x1 conv -> logits
    (B, 3, H, W)               └──────── indices ────────┘                  (B, K, H, W)

This is variant "basic", SegNet-Basic: 7x7 convolutions of one width, four halvings, no ReLU in the
decoder. Variant "vgg16" is the full SegNet: VGG-16's 13 convolutions and their mirror image, 3x3,
five halvings, ReLU in both halves.

Why it halves and enlarges again: what a pixel shows, an arm or a leg, is told by its surroundings.
After four halvings one value of the smallest map sees 106 x 106 pixels of the image, where four 7x7
convolutions alone see 25 x 25 (basic), and from the second convolution on each costs a quarter of
the one before it. The labels are as large as the image, so the decoder has to enlarge the map
again.

Why it keeps pooling indices: each maximum's place within its 2x2 window is what halving loses.
The decoder puts values back at exactly those pixels, so that borders between parts stay where they
were, at the cost of one index a value. The unpooling itself learns nothing; the convolution after
it learns to fill the zeros in between.

Differs from the source: images are normalised by mean and standard deviation, not by local response
normalisation, and nothing is pretrained. The code of the paper's authors also differs: its decoder
ignores the indices and learns its upsampling, a 2x2 transposed convolution.
"""
from functools import partial

import torch
from torch import nn
import torch.nn.functional as F

# The encoder's stages: channels that come in, then the channels after each convolution.
STAGES = {
    "basic": [(3, 64), (64, 64), (64, 64), (64, 64)],
    "vgg16": [
        (3, 64, 64),
        (64, 128, 128),
        (128, 256, 256, 256),
        (256, 512, 512, 512),
        (512, 512, 512, 512),
    ],
}


def convolution(c_in, c_out, kernel, bias=True):
    """A convolution that keeps height and width, initialised as in He et al., arXiv 1502.01852."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv


def conv_bn(channels, kernel, linear=False):
    """(convolution => BN => ReLU) from each count in `channels` to the next.
    linear: without the ReLU, and without biases, whose effect the BN would subtract anyway. The
    other convolutions keep theirs because the source's do; the BN subtracts them as well."""
    layers = []
    for c_in, c_out in zip(channels, channels[1:]):
        layers.append(convolution(c_in, c_out, kernel, bias=not linear))
        layers.append(nn.BatchNorm2d(c_out))
        if not linear:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def unpool(x, indices):
    """Undoes a 2x2 max pooling: each value returns to its maximum's pixel, the others become zero.

        a window    pooled   index    what the decoder    unpooled
        1 2                           made of the 4
        4 3         4        2        7                   0 0
                                                          7 0
    The index counts the pixels of the whole map row by row; this map is the window alone.
    x: (B, C, H, W); indices: (B, C, H, W) int64, of max_pool2d. Returns (B, C, 2H, 2W).
    """
    with torch.autocast("cpu", enabled=False):  # or autocast on a CPU answers in float32
        return F.max_unpool2d(x, indices, 2)


class SegNet(nn.Module):
    """(B, 3, H, W) normalised images -> (B, K, H, W) float32 logits, in training and evaluation.
    width: factor on every channel count but the image's and the classes'; 2 doubles the filters.
    An image of 320x320 costs 35 billion multiply-adds; doubled 138, vgg16 64."""
    recipe = dict(
        batch_size=32,
        optimizer="Adam",
        lr=0.01,
        schedule="constant",
        iterations=40000,
    )

    def __init__(self, num_classes=25, width=1, *, variant="basic"):
        super().__init__()
        encoder = [[max(1, round(c * width)) for c in stage] for stage in STAGES[variant]]
        encoder[0][0] = 3       # an image's colours, at any width
        C = encoder[0][1]
        # The mirror image; its last stage leads to the classifier instead of to three colours.
        decoder = [stage[::-1] for stage in reversed(encoder[1:])] + [[C, C]]
        # Basic only: no ReLU in the decoder (the source gives no reason). A stage is linear then:
        # it fills the zeros between the unpooled values by an interpolation whose weights are
        # learned, and a negative value, which speaks against a class, is passed on as well.
        basic = variant == "basic"
        kernel = 7 if basic else 3
        self.encoder = nn.ModuleList(conv_bn(stage, kernel) for stage in encoder)
        self.decoder = nn.ModuleList(conv_bn(stage, kernel, linear=basic) for stage in decoder)
        self.classifier = convolution(C, num_classes, 1 if basic else 3)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        # Whose biases train.py sets to the classes' prior, the log of each class's share of the
        # pixels; None: it has no coarser classes.
        self.heads = [(self.classifier, None)]

    def forward(self, images):
        H, W = images.shape[-2:]
        # Zeros at the right and below make H and W multiples of 32, so that every halving is even;
        # there are five in vgg16, and 2^5 = 32. For W = 100, -100 % 32 = 28 more columns make 128.
        # In training H and W are multiples of 32 already, so that nothing is added and cropped.
        x = F.pad(images, (0, -W % 32, 0, -H % 32))
        all_indices = []
        for stage in self.encoder:
            x, indices = self.pool(stage(x))    # (B, C, H/2, W/2) ... (B, C, H/16, W/16) in basic
            all_indices.append(indices)
        for stage in self.decoder:
            # The last pooling is undone first: (B, C, H/8, W/8) ... (B, C, H, W) in basic.
            x = stage(unpool(x, all_indices.pop()))
        logits = self.classifier(x)             # (B, K, H, W)
        return logits[..., :H, :W].float()

    def loss(self, outputs, batch, criterion):
        """Returns (total, main): the loss to minimise and the one to show; here, the same."""
        loss = criterion(outputs, batch["labels"])
        return loss, loss


def print_stages(model, size):
    """Prints each stage as one image passes it: the output's shape (C, H, W) and the weights."""

    def show(name, stage, inputs, output):
        if name == "pool":
            output, indices = output
        weights = sum(p.numel() for p in stage.parameters())
        print(f"{name or 'in all':12}{tuple(output.shape[1:])!s:>16}{weights:>12,} weights")

    for name, stage in model.named_modules():
        if name.count(".") < 2:         # encoder.0, not its layers, encoder.0.0 and so on
            stage.register_forward_hook(partial(show, name))
    model.eval()(torch.zeros(1, 3, size, size))


if __name__ == "__main__":
    print_stages(SegNet(), 320)
