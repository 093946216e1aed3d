"""Clips: list files, decoding, sampling, augmentation, test views, and the embedded moving digits."""
