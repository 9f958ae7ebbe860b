"""What makes data sets."""
