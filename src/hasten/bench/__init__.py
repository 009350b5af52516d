"""Measuring: the race, the exactness check, the side-by-side table, and what this machine can do."""
