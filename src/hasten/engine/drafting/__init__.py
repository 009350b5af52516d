"""Drafts: what proposes them, how they are put together and planned, and how the target verifies them."""
