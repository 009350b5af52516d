"""Training of heads: drafters that read the target's own hidden states."""
