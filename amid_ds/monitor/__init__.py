"""What watches a running step."""
