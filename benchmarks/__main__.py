"""All benchmarks: ``make bench``. Nothing else should run meanwhile."""

from benchmarks import gates, observe, prune_save

for benchmark in (observe, gates, prune_save):
    benchmark.main()
