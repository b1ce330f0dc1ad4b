#!/usr/bin/env bash
# A clip cut without encoding states 65 frames and has 32; decord returns 65, repeating the last
# one.
#
# Expected: frame counts in the file are too high after such a cut, which readers notice; decord
# reads the same frames as PyAV.
#
# Seen: the cut begins at the key frame before it, and an edit list hides the frames up to the cut.
# PyAV and OpenCV state 65 frames and give 32. decord gives 65: the 32 frames and then copies of the
# last one, with one line of warning from its C++ code.
#
# Why it matters: labels belong to frames by number. With decord a clip looks complete, and half of
# its "frames" show something else than their label. Count what was decoded, and compare with the
# number of labels.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   PyAV    states 65 frames, gives 32: frames 33 to 64 of the whole clip, 32 different ones
#   OpenCV  states 65 frames, gives 32: frames 33 to 64 of the whole clip, 32 different ones
#   decord  states 65 frames, gives 65: frames 33 to 64 of the whole clip, 32 different ones
#   decord's last frame occurs 34 times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 av==18.1.0 \
    decord==0.6.0 opencv-python-headless==5.0.0.93 imageio-ffmpeg==0.8.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import subprocess
import sys

import av
import cv2
import decord
import imageio_ffmpeg
import numpy as np

with av.open("whole.mp4", "w") as container:
    stream = container.add_stream("libx264", rate=30, options={"threads": "1"})
    stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
    for t in range(100):
        picture = np.full((240, 320, 3), 40, np.uint8)
        picture[60:180, 2 * t:2 * t + 60] = 200  # a bar that moves two pixels a frame
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())

# One second from 1.1 s on, without encoding again: the usual way to cut a clip.
ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
subprocess.run([ffmpeg, "-v", "error", "-ss", "1.1", "-i", "whole.mp4", "-t", "1", "-c", "copy",
                "cut.mp4"], check=True)


def position(picture):
    """The number of the whole clip's frame that this picture shows."""
    bright = np.flatnonzero(picture[120].mean(-1) > 120)
    return int(round(bright[0] / 2))


with av.open("cut.mp4") as container:
    stated = container.streams.video[0].frames
    by_pyav = [position(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
capture = cv2.VideoCapture("cut.mp4")
stated_opencv = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
by_opencv = []
while True:
    found, picture = capture.read()
    if not found:
        break
    by_opencv.append(position(picture))
reader = decord.VideoReader("cut.mp4", num_threads=1)
by_decord = [position(reader[i].asnumpy()) for i in range(len(reader))]

for name, count, numbers in (("PyAV", stated, by_pyav), ("OpenCV", stated_opencv, by_opencv),
                             ("decord", len(reader), by_decord)):
    print(f"{name:7} states {count} frames, gives {len(numbers)}: frames {numbers[0]} to"
          f" {numbers[-1]} of the whole clip, {len(set(numbers))} different ones")
repeated = by_decord.count(by_decord[-1])
print(f"decord's last frame occurs {repeated} times")
same = (stated == stated_opencv == len(reader) == len(by_decord) == 65
        and len(by_pyav) == len(by_opencv) == 32 and repeated > 30
        and by_pyav == by_opencv == by_decord[:32])
if not same:
    sys.exit("changed: other numbers of frames")
PYTHON
