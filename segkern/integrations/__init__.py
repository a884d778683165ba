"""Other people's ways of calling: transformers' models, its processors and its pipeline."""
