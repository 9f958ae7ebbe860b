"""Cards of what was trained or made."""
