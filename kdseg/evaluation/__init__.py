"""Masks to scores, scores to intervals."""
