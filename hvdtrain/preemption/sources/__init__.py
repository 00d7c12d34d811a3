"""Sources of preemption notices, one module each (hvdtrain/preemption/source.py says what a source is)."""
