"""From an image file to a model's input with Pillow. Prints one line of JSON: the median CPU time."""

import io
import json
import statistics
import sys
import time

import numpy
from PIL import Image


def tensor(data, width, height):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = numpy.asarray(image, dtype=numpy.float32) / 255.0
    pixels = (pixels - 0.5) / 0.25
    return numpy.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def main(path, width, height, times):
    with open(path, "rb") as file:
        data = file.read()
    tensor(data, width, height)
    taken = []
    for _ in range(times):
        start = time.process_time()
        tensor(data, width, height)
        taken.append(time.process_time() - start)
    print(json.dumps({"ms": statistics.median(taken) * 1000.0}))


main(sys.argv[1], *map(int, sys.argv[2:5]))
