"""Student and teacher as torch modules."""
