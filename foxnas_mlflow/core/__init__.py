"""Layer 0: spaces, architectures, networks, costs, predictors and search. NumPy only."""
