"""BARTScore: the mean log-likelihood per token of one text given another."""
