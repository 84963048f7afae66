"""Students: networks small enough for a phone or a browser."""
