"""The encoder of a workdir as a file for other programs, reloaded and compared before it counts.

Command: python -m adco_jax.main --config=configs/export.py --config.pretrained=runs/r50 --config.format=torchvision
Writes: FILE and, beside it, a model card FILE.md, FILE.json (from which adco_jax.load_encoder opens FILE: network,
normalisation, view) and, with a classifier, its class names FILE.classes.json. Nothing is overwritten.
A classifier is fc; of a ViT head in timm and heads.head in torchvision.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "export"
  config.pretrained = ""  # workdir of a pre-training
  config.step = 0  # of the checkpoint; 0: the newest
  config.format = "torchvision"  # torchvision timm detectron2 npz stablehlo
  config.encoder = "query"  # query, or key: the moving average
  config.linear = ""  # a probe's .npz of the linear task: becomes fc (torchvision, timm and npz)
  config.classifier = True  # of a run that was trained on labels: becomes fc, unless `linear` does
  # .safetensors or .pth (torchvision, timm), .npz, .pkl (detectron2), .stablehlo; empty:
  # WORKDIR/export/<encoder>-<format>-<step>.<suffix>
  config.out = ""
  config.license = "not stated"  # a line for the model card
  return config
