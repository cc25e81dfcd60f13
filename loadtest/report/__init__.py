"""What a load test comes to: figures, verdicts, plots, one page."""
