"""Weights and traces of other implementations: in, out, and step for step."""
