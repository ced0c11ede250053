"""All benchmarks: ``make bench``. Nothing else should run meanwhile."""

from benchmarks import diep_step, finetune, fsdp, gates, naee, observe, prune_save, skipping

for benchmark in (observe, gates, diep_step, skipping, naee, prune_save, finetune, fsdp):
    benchmark.main()
