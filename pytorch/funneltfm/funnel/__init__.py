"""Floors 0 and 1: the Funnel-Transformer, its heads and checkpoints."""
