"""Judge a finished model."""
