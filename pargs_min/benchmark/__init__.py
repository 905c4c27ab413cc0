"""What a guided token costs."""
