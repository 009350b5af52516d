"""Who runs together, and how: batches as others lay them out, beside the engine's rows without padding."""
