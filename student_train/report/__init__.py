"""What runs and sweeps say, as a page, as Markdown and as tables."""
