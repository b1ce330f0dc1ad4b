"""SegNet: an encoder of convolutions and max pooling, and its mirror image as the decoder.

Badrinarayanan, Kendall & Cipolla, arXiv 1511.00561. Max pooling remembers which place of its 2x2
window each value came from (the "pooling indices"), and the decoder puts values back at exactly
those places: boundaries survive four or five halvings without a learned upsampling.

    images ─> [conv BN ReLU, pool] x 4 ─> [unpool, conv BN] x 4 ─> 1x1 conv ─> logits
    (B, 3, H, W)               └──────── indices ────────┘                    (B, K, H, W)

variant "basic" is SegNet-Basic, which the paper trains (Section 3.3): 7x7 convolutions. "vgg16" is
the full SegNet: VGG-16's 13 convolutions and their mirror image, 3x3, ReLU in both halves.
Differs from the source: images are normalised by mean and standard deviation, where the original
normalises local responses, and nothing is pretrained.
"""
import argparse

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

VGG16 = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512),
         (512, 512, 512, 512)]  # channels in, then after each convolution, between the poolings


def conv_bn(channels, kernel, bias=True, relu=True):
    """(convolution => BN => ReLU) from each count in `channels` to the next; the size is kept."""
    layers = []
    for c_in, c_out in zip(channels, channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias),
                   nn.BatchNorm2d(c_out)]
        if relu:
            layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def unpool(x, indices):
    """Undoes a 2x2 pooling: each value goes where its maximum came from, the rest is zero.

    x: (B, C, H, W); indices: (B, C, H, W) int64 of max_pool2d. Returns (B, C, 2H, 2W), dtype of x.
    """
    with torch.autocast("cpu", enabled=False):  # there it would go through float32, on GPUs not
        return F.max_unpool2d(x, indices, 2)


class SegNet(nn.Module):
    """(B, 3, H, W) normalised images -> (B, K, H, W) float32 logits, in training and evaluation.

    width: factor on every channel count but the image's and the classes'; 2 doubles the filters.
    """
    recipe = dict(batch_size=32, lr=0.01, optimizer="Adam", optimizer_args={}, weight_decay=0.0,
                  schedule="constant", schedule_args={}, iterations=40000)
    training_only = ()
    classifiers = ("classifier.",)

    def __init__(self, num_classes=25, width=1, *, variant="basic"):
        super().__init__()
        wide = lambda c: c if c == 3 else max(1, round(c * width))
        if variant == "basic":
            C = wide(64)
            encoder = [conv_bn((c, C), 7) for c in (3, C, C, C)]
            decoder = [conv_bn((C, C), 7, bias=False, relu=False) for _ in range(4)]
            classifier = nn.Conv2d(C, num_classes, 1)
        elif variant == "vgg16":
            stages = [[wide(c) for c in stage] for stage in VGG16]
            encoder = [conv_bn(stage, 3) for stage in stages]
            del stages[0][0]  # the mirror image of the first convolution is the classifier
            decoder = [conv_bn(stage[::-1], 3) for stage in stages[::-1]]
            classifier = nn.Conv2d(wide(64), num_classes, 3, padding=1)
        else:
            raise ValueError(f"variant must be basic or vgg16, not {variant!r}")
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(decoder)
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # He et al., arXiv 1502.01852
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images):
        H, W = images.shape[-2:]
        if self.training and (H % 32 or W % 32):
            raise ValueError(f"SegNet trains on multiples of 32 pixels, not on {H}x{W}")
        x = F.pad(images, (0, -W % 32, 0, -H % 32))  # evaluation takes any size

        indices = []
        for stage in self.encoder:
            x, where = F.max_pool2d(stage(x), 2, return_indices=True)  # (B, C, H/2, W/2) ... H/16
            indices.append(where)
        for stage in self.decoder:
            x = stage(unpool(x, indices.pop()))  # (B, C, H/8, W/8) ... (B, C, H, W)
        return self.classifier(x)[..., :H, :W].float()  # (B, K, H, W)

    def loss(self, outputs, batch, criterion):
        """outputs: what forward returned in training. Returns (total, main): here, the same."""
        loss = criterion(outputs, batch["labels"])
        return loss, loss


def print_stages(model, size):
    """Prints output shape, parameters and multiply-adds of each stage, for one image."""
    stages = {}
    for name, child in model.named_children():
        several = isinstance(child, nn.ModuleList)
        stages |= {f"{name}.{i}": m for i, m in enumerate(child)} if several else {name: child}
    stages["total"] = model

    shapes = {}
    for name, stage in stages.items():
        stage.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: out.shape}))
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
    parser.add_argument("--variant", choices=("basic", "vgg16"), default="basic", help="network")
    options = vars(parser.parse_args())
    print_stages(size=options.pop("size"), model=SegNet(**options))


if __name__ == "__main__":
    main()
