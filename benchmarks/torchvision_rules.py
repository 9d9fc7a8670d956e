"""What torchvision's transforms do to Pillow images, written out with Pillow and Python's random numbers.

The measure that benchmarks/input and benchmarks/augmentation hold ours against; torchvision itself is not needed.
"""

import random

import numpy as np
from PIL import Image

RATIO = (3 / 4, 4 / 3)


def crop_size(width, height, low, high=1.0):
  """RandomResizedCrop.get_params: (width, height) of the box."""
  for _ in range(10):
    area = width * height * random.uniform(low, high)
    aspect = np.exp(random.uniform(*np.log(RATIO)))
    w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    if 0 < w <= width and 0 < h <= height:
      return w, h
  return min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))


def turn_hue(image, turn):
  """adjust_hue: HSV in whole levels, the hue wrapping round."""
  h, s, v = image.convert("HSV").split()
  h = np.asarray(h) + np.uint8(round(turn * 255) % 256)
  return Image.merge("HSV", (Image.fromarray(h), s, v)).convert("RGB")
