"""Features of any set of images by the encoder of a workdir, with file names, as .npz or .parquet.

Command: python -m adco_jax.main --config=configs/embed.py --config.pretrained=runs/r50 --config.data.dir=/my/images
Writes: features float32 [N, F], names [N] and, where there are any, labels [N].
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "embed"
  config.pretrained = ""  # workdir of a pre-training
  config.player = "query"  # query or key
  config.out = ""  # .npz or .parquet; empty: WORKDIR/embeddings-<split>-<step>.npz

  config.data = ConfigDict()  # an empty value means: as in the pre-training
  config.data.source = ""
  config.data.dir = ""
  config.data.split = ""
  config.data.loader = ""

  config.size = 0  # side of the image that the encoder sees
  config.crop_fraction = 0.0  # centre square that it is cut from
  config.batch_size = 256
  return config
