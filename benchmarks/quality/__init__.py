"""Parts of the benchmarks of reconstruction and generation."""
