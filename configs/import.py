"""A checkpoint of another program -> a workdir of this one: AdCo's or MoCo's .pth.tar, any file with a ResNet or a ViT in it.

Command: python -m adco_jax.main --config=configs/import.py --config.file=adco.pth.tar --workdir=runs/adco
Another pre-training config than adco_r50.py: --config=configs/import.py:moco_r50
All its keys are here; they must fit the file, and they are what the workdir goes on with.
Training in the workdir begins its own epochs: those of the file are behind it and not counted.
PyTorch (pip install torch) is needed for .pth, .pth.tar, .pt, .ckpt and .bin, not for .safetensors and .npz.
"""

import importlib


def get_config(base="adco_r50"):
  config = importlib.import_module(f"configs.{base}").get_config()
  config.task = "import"
  config.base = base  # as after the colon of --config
  config.file = ""  # .pth .pth.tar .pt .ckpt .bin .safetensors .npz
  config.prefix = ""  # which network of several in a file, such as teacher; '.': without prefix
  return config
