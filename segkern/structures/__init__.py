"""The types that the other rooms hand to each other: targets, logits, results, labels."""
