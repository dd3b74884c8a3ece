"""Save, verify, resume and export."""
