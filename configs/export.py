"""The encoder of a workdir as a file for other programs, reloaded and compared before it counts.

Command: python -m adco_jax.main --config=configs/export.py --config.pretrained=runs/r50 --config.format=torchvision
Writes: the file and, beside it, a model card (.md). Nothing is overwritten.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "export"
  config.pretrained = ""  # workdir of a pre-training
  config.step = 0  # of the checkpoint; 0: the newest
  config.format = "torchvision"  # torchvision timm detectron2 npz stablehlo
  config.encoder = "query"  # query, or key: the moving average
  config.linear = ""  # a probe's .npz of the linear task: becomes fc (torchvision and npz)
  config.classifier = True  # of a run that was trained on labels: becomes fc, unless `linear` does
  config.out = ""  # .safetensors or .pth; empty: WORKDIR/export/<player>-<format>-<step>.<suffix>
  config.license = "not stated"  # a line for the model card
  return config
