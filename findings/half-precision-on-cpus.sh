#!/usr/bin/env bash
# Half precision on a CPU without the instructions for it is many times slower than float32.
#
# Expected: where the instructions are missing, a training step under autocast takes 3 to 5 times as
# long as in float32, in bf16 as in fp16, since numbers are converted.
#
# Seen: fp16 takes about ten times as long on a CPU with AVX-512 and bf16 instructions, where bf16
# takes half of float32's time. With AVX2 only, both take five to eight times as long for this small
# network (one thread), and bf16 nine times for one like SegNet-Basic (two threads). That CPU is
# emulated: ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 keep PyTorch and oneDNN from newer
# instructions.
#
# Why it matters: "use autocast, it is faster" is advice for GPUs. On a laptop, half precision turns
# minutes into an hour.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   This CPU, with bf16 instructions and without those for fp16:
#     float32      27.1 CPU ms a training step,   1.0 times float32
#     bfloat16     13.9 CPU ms a training step,   0.5 times float32
#     float16     263.1 CPU ms a training step,   9.7 times float32
#   A CPU with AVX2 only, emulated by limiting PyTorch and oneDNN to AVX2:
#     float32      33.9 CPU ms a training step,   1.0 times float32
#     bfloat16    251.0 CPU ms a training step,   7.4 times float32
#     float16     256.6 CPU ms a training step,   7.6 times float32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/time.py" <<'PYTHON'
import sys
import time

import torch
from torch import nn

torch.set_num_threads(1)  # and CPU time, so that other programs do not disturb the figures
torch.manual_seed(0)
layers = []
for channels in (3, 32, 32):
    layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
images = torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last)


def step(dtype):
    enabled = dtype != torch.float32
    with torch.autocast("cpu", dtype if enabled else torch.bfloat16, enabled=enabled):
        output = network(images)
    output.float().square().mean().backward()


times = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    step(dtype)
    trials = []
    for _ in range(3):
        start = time.process_time()
        step(dtype)
        trials.append(time.process_time() - start)
    times[dtype] = min(trials)
    print(f"  {str(dtype)[6:]:9} {1000 * times[dtype]:7.1f} CPU ms a training step,"
          f" {times[dtype] / times[torch.float32]:5.1f} times float32", flush=True)
bf16 = times[torch.bfloat16] / times[torch.float32]
fp16 = times[torch.float16] / times[torch.float32]
low, high = float(sys.argv[1]), float(sys.argv[2])
if not low < bf16 < high or fp16 < 4:
    sys.exit("changed: bf16 or fp16 takes another multiple of float32's time")
PYTHON
if grep -q avx512_bf16 /proc/cpuinfo && ! grep -q avx512_fp16 /proc/cpuinfo; then
    echo "This CPU, with bf16 instructions and without those for fp16:"
    "$folder/venv/bin/python" -W ignore "$folder/time.py" 0 1.2
else
    echo "This CPU does not have AVX512-BF16 without AVX512-FP16: left out."
fi
echo "A CPU with AVX2 only, emulated by limiting PyTorch and oneDNN to AVX2:"
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
"$folder/venv/bin/python" -W ignore "$folder/time.py" 5 60
