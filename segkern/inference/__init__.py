"""From pictures to segments, with any model."""
