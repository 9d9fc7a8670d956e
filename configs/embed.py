"""Features of any set of images by the encoder of a workdir, with file names, as .npz or .parquet.

Command: python -m adco_jax.main --config=configs/embed.py --config.pretrained=runs/r50 --config.data.dir=/my/images
Writes: features float32 [N, F], names [N] and, where there are any, labels [N] with the classes' names: an array
classes in .npz, a column class in .parquet. Several labels per image are [N, classes] of 1, 0 and -1 in .npz, lists of
the classes that are there in .parquet. Where images could not be read, broken [N] is True for them; their features are those
of a gray image. None means: as in the pre-training.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import knn


def get_config():
  config = ConfigDict()
  config.task = "embed"
  config.pretrained = ""  # workdir of a pre-training
  config.step = 0  # of the checkpoint; 0: the newest
  config.encoder = "query"  # query or key
  config.out = ""  # .npz or .parquet; empty: WORKDIR/embeddings-<data>-<split>-<step>.npz

  config.data = knn.get_data()
  del config.data.test_split

  config.size = placeholder(int)  # side of the image that the encoder sees
  config.crop_fraction = placeholder(
    float
  )  # centre square that it is cut from; 0: the whole image, squeezed
  config.batch_size = 256  # images that the encoder sees at once
  config.features = ConfigDict()
  config.features.tokens = "pooled"  # of a ViT: pooled class mean class_mean class_4, see knn.py
  return config
