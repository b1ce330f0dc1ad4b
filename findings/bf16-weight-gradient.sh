#!/usr/bin/env bash
# The bf16 weight gradient of a dilated convolution can depend on what the memory held before.
#
# Expected: channels last and bf16 autocast change a convolution's weight gradient by rounding only.
# NaN, seen in training with 45 and 46 channels, was expected to be an overflow with those two
# channel counts.
#
# Seen: on a CPU with AVX-512, the weight gradient of a dilated convolution is computed with memory
# that nobody has written. It is wrong for every number of input channels above 16 that is not a
# multiple of 16, in bf16, channels last, stride 1, with a 3x3 kernel and dilation 2 or 4, on maps
# of 29 to 40 pixels in width (narrower ones are right). It is NaN only where the memory happened to
# hold huge numbers. Where it held ordinary numbers, the gradient is finite and wrong, and nothing
# says so. The script fills new memory with known bytes (mallopt), so the result does not depend on
# luck; 0.01 is the error of a right gradient. Right are: 32, 48, 64, ... channels, NCHW, float32,
# float16, stride 2, 1x1, and any output channels.
#
# Versions: the same in torch 2.11.0 (oneDNN 3.10.2), 2.12.1 (3.11.2), 2.13.0 and 2.14.1 (3.12.0)
# and 2.15.0 (3.13.3), each tried on this machine; TORCH=2.14.1 runs the script with another version
# (their usual wheels bring gigabytes of CUDA). The same with ONEDNN_MAX_CPU_ISA=AVX512_CORE, which
# has no bf16 instructions; right with ONEDNN_MAX_CPU_ISA=AVX2. AMX was not tried.
#
# Why it matters: a segmentation network with a width factor has such channel counts (128 x 0.35 =
# 45) and dilated convolutions. It trains on a wrong gradient, or the loss is not finite after
# hours, and a lower learning rate does not help. Multiples of 16, NCHW or float32 do.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   torch 2.13.0+cpu Intel(R) MKL-DNN v3.12.0 AVX512
#   45 channels, dilation 2, map 32 x 32: error by what new memory holds
#      3.4e38: nan
#        48.6: 107
#        0.75: 6.1
#     48 channels and 48.6: 0.0102
#   wrong channel counts of 1 to 128: all above 16 but 32 48 64 80 96 112 128
#   wrong map widths of 20 to 40 (height 32): 29 30 31 32 33 34 35 36 37 38 39 40
#   wrong dilations of 1, 2, 4: 2 4
#   45 -> 64 channels: wrong
#   64 -> 45 channels: right
#   1x1 kernel: right
#   stride 2: right
#   one image: wrong
#   NCHW: right
#   float32: right
#   float16: right
set -euo pipefail
if ! grep -q avx512bw /proc/cpuinfo; then
    echo "This CPU has no AVX-512, so oneDNN takes another path. Nothing to show."
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==${TORCH:-2.13.0}" numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import ctypes
import sys

import torch
import torch.nn.functional as F

M_PERTURB = -6  # mallopt(3): new memory is filled with the complement of this byte
libc = ctypes.CDLL(None)
torch.set_num_threads(2)


def error(channels, dilation, height, width, *, channels_out=None, kernel=3, stride=1, batch=4,
          memory_format=torch.channels_last, dtype=torch.bfloat16, fill=0xBD):
    """Largest error of the weight gradient, relative to the gradient's mean absolute value.

    fill: new memory holds the complement of this byte; 0xBD gives 48.6 as float32. None: as it is.
    """
    generator = torch.Generator().manual_seed(0)
    channels_out = channels_out or channels
    x = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    weight = torch.randn(channels_out, channels, kernel, kernel, generator=generator).to(dtype)
    options = dict(padding=dilation * (kernel // 2), dilation=dilation, stride=stride)
    exact = weight.float().requires_grad_()
    output = F.conv2d(x.float(), exact, **options)
    gradient = torch.randn(output.shape, generator=generator).to(dtype)
    output.backward(gradient.float())

    x = x.contiguous(memory_format=memory_format)
    gradient = gradient.contiguous(memory_format=memory_format)
    weight = weight.requires_grad_()
    output = F.conv2d(x, weight, **options)
    if fill is not None:
        libc.mallopt(M_PERTURB, fill)
    output.backward(gradient)
    if fill is not None:
        libc.mallopt(M_PERTURB, 0)
    difference = (weight.grad.float() - exact.grad).abs().max()
    return (difference / exact.grad.abs().mean()).item()


def wrong(*args, **options):
    return not error(*args, **options) < 0.1  # a right gradient has 0.01 to 0.03; NaN is wrong


onednn = [line for line in torch.__config__.show().splitlines() if "MKL-DNN" in line]
print("torch", torch.__version__, onednn[0].strip(" -").split(" (")[0],
      torch.backends.cpu.get_cpu_capability())

print("45 channels, dilation 2, map 32 x 32: error by what new memory holds")
shown = {"3.4e38": 0x80, "48.6": 0xBD, "0.75": 0xC0}
for value, fill in shown.items():
    print(f"  {value:>7}: {error(45, 2, 32, 32, fill=fill):.3g}")
print(f"  48 channels and 48.6: {error(48, 2, 32, 32):.3g}")

channels = [c for c in range(1, 129) if wrong(c, 2, 32, 32)]
right = [c for c in range(17, 129) if c not in channels]
print("wrong channel counts of 1 to 128: all above 16 but", *right)
widths = [w for w in range(20, 41) if wrong(45, 2, 32, w)]
print("wrong map widths of 20 to 40 (height 32):", *widths)
dilations = [d for d in (1, 2, 4) if wrong(45, d, 32, 32)]
print("wrong dilations of 1, 2, 4:", *dilations)
cases = {
    "45 -> 64 channels": wrong(45, 2, 32, 32, channels_out=64),
    "64 -> 45 channels": wrong(64, 2, 32, 32, channels_out=45),
    "1x1 kernel": wrong(45, 2, 32, 32, kernel=1),
    "stride 2": wrong(45, 2, 64, 64, stride=2),
    "one image": wrong(45, 2, 32, 32, batch=1),
    "NCHW": wrong(45, 2, 32, 32, memory_format=torch.contiguous_format),
    "float32": wrong(45, 2, 32, 32, dtype=torch.float32),
    "float16": wrong(45, 2, 32, 32, dtype=torch.float16),
}
for case, value in cases.items():
    print(f"{case}: {'wrong' if value else 'right'}")

expected = {"45 -> 64 channels", "one image"}
same = (
    channels == [c for c in range(17, 129) if c % 16]
    and widths == list(range(29, 41))
    and dilations == [2, 4]
    and {case for case, value in cases.items() if value} == expected
)
if not same:
    sys.exit("changed: another set of convolutions has a wrong weight gradient, or none")
PYTHON
