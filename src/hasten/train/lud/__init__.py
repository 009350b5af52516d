"""Training for lexical unit decoding: what the units of a model's answers are, and a model that says them at once."""
