"""Adversarial attacks on a callable model that maps images in [0, 1] to logits. Independent of flags and ranks."""
