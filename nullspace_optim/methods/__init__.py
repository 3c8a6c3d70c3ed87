"""Functions that single papers need beside a policy."""
