"""Adversarial attacks on a callable model that maps images in [0, 1] to logits. Knows neither flags nor ranks."""
