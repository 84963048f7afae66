"""An experiment whole: its stages in order, and what each leaves behind."""
