"""adco_jax: pre-training of image encoders with AdCo (arXiv 2011.08435) in JAX and Flax."""
