"""Boundary distillation of skin-lesion segmentation networks."""
