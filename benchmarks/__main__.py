"""All benchmarks: ``make bench``. Nothing else should run meanwhile."""

from benchmarks import (
    compare_shared,
    diep_step,
    finetune,
    fsdp,
    gates,
    gradient_criteria,
    naee,
    observe,
    prune_save,
    scan,
    skipping,
)

BENCHMARKS = (
    observe,
    compare_shared,
    gates,
    diep_step,
    skipping,
    naee,
    scan,
    prune_save,
    finetune,
    gradient_criteria,
    fsdp,
)

if __name__ == "__main__":
    for benchmark in BENCHMARKS:
        benchmark.main()
