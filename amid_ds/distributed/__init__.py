"""Ranks from any launcher, and the collectives that training makes outside DeepSpeed."""
