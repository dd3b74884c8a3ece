"""Files that survive a crash, a second writer and a full disk."""
