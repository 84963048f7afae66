"""Devices, hosts, files and memory: nothing here knows what a lesion is."""
