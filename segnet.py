"""SegNet: an encoder of convolutions and max pooling, and its mirror image as the decoder.

Badrinarayanan, Kendall & Cipolla, arXiv 1511.00561. Max pooling remembers which pixel of its 2x2
window each maximum came from (the "pooling indices"), and the decoder puts values back at exactly
those pixels. So boundaries survive four or five halvings without any learned upsampling.

    images -> [conv BN ReLU, pool] x 4 -> [unpool, conv BN] x 4 -> 1x1 conv -> logits
    (B, 3, H, W)               └──────── indices ────────┘                  (B, K, H, W)

"The source" is that article; "the paper" is the one rebuilt here (Borrego Carazo, 2018).
variant "basic" is SegNet-Basic, which the paper trains (Section 3.3): 7x7 convolutions. "vgg16" is
the full SegNet: VGG-16's 13 convolutions and their mirror image, 3x3, ReLU in both halves.
Differs from the source: images are normalised by mean and standard deviation, not by local response
normalisation, and nothing is pretrained. The code of the paper's authors also differs: its decoder
ignores the indices and learns its upsampling, a 2x2 transposed convolution.
"""
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

VGG16 = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512),
         (512, 512, 512, 512)]  # a stage each: channels in, then after each convolution


def conv_bn(channels, kernel, bias=True, relu=True):
    """(convolution => BN => ReLU) from each count in `channels` to the next; the size is kept."""
    layers = []
    for c_in, c_out in zip(channels, channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias),
                   nn.BatchNorm2d(c_out), nn.ReLU(inplace=True) if relu else nn.Identity()]
    return nn.Sequential(*layers)


def unpool(x, indices):
    """Undoes a 2x2 pooling, (B, C, H, W) -> (B, C, 2H, 2W): each value returns to its maximum's
    pixel, the others become zero. indices: (B, C, H, W) int64, of max_pool2d."""
    with torch.autocast("cpu", enabled=False):  # or CPU autocast returns float32
        return F.max_unpool2d(x, indices, 2)


class SegNet(nn.Module):
    """(B, 3, H, W) normalised images -> (B, K, H, W) float32 logits, in training and evaluation.
    width: factor on every channel count but the image's and the classes'; 2 doubles the filters."""
    recipe = dict(batch_size=32, lr=0.01, optimizer="Adam", schedule="constant", iterations=40000)

    def __init__(self, num_classes=25, width=1, *, variant="basic"):
        super().__init__()
        stages = [[c if c == 3 else max(1, round(c * width)) for c in stage] for stage in VGG16]
        C = stages[0][-1]
        if variant == "basic":
            encoder = [conv_bn((c, C), 7) for c in (3, C, C, C)]
            decoder = [conv_bn((C, C), 7, bias=False, relu=False) for _ in range(4)]
        else:
            encoder = [conv_bn(stage, 3) for stage in stages]
            stages[0] = stages[0][1:]  # the mirror image of the first convolution is the classifier
            decoder = [conv_bn(stage[::-1], 3) for stage in stages[::-1]]
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        kernel = {"basic": 1, "vgg16": 3}[variant]
        self.classifier = nn.Conv2d(C, num_classes, kernel, padding=kernel // 2)
        self.heads = [(self.classifier, None)]  # None: no coarser classes; see Criterion.prior
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)  # He et al., arXiv 1502.01852
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images):
        H, W = images.shape[-2:]
        x = F.pad(images, (0, -W % 32, 0, -H % 32))  # any size, made a multiple of 32
        all_indices = []
        for stage in self.encoder:
            x, indices = self.pool(stage(x))    # (B, C, H/2, W/2) ... (B, C, H/16, W/16)
            all_indices.append(indices)
        for stage in self.decoder:
            x = stage(unpool(x, all_indices.pop()))    # (B, C, H/8, W/8) ... (B, C, H, W)
        return self.classifier(x)[..., :H, :W].float()

    def loss(self, outputs, batch, criterion):
        """Returns (total, main): the loss to minimise and the one to show; here, the same."""
        loss = criterion(outputs, batch["labels"])
        return loss, loss


def print_stages(model, size):
    """Prints each stage as it is computed: output, parameters, multiply-adds (MAC) of one image."""
    counts = []

    def show(name, stage, output):
        total = counter.get_total_flops() // 2              # a multiply-add is two FLOPs
        counts.append(total if stage is model else total - sum(counts))
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])
        parameters = sum(p.numel() for p in stage.parameters())
        print(f"{name or 'in all':11}{shape!s:>16}{parameters:>11,} weights{counts[-1]:>15,} MAC")

    for name, stage in model.named_modules():
        if name in ("", "pool", "classifier") or name.count(".") == 1:
            stage.register_forward_hook(lambda stage, _, out, name=name: show(name, stage, out))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size))


if __name__ == "__main__":
    print_stages(SegNet(), 320)
