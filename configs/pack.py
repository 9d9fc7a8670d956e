"""Any source of images -> tar shards for fast reading, with an index beside each and a manifest of hashes.

Command: python -m adco_jax.main --config=configs/pack.py --config.data.dir=/datasets/imagenet --config.out=/fast/imagenet400
Then: --config.data.source=packed --config.data.dir=/fast/imagenet400 in any other command.
Interrupted, the same command goes on; on a finished packing it checks every hash.
Why 400: two views of a packed image take two thirds of the processor time that those of an original take (docs/data.md);
crops of a fifth of the area are then 180 pixels wide. Smaller sides are faster and coarser.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "pack"
  config.out = ""  # folder for <split>/00000.tar, 00000.npz, ..., manifest.json
  config.short_side = 400  # larger images are made smaller until their short side is this; 0: never
  config.format = "jpeg"  # jpeg, or png: lossless, for small pictures
  config.quality = 90  # of jpeg; an original that is smaller than the new file is kept as it is
  config.shard_images = 4096  # in each .tar
  config.threads = 0  # 0: one per core

  config.data = ConfigDict()
  config.data.source = (
    "folder"  # folder webdataset tfrecord tfds npz digits cifar10_binary csv list
  )
  config.data.dir = ""  # the folder (tfds: its data_dir), or the .npz file
  config.data.name = ""  # of a TFDS set: NAME, NAME/CONFIG or NAME:VERSION
  config.data.split = "train"  # packed first
  config.data.test_split = "val"  # packed too where the source has it; empty: not
  config.data.subset = ""  # text file with the name of an image per line: of `split` these alone
  config.data.num_classes = 0  # 0: as found in the data
  config.data.image_key = (
    ""  # feature of TFRecord examples that holds the image; empty: usual names
  )
  config.data.label_key = ""  # ... its label
  config.data.labels = True  # False: leave them out
  config.data.max_bad_fraction = 0.01  # broken images are left out and named in the manifest
  config.data.max_megapixels = 64.0  # an image whose header states more counts as broken
  return config
