"""Precomputed, compressed visual context: encode a corpus once, keep what carries information."""
