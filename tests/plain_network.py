"""The encoder of models/ once more, of plain operations alone, so that autodiff writes every gradient.

Convolutions are XLA's, BatchNorm is its definition over groups of consecutive images, pooling is Flax's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from adco_jax.models.norm import BN_EPSILON
from adco_jax.models.resnet import ARCHITECTURES


def embed(params, images, arch, group_size, dtype):
  """Raw embeddings [B, D] of the network with the ImageNet stem, batch statistics, computed in `dtype`."""
  return _project(params["head"], _features(params["backbone"], images, arch, group_size, dtype))


def _features(params, images, arch, group_size, dtype):
  kind, stages = ARCHITECTURES[arch]
  convs = 2 if kind == "basic" else 3
  norm = lambda x, p: _batch_norm(x, p, group_size)
  x = _conv(images.astype(dtype), params["conv1"], 2)
  x = nn.max_pool(nn.relu(norm(x, params["bn1"])), (3, 3), (2, 2), ((1, 1), (1, 1)))
  for stage, blocks in enumerate(stages):
    for i in range(blocks):
      block = params[f"layer{stage + 1}_{i}"]
      stride = 2 if stage and not i else 1
      y = x
      for c in range(1, convs + 1):
        strided = stride if c == convs - 1 or kind == "basic" and c == 1 else 1
        y = norm(_conv(y, block[f"conv{c}"], strided), block[f"bn{c}"])
        y = nn.relu(y) if c < convs else y
      if "downsample_conv" in block:
        x = norm(_conv(x, block["downsample_conv"], stride), block["downsample_bn"])
      x = nn.relu(y + x)
  return x.astype(jnp.promote_types(dtype, jnp.float32)).mean((1, 2))


def _project(params, features):
  hidden = nn.relu(features @ params["fc0"]["kernel"] + params["fc0"]["bias"][None])
  return hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]


def _conv(x, params, stride):
  kernel = params["kernel"].astype(x.dtype)
  pad = (len(kernel) // 2,) * 2
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _batch_norm(x, params, group_size):
  channels = x.shape[-1]
  wide = x.reshape(-1, group_size, *x.shape[1:]).astype(params["scale"].dtype)
  mean = wide.mean((1, 2, 3), keepdims=True)
  var = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
  scale, bias = (params[n].reshape(1, 1, 1, 1, channels) for n in ("scale", "bias"))
  y = (wide - mean) / jnp.sqrt(var + BN_EPSILON) * scale + bias
  return y.reshape(x.shape).astype(x.dtype)
