"""Programs that run here: segment by segment, by several processes, or as text."""
