"""The expert layer of iGSP: experts, router, regularization, convergence and pruning."""
