"""Training: language models from procedural tasks and prose, and (later) drafters and adaptations."""
