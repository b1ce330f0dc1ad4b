#!/usr/bin/env bash
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
"$folder/venv/bin/python" -W ignore "$folder/time.py" 3 60
