#!/usr/bin/env bash
# x264 with AVX-512 writes files that depend on what the memory held before, even with one thread.
#
# Expected: libx264 writes the same file for the same frames, options and number of threads; two
# runs differ only through threads.
#
# Seen: on a CPU with AVX-512, the same frames and options give another file with every content of
# new memory, one thread included, and the decoded pictures differ visibly. Without B-frames there
# are fewer variants, but more than one. The script fills new memory with known bytes (mallopt), so
# the result does not depend on luck. Macroblock tree (mbtree) is where it enters: with mbtree=0, or
# with the AVX2 code (asm=avx2), files are the same for any memory and any run. By hand: an ffmpeg of
# another build (9.0.2, from imageio-ffmpeg 0.8.1) depended on the memory in the same way.
#
# Why it matters: a rendered data set is to be the same on every run, so that figures can be
# compared and files checked by their sums. bf=0 and one thread are not enough for that; mbtree=0
# is.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   x264 core 165
#   default, one thread      6 different files of 6, up to 34 grey levels apart
#   no B-frames, one thread  2 different files of 6, up to 24 grey levels apart
#   default, four threads    6 different files of 6, up to 43 grey levels apart
#   mbtree=0, four threads   1 different files of 6, up to 0 grey levels apart
#   asm=avx2, four threads   1 different files of 6, up to 0 grey levels apart
set -euo pipefail
if ! grep -q avx512bw /proc/cpuinfo; then
    echo "This CPU has no AVX-512, so x264 takes another path. Nothing to show."
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 av==18.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import hashlib
import io
import sys

import av
import numpy as np

M_PERTURB = -6  # mallopt(3): new memory is filled with the complement of this byte
libc = ctypes.CDLL(None)
y, x = np.mgrid[:240, :320]
noise = np.random.default_rng(0).integers(0, 24, (240, 320, 3))
frames = []
for t in range(60):
    picture = np.stack([(x * 200 // 320 + t) % 256, y * 200 // 240, 0 * x + 2 * t], -1)
    picture = (picture + np.roll(noise, t, axis=1)).clip(0, 255).astype(np.uint8)
    picture[40:80, t:t + 40] = (200, 30, 30)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    frames.append(frame.to_ndarray())  # the same planes for every file


def encode(fill, options):
    """The file of these frames, while new memory holds the complement of the byte `fill`."""
    libc.mallopt(M_PERTURB, fill)
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for planes in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    libc.mallopt(M_PERTURB, 0)
    return memory.getvalue()


def decode(data):
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(decoded).astype(int)


cases = {
    "default, one thread": {"threads": "1"},
    "no B-frames, one thread": {"threads": "1", "bf": "0"},
    "default, four threads": {"threads": "4"},
    "mbtree=0, four threads": {"threads": "4", "x264-params": "mbtree=0"},
    "asm=avx2, four threads": {"threads": "4", "x264-params": "asm=avx2"},
}
print("x264 core", encode(1, {}).split(b"x264 - core ")[1].split(b" ")[0].decode())
versions = {}
for case, options in cases.items():
    files = [encode(fill, options) for fill in (0x01, 0x40, 0x55, 0x80, 0xBD, 0xFF)]
    first = decode(files[0])
    levels = max(int(np.abs(decode(data) - first).max()) for data in files)
    versions[case] = len({hashlib.sha256(data).digest() for data in files})
    print(f"{case:24} {versions[case]} different files of 6, up to {levels} grey levels apart")
unstable = [case for case, count in versions.items() if count > 1]
if unstable != list(cases)[:3]:
    sys.exit("changed: other options decide whether two files are the same")
PYTHON
