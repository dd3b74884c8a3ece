"""The only owner of DeepSpeed."""
