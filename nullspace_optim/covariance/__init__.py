"""Second moments of captured rows, exact or sketched, summed over batches and ranks."""
