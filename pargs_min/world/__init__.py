"""The embedded world: a grammar with a gold reward, and its exact values."""
