"""Everything that tests share. A test module imports from here, never from a test module."""
