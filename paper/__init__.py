"""What remakes the paper's tables and nothing else: rows, runs, records, benchmarks. Not in the wheel."""
