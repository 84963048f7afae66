"""The loop, its compiled steps, and what feeds them."""
