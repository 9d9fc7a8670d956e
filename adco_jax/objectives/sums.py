"""Sums of exponentials over a bank, whose gradients were made in the same pass.

Flow: infonce's losses add up over the rows and let these functions stand for the sums, once for each side.
Shapes: Q query views, B global batch, b this device's part of it, D components, k this device's bank rows.
Holds: the backward pass looks at no cosine again; each function gives a gradient to its first argument alone.
Not here: what is summed (infonce).
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def query_sums(queries_QxbxD: jax.Array, sums_Qxb: jax.Array, slope_QxbxD: jax.Array) -> jax.Array:
  """The sums over the bank for this device's queries, with their gradient: `slope`, summed with them.

  Both are reduce-scattered to the queries' owner together, so that the backward pass sends nothing.
  """
  del queries_QxbxD, slope_QxbxD
  return sums_Qxb


query_sums.defvjp(
  lambda queries, sums, slope: (sums, slope),
  lambda slope, gradient_Qxb: (gradient_Qxb[..., None] * slope, None, None),
)


@jax.custom_vjp
def bank_sums(
  bank_kxD: jax.Array, sums_QxB: jax.Array, terms_kxQxB: jax.Array, slope_QxBxD: jax.Array
) -> jax.Array:
  """The sums over this device's rows, with their gradient: the terms times queries over temperature."""
  del bank_kxD, terms_kxQxB, slope_QxBxD
  return sums_QxB


def _bank_sums_backward(kept, gradient_QxB):
  terms_kxQxB, slope_QxBxD = kept
  weighted = gradient_QxB[..., None] * slope_QxBxD
  return (
    jnp.einsum("kqb,qbd->kd", terms_kxQxB, weighted, precision=jax.lax.Precision.HIGHEST),
    None,
    None,
    None,
  )


bank_sums.defvjp(lambda bank, sums, *kept: (sums, kept), _bank_sums_backward)
