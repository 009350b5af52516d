"""Canvases: texts whose masked positions are filled, what looks at them, and what decides."""
