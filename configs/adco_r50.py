"""AdCo, ResNet-50, ImageNet-1k, 200 epochs, asymmetric: the authors' `--sym=0 --cluster=65536`.

Paper: arXiv 2011.08435; every value below is the authors' default, with their flag in brackets.
Command: python -m adco_jax.main --config=configs/adco_r50.py --workdir=runs/r50 --config.data.dir=/datasets/imagenet
Hardware: the authors used 8 V100, 2.26 GPU-hours per epoch; this implementation: not yet measured.
Expected: 68.6 linear top-1 (authors' README); this implementation: not yet measured.

This file is the complete list of pre-training keys; the other pre-training configs are changes of it.
A tuple of views.crops is (side in pixels, smallest and largest share of the image's area).
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.task = "pretrain"  # inspect_data, with the same keys: looks at the data, trains nothing
  config.seed = 0  # 0..2^32-1; everything random is a function of (seed, stream, step) [--seed]
  config.epochs = 200  # passes over the images; init_epochs are among them, a filling in K/B steps is not [--epochs]
  config.stop_at_step = 0  # leave after this many steps (0: at the end); the schedules do not move
  config.max_bad_steps = 10  # so many in a row whose loss or gradients are not finite end the run
  config.watchdog_minutes = 60.0  # without a finished step the process ends with 43; 0: never
  config.deterministic = False  # GPU: the same bits in every run, slower; CPU and TPU always are
  config.compute_dtype = "auto"  # of the encoders: float32, bfloat16; auto: bfloat16 off the CPU
  config.compile_cache = (
    True  # programs are kept in ~/.cache/adco_jax, or JAX_COMPILATION_CACHE_DIR
  )
  config.accumulate = (
    1  # parts of the batch that are computed in turn; the gradient is the whole batch's
  )
  config.init_from = ""  # workdir whose newest encoders start this run, or an exported file
  # Whether the other run's objective (bank, classifier) starts it too: auto (where it fits), new (no), kept (or it is refused)
  config.init_head = "auto"
  config.labels_per_class = (
    0  # supervised: images of every class that it trains on, drawn by seed; 0: all
  )
  config.label_share = 1.0  # ... or so large a share of every class
  # Supervised: share of every class that it never trains on, to score its classifier (eval.every_epochs)
  config.hold_out = 0.0

  config.model = ConfigDict()
  # resnet8 resnet10 resnet18 resnet34 resnet50 resnet101 [--arch], vit_tiny vit_small vit_base vit_large
  config.model.arch = "resnet50"
  config.model.width = 1.0  # multiplies every channel count
  config.model.stem = "imagenet"  # imagenet: 7x7 stride 2 and max-pool; small: 3x3 stride 1
  config.model.dim = 128  # D, components of an embedding [--moco_dim]
  config.model.head = ConfigDict()  # the projection: linear layers with ReLU between them
  config.model.head.layers = 2  # of them
  config.model.head.width = 0  # of the hidden ones; 0: as wide as the features
  config.model.head.norm = (
    "none"  # BatchNorm behind: none hidden all all_plain (last one without scale and bias)
  )

  config.model.vit = ConfigDict()  # of a ViT alone
  config.model.vit.patch = 16  # side of a patch in pixels
  config.model.vit.grid = (
    0  # patches along a side for which positions are; 0: those of the first views
  )
  config.model.vit.pool = "token"  # features: the class token's, or the mean of the patches'
  config.model.vit.positions = "learned"  # learned, or sincos: fixed ones of MoCo v3
  config.model.vit.registers = (
    0  # further tokens; with some the class token has no position (DINOv2)
  )
  config.model.vit.layer_scale = 0.0  # where the scale of each branch starts; 0: none
  config.model.vit.drop_path = (
    0.0  # chance that an image's branch is left out, linear to this at the last block
  )
  config.model.vit.depth = 0  # blocks; 0: as named
  config.model.vit.heads = 0  # of attention; 0: as named (MoCo v3's vit_small: 12)
  config.model.vit.start = "timm"  # of the weights: timm (normal), or mocov3 (Xavier)
  config.model.vit.attention = "xla"  # xla, or cudnn on a GPU
  config.model.vit.remat = (
    False  # True: blocks are computed again for the gradient, for less memory
  )

  config.views = ConfigDict()
  config.views.mode = (
    "single"  # single symmetric multicrop symmetric_multicrop [--sym --multi_crop]; one: no pairs
  )
  config.views.reduction = (
    "directions"  # directions (mean over both, sum over crops: the authors) sum mean: of all pairs
  )
  # One row per view: side in pixels, smallest and largest share of the image's area.
  config.views.crops = ((224, 0.2, 1.0), (224, 0.2, 1.0))
  config.views.ratio = (3 / 4, 4 / 3)  # width over height of a crop, before it is resized
  config.views.pad = 0  # black pixels around an image; crops are shares of the whole

  config.bn = ConfigDict()
  # Images that share batch statistics; the authors' batch per GPU. 0: all of the batch, over all devices.
  config.bn.group_size = 32
  config.bn.frozen = (
    False  # True: running statistics stand still and normalise in training too (fine-tuning)
  )
  # Slots inside which keys are shuffled; 0: the global batch, which gives several processes more to read.
  config.bn.shuffle_block = 0
  config.bn.running_from = "mean"  # running statistics: mean over groups, or first (the authors')

  # adco moco mochi simclr byol swav mocov3 caco, the controls still random query_softmax, supervised (docs/methods.md);
  # package.module:Class: one of your own
  config.objective = "adco"

  # The settings of adco; another objective has its own (--config.objective=NAME), those of both keep these values.
  config.method = ConfigDict()
  config.method.temperature = 0.12  # of the encoder's loss [--moco_t]
  config.method.in_batch = (
    True  # all keys of the batch are further negatives (authors' code); False: paper
  )
  config.method.bank = ConfigDict()
  config.method.bank.size = 65536  # K rows [--cluster]
  config.method.bank.temperature = 0.02  # of the bank's loss [--mem_t]
  config.method.bank.learning_rate = 3.0  # constant [--memory_lr]
  config.method.bank.weight_decay = 1e-4  # [--mem_wd]
  config.method.bank.momentum = 0.9  # [--momentum]
  config.method.bank.init = (
    "trained"  # trained: K/B steps against a queue; keys: passive fill; random [--ad_init]
  )
  config.method.bank.init_views = (
    "training"  # authors: all views encoded, multi-crop's key the last crop
  )
  # n: in the run's first n epochs the bank is a queue (MoCo's); 0: filled once in K/B steps before them, as the authors'
  config.method.bank.init_epochs = 0.0
  config.method.bank.order = (
    "simultaneous"  # simultaneous (authors' code) or alternating (the paper's text)
  )

  config.ema = ConfigDict()
  config.ema.decay = 0.999  # of the key encoder's parameters [--moco_m]
  config.ema.schedule = "constant"  # constant, or cosine: from decay to 1

  config.optim = ConfigDict()
  config.optim.name = "sgd"  # sgd (as torch computes it), lars or adamw
  config.optim.learning_rate = 0.03  # at batch_size, unless scale_from_batch is set [--lr]
  config.optim.scale_from_batch = (
    0  # n: the rate in use is learning_rate * batch_size / n; 0: as given
  )
  config.optim.lr_final = 0.0006  # where the cosine ends, scaled alike [--lr_final]
  config.optim.schedule = (
    "cosine_epoch"  # cosine_epoch (authors) cosine_step steps constant [--cos]
  )
  config.optim.step_epochs = (120, 160)  # `steps`: the rate falls to a tenth at each [--schedule]
  config.optim.warmup_epochs = 0.0  # linear, from one step's share of the rate
  config.optim.shard = False  # True: encoders, momenta and averages lie split over the devices, each gathered once in a step
  config.optim.momentum = 0.9  # [--momentum]
  config.optim.weight_decay = 1e-4  # on all parameters, as the authors [--weight_decay]
  # Where its cosine ends, per step; -1: it stays as it is
  config.optim.weight_decay_final = -1.0
  # vectors: none on biases, norms and a ViT's class token, registers and positions, which lars does not adapt then
  config.optim.no_decay = ""
  config.optim.clip_norm = (
    0.0  # largest length of the gradient of all that descends; longer ones are shortened; 0: none
  )
  config.optim.freeze = ""  # patch_embed: that part of a ViT keeps its first values (MoCo v3)
  config.optim.head_rate = (
    1.0  # times the rate: that of the objective's parameters (classifier, predictor, prototypes)
  )
  config.optim.layer_decay = 1.0  # times the rate per layer (stage of a ResNet, block of a ViT) deeper below the head; stem or patches are deepest
  config.optim.beta2 = 0.999  # of adamw, whose beta1 is the momentum
  config.optim.trust = 0.001  # of lars: the length of a step over the length of its array

  config.data = ConfigDict()
  config.data.source = (
    "folder"  # folder packed webdataset tfrecord tfds npz digits cifar10_binary csv list voc
  )
  config.data.dir = ""  # the folder (tfds: its data_dir), or the .npz file [--data]
  config.data.name = ""  # of a TFDS set: NAME, NAME/CONFIG or NAME:VERSION
  config.data.image_key = (
    ""  # feature of TFRecord examples that holds the image, column of a CSV; empty: usual names
  )
  config.data.label_key = ""  # ... its label
  config.data.labels = True  # False: forget them (folders are then no classes), no probes
  config.data.split = "train"  # DIR/<split>/ where it exists, else DIR; npz: <split>_images
  config.data.test_split = "val"  # what knn and linear score
  config.data.subset = ""  # text file with the name of an image per line: of `split` these alone
  config.data.num_examples = 1281167  # for plans without data; a run counts its images and says so
  config.data.num_classes = 0  # 0: as found in the data
  config.data.batch_size = 256  # over all devices [--batch_size]
  config.data.loader = (
    "auto"  # pipeline (tf.data), resident (on the device); auto: resident if it fits
  )
  config.data.resident_share = 0.25  # of a device's memory that auto may fill with images
  config.data.cut = "fast"  # resizing of the pipeline's views: fast (large JPEGs decoded smaller), or pillow (to the bit, slower)
  config.data.resident_size = (
    0  # side to which resident images are cut, those of arrays too; 0: all are equal
  )
  config.data.threads = 0  # of tf.data; 0: one per core
  config.data.max_bad_fraction = 0.01  # share of images that may be broken; others take their slots
  config.data.max_megapixels = 64.0  # an image whose header states more counts as broken
  config.data.inspect_images = 20000  # that the task inspect_data looks at; 0: all
  config.data.mean = (0.485, 0.456, 0.406)  # of the normalisation, on the scale 0..1
  config.data.std = (0.229, 0.224, 0.225)  # ... likewise

  config.augment = ConfigDict()
  config.augment.policy = (
    "moco_v2"  # moco_v2 moco_v1 simclr byol swav cifar cifar_byol digits flip rand none
  )
  config.augment.blur_kernel = ""  # pillow, torchvision; empty: as the policy's authors

  config.save = ConfigDict()
  config.save.every_steps = 5000  # between checkpoints
  config.save.every_minutes = (
    20.0  # ... or so long, whichever comes first; looked at when a line is logged
  )
  config.save.keep = 2  # newest checkpoints that stay
  config.save.keep_every_epochs = 0  # one of every n epochs stays as well, to be scored; 0: none
  config.save.max_failures = 3  # so many failed saves end the run

  config.log = ConfigDict()
  config.log.every_steps = 50  # a line on the console and in metrics.jsonl

  config.eval = ConfigDict()
  config.eval.every_epochs = 10  # online kNN and linear probe; 0: never
  config.eval.hold_out = 0.1  # share of the train images that is scored, the rest is searched
  config.eval.max_images = 60000  # of train that take part
  config.eval.size = 224  # side of the image that the frozen encoder sees
  config.eval.crop_fraction = 0.875  # centre square that it is cut from (224 of 256)
  config.eval.batch_size = 256  # images that the frozen encoder sees at once
  config.eval.knn_k = 20  # neighbours that vote
  config.eval.knn_temperature = 0.07  # of their weights
  return config
