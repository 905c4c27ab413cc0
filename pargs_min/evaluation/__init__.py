"""What texts are worth: statistics, judges, comparisons."""
