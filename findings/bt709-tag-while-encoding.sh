#!/usr/bin/env bash
# A video that PyAV writes with a BT.709 tag is converted with BT.601, and its colours are wrong
# everywhere.
#
# Expected: PyAV honours the tag when it reads; OpenCV ignores it and always converts with BT.601.
#
# Seen: PyAV, OpenCV and decord all honour the tag, and agree to the bit on untagged video too
# (BT.601). So they all show a mistake of writing: with colorspace set on the stream, PyAV writes
# the tag but converts RGB frames as before. A skin-like red comes back 15 levels off.
# frame.reformat(format="yuv420p", dst_colorspace="ITU709") before encoding converts as the tag
# says.
#
# Why it matters: rendered training video with "proper" tags has other colours than the pictures it
# was made of, and than test photographs; without tags it is right.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   written: [200, 30, 30]
#   untagged             tag 2: PyAV [199, 28, 29], OpenCV [199, 28, 29], decord [199, 28, 29]
#   tagged               tag 1: PyAV [214, 45, 27], OpenCV [214, 45, 27], decord [214, 45, 27]
#   tagged and converted tag 1: PyAV [200, 29, 30], OpenCV [200, 29, 30], decord [200, 29, 30]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 av==18.1.0 \
    opencv-python-headless==5.0.0.93 decord==0.6.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import av
import cv2
import decord
import numpy as np

COLOUR = (200, 30, 30)
picture = np.full((240, 320, 3), COLOUR, np.uint8)
BT709 = 1  # the value of colorspace, color_primaries and color_trc in H.264


def write(name, tag_stream, tag_frames):
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        if tag_stream:
            stream.codec_context.colorspace = BT709
            stream.codec_context.color_primaries = BT709
            stream.codec_context.color_trc = BT709
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if tag_frames:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read(name):
    with av.open(name) as container:
        frame = next(container.decode(video=0))
        colours = {"PyAV": frame.to_ndarray(format="rgb24")[120, 160]}
        tag = frame.colorspace
    found, pixels = cv2.VideoCapture(name).read()
    colours["OpenCV"] = pixels[120, 160, ::-1]
    colours["decord"] = decord.VideoReader(name)[0].asnumpy()[120, 160]
    return tag, {decoder: colour.tolist() for decoder, colour in colours.items()}


print("written:", list(COLOUR))
errors = {}
for name, tag_stream, tag_frames in (("untagged", False, False), ("tagged", True, False),
                                     ("tagged and converted", True, True)):
    write(name + ".mp4", tag_stream, tag_frames)
    tag, colours = read(name + ".mp4")
    errors[name] = {decoder: int(np.abs(np.subtract(colour, COLOUR)).max())
                    for decoder, colour in colours.items()}
    print(f"{name:20} tag {tag}:", ", ".join(f"{d} {c}" for d, c in colours.items()))
if any(max(errors[name].values()) > 4 for name in ("untagged", "tagged and converted")):
    sys.exit("changed: other colours where both agree")
if any(error < 10 for error in errors["tagged"].values()):
    sys.exit("changed: a decoder ignores the tag, or the encoder converts with it")
PYTHON
