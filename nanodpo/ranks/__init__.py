"""Several processes that make one run: distributed (starting them, and what they tell each other) and peers (whether
the others still live)."""
