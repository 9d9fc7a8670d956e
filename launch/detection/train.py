"""Trains and tests a detector from exported weights; for an environment with detectron2, which adco_jax does not need.

Command: python launch/detection/train.py --config-file launch/detection/voc.yaml --num-gpus 8 MODEL.WEIGHTS r50.pkl
Everything else: docs/detection.md, and detectron2's own documentation.
"""

import pathlib

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5HeadWithNorm(Res5ROIHeads):
  """detectron2's res5 head with a norm of its own behind res5, not in the weights: it starts as it is made."""

  @classmethod
  def from_config(cls, cfg, input_shape):
    """What the head is made of."""
    parts = super().from_config(cfg, input_shape)
    channels = parts["res5"][-1].out_channels
    parts["res5"].add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
    return parts


class Trainer(DefaultTrainer):
  """detectron2's, which wants to be told how a data set is scored."""

  @classmethod
  def build_evaluator(cls, cfg, dataset_name):
    """By the data set's own rules."""
    if dataset_name.startswith("voc"):
      return PascalVOCDetectionEvaluator(dataset_name)
    return COCOEvaluator(dataset_name, output_dir=str(pathlib.Path(cfg.OUTPUT_DIR, "inference")))


def read_config(file: str, options: list[str]) -> CfgNode:
  """The config in a file, with options such as MODEL.WEIGHTS r50.pkl in the place of its own."""
  cfg = get_cfg()
  cfg.merge_from_file(file)
  cfg.merge_from_list(options)
  return cfg


def main(args):
  """One process of the training, or of a test alone (--eval-only)."""
  cfg = read_config(args.config_file, args.opts)
  if not cfg.MODEL.WEIGHTS:
    raise SystemExit("error: MODEL.WEIGHTS is empty; name an export, or a trained detector to test")
  cfg.freeze()
  default_setup(cfg, args)
  if args.eval_only:
    model = Trainer.build_model(cfg)
    loader = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    loader.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return Trainer.test(cfg, model)
  trainer = Trainer(cfg)
  trainer.resume_or_load(args.resume)
  return trainer.train()


if __name__ == "__main__":
  args = default_argument_parser().parse_args()
  launch(
    main,
    args.num_gpus,
    num_machines=args.num_machines,
    machine_rank=args.machine_rank,
    dist_url=args.dist_url,
    args=(args,),
  )
