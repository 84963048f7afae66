"""The method: terms, their switches, their weights, the layers they train."""
