"""All benchmarks: ``make bench``. Nothing else should run meanwhile."""

from benchmarks import diep_step, finetune, fsdp, gates, gradient_criteria, observe, prune_save, skipping

for benchmark in (observe, gates, diep_step, skipping, prune_save, finetune, gradient_criteria, fsdp):
    benchmark.main()
