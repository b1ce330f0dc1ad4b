"""SegNet: an encoder of convolutions and max pooling, and its mirror image as decoder.

Badrinarayanan, Kendall & Cipolla, arXiv 1511.00561. Pooling keeps, for each value, the place in the 2x2 window it came from (the "pooling
indices"); the decoder puts the values back at exactly those places, so boundaries survive four or five halvings without a learned upsampling.

    images (B, 3, H, W) -> [convolution BN ReLU, pool]* -> [unpool, convolution BN]* -> logits (B, K, H, W)
                                          |____ indices ____|

Two variants: "basic", the smaller network the paper trains (Section 3.3), and "vgg16", the full SegNet around VGG-16's 13 convolutions.
Differences from the source: images normalised by mean and standard deviation instead of local response normalisation; no pretrained weights.
"""
import argparse

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

VGG16 = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]  # channels in, then after each convolution


def conv_bn(channels_in, channels_out, kernel, bias=True, relu=True):
    """convolution => BN (=> ReLU), size kept."""
    layers = [nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=bias), nn.BatchNorm2d(channels_out)]
    return layers + [nn.ReLU(inplace=True)] if relu else layers


def unpool(x, indices):
    """(B, C, H, W) -> (B, C, 2H, 2W): each value at the place its maximum was taken from, zero elsewhere."""
    return F.max_unpool2d(x, indices, 2).to(x.dtype)  # under autocast on the CPU max_unpool2d answers in float32


class SegNet(nn.Module):
    recipe = dict(batch_size=32, lr=0.01, optimizer="Adam", optimizer_args={}, weight_decay=0.0,
                  schedule="constant", schedule_args={}, iterations=40000)
    training_only = ()
    classifiers = ("classifier.",)

    def __init__(self, num_classes=25, width=1, *, variant="basic"):
        """width: factor on every channel count but the input's and the classes'. variant: "basic" or "vgg16"."""
        super().__init__()
        wide = lambda channels: max(1, round(channels * width)) if channels > 3 else channels
        if variant == "basic":
            C = wide(64)
            encoder = [conv_bn(c, C, 7) for c in (3, C, C, C)]
            decoder = [conv_bn(C, C, 7, bias=False, relu=False) for _ in range(4)]
            self.classifier = nn.Conv2d(C, num_classes, 1)
        elif variant == "vgg16":
            stages = [[wide(c) for c in stage] for stage in VGG16]
            encoder = [sum((conv_bn(i, o, 3) for i, o in zip(s, s[1:])), []) for s in stages]
            stages[0][0] = stages[0][1]  # the mirror image ends in features, which the classifier turns into classes
            decoder = [sum((conv_bn(i, o, 3) for i, o in zip(s[::-1], s[-2::-1])), []) for s in stages[::-1]]
            self.classifier = nn.Conv2d(stages[0][0], num_classes, 3, padding=1)
        else:
            raise ValueError(f'variant "{variant}" is not one of "basic", "vgg16"')
        self.encoder = nn.ModuleList(nn.Sequential(*layers) for layers in encoder)
        self.decoder = nn.ModuleList(nn.Sequential(*layers) for layers in decoder)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images):
        H, W = images.shape[-2:]
        if self.training and (H % 32 or W % 32):
            raise ValueError(f"SegNet trains on sizes that are multiples of 32, not {H}x{W}")
        x = F.pad(images, (0, -W % 32, 0, -H % 32))  # evaluation takes any size
        indices = []
        for stage in self.encoder:
            x, places = F.max_pool2d(stage(x), 2, return_indices=True)  # (B, C, H/2, W/2) ... (B, C, H/16, W/16)
            indices.append(places)
        for stage in self.decoder:
            x = stage(unpool(x, indices.pop()))  # (B, C, H/8, W/8) ... (B, C, H, W)
        logits = self.classifier(x)  # (B, K, H, W)
        return logits if self.training else logits[..., :H, :W].float()

    def loss(self, outputs, batch, criterion):
        """outputs: what forward returned in training. Returns (total, main), which are the same: SegNet has one output."""
        loss = criterion(outputs.float(), batch["labels"])
        return loss, loss
