"""Models for where they run: exported, quantised, made smaller."""
