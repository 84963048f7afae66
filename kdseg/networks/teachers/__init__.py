"""Networks to be learned from."""
