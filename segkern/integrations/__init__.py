"""Other people's ways of calling: transformers' models in place, its processors, its pipeline."""
