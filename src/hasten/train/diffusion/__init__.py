"""Adaptation of language models to masked and block diffusion, one recipe a file."""
