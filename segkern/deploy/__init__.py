"""Models at work outside of Python programs: exported, made smaller, served."""
