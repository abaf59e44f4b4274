"""Layer 2: runs, registry and promotion in MLflow."""
