"""Teachers: large networks that students are distilled from."""
