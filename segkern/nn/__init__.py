"""Parts of models; they know ops and nothing above."""
