"""Encoders: torchvision ResNets in Linen, with grouped BatchNorm and a projection head."""
